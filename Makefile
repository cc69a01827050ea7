# `make demo` and `make test` set up everything they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
TOOLS := $(VENV)/tools
DOCS := $(VENV)-docs/installed

.PHONY: demo docs test test-fast demo-app-test models interruptions promises quality style benchmark table cards versions coverage peft-suite

# Compiling every file of torch and Transformers would take half of the time; Python compiles those that it imports.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[plot]"
	touch $@

# What tests and checks need besides.
$(TOOLS): $(INSTALLED)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev,plot]"
	touch $@

# What makes the site reads the package and does not import it, so it needs no torch.
$(DOCS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	sed -n '/^docs = \[/,/^\]/s/^ *"\(.*\)",/\1/p' pyproject.toml > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/pip install --quiet --no-compile --constraint constraints.txt --requirement $(VENV)-docs/requirements.txt
	touch $@

demo: $(INSTALLED)  ## Prompt-OT on the built-in images: table and adapters in outputs/prompt_ot
	OMP_NUM_THREADS=2 $(BIN)/accelerate launch --config_file examples/accelerate/cpu_1proc.yaml examples/train_prompt_ot.py

# Where Python is told to keep no bytecode, each process would compile what it imports once more.
demo docs test test-fast coverage promises: export PYTHONDONTWRITEBYTECODE :=

# One process a core, of one thread each: tests of one file stay together. Where PEFT's own tests, timm or MkDocs
# cannot be had (the `-` in front), those alone are skipped, and say why.
test: $(TOOLS)
	-$(BIN)/python tests/contracts/fetch_peft_suite.py
	-$(BIN)/python tests/models/fetch_timm.py
	-$(MAKE) $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-fast: $(TOOLS)  ## what a contributor needs in three minutes: no slow tests, few made-up cases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow" --hypothesis-profile fast

demo-app-test:  ## the Gradio page; an environment of its own, since gradio wants an older Pillow than constraints.txt
	$(PYTHON) -m venv $(VENV)-demo
	grep --invert-match '^pillow=' constraints.txt > $(VENV)-demo/constraints.txt
	$(VENV)-demo/bin/pip install --quiet --constraint $(VENV)-demo/constraints.txt --editable ".[demo]" pytest hypothesis
	OMP_NUM_THREADS=1 $(VENV)-demo/bin/python -m pytest -rs tests/test_demo_app.py

models: $(TOOLS)  ## try everything on a tiny model of every class: docs/supported_models.md
	-$(BIN)/python tests/models/fetch_timm.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.survey

interruptions: $(TOOLS)  ## kill two trainings 25 times each and compare what they come to
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training/state/test_interruptions.py --kills 25

coverage: $(TOOLS)  ## the tests, and which lines and branches none of them reaches
	-$(BIN)/python tests/contracts/fetch_peft_suite.py
	-$(BIN)/python tests/models/fetch_timm.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov peft_ncgeo --cov-branch

promises: $(TOOLS)  ## what docs/reliability.md promises, each with what the tests found: coverage, and 25 kills a training
	-$(BIN)/python tests/contracts/fetch_peft_suite.py
	-$(BIN)/python tests/models/fetch_timm.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --kills 25 --junitxml build/tests.xml \
		--cov peft_ncgeo --cov-branch --cov-report json:build/coverage.json
	$(BIN)/python examples/benchmark_import.py > build/import.txt
	$(BIN)/python -m tests.promises

peft-suite: $(TOOLS)  ## PEFT's own tests on this package's methods, with the count and what does not apply
	-$(BIN)/python tests/contracts/fetch_peft_suite.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/contracts/test_peft_suite.py

docs: $(DOCS)  ## the pages and the API reference as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

quality: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(INSTALLED)  ## training steps, evaluation and memory against those of published code, interleaved in one run
	$(BIN)/python examples/benchmark_speed.py

table: $(INSTALLED)  ## write the last results of the examples into docs and README.md
	$(BIN)/python examples/update_docs.py

cards: $(INSTALLED)  ## render hub_cards from their records; train those without one
	$(BIN)/python examples/make_cards.py

versions:  ## the tests with the declared lower bounds and with the newest releases, each in an environment of its own
	$(PYTHON) tests/run_versions.py --python python3.10 --constraint constraints-oldest.txt
	$(PYTHON) tests/run_versions.py
