"""PEFT's own tests, run on this package's methods.

Every test of PEFT's suite that is written for all its methods (parametrised with five of them or more) runs on every
case of `peft_suite_cases.py`. What cannot apply stands in `NOT_APPLICABLE` with the reason, and must fail there in the
way that is written beside it. `make peft-suite` fetches the suite; none of it is kept here.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from ..conftest import pixels
from .fetch_peft_suite import FAILURE, TESTS, VERSION
from .peft_suite_cases import CASES, Case, Models, OneTensorResNet, inputs, plain_resnet

if not TESTS.exists():
    why = FAILURE.read_text().strip() if FAILURE.exists() else "they have not been fetched"
    pytest.skip(f"PEFT {VERSION}'s own tests: {why}; run `make peft-suite`.", allow_module_level=True)

from .peft_suite import ARGUMENTS, MODELS, ending, import_files, methods, parametrized, prepare

# By their words, since the tests look at warnings too.
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.filterwarnings(f"ignore:.*{words}")
        for words in (
            "is_gradient_checkpointing",
            "gradient_checkpointing_enable",
            "was active which is now deleted",
            "Class-scoped fixtures defined as instance methods",
            "NO_SHARD",
            "a `runtime_config` key",
        )
    ),
]
READ = "0.21.2"  # the version whose suite this file was written for
# PEFT's files with tests for every method, in the order in which a check that several of them call is run once.
FILES = {
    "test_custom_models": CASES,
    "test_feature_extraction_models": CASES,
    "test_decoder_models": CASES,
    "test_low_level_api": CASES,
    "test_vision_models": [case for case in CASES if case.model_cls is OneTensorResNet],
    "test_config": CASES,
}
METHODS = 5  # a test that names so many of PEFT's methods is meant for every method


class NotApplicable(NamedTuple):
    """Tests (a pattern for their label) and cases (for their name) of which `says` is found in how they end."""

    tests: str
    cases: str
    says: str
    reason: str


EVERY = ".*"
NO_MERGE = "This adapter cannot be merged into weights"
NOT_APPLICABLE = [
    NotApplicable(
        "test_(merge_layers_(?!multi).*|merge_layers|safe_merge|disable_adapters_with_merging|delete_merged_adapter_.*"
        "|sequential_merge_.*|unmerge_after_.*)",
        EVERY,
        NO_MERGE,
        "Prompts, heads and prototypes are no change to a weight: merging is refused.",
    ),
    NotApplicable(
        "test_merge_layers_multi",
        EVERY,
        NO_MERGE + r"|assert not torch.allclose\(outputs_adapter_1, outputs_adapter_2",
        "Merging is refused; before that, CoPA's adapters are equal where a test does not ask for other weights.",
    ),
    NotApplicable(
        "test_forward_b?float16(_no_autocast)?",
        EVERY,
        f"{NO_MERGE}.*model.merge_adapter",
        "The passes in half precision are done; what fails is the merging that the test ends with.",
    ),
    NotApplicable(
        "test_active_adapter|test_multiple_active_adapters_(forward|merge_and_unmerge|with_different_modules.*)",
        EVERY,
        "One adapter of this kind can be active at a time|[Mm]ultiple .*modules_to_save",
        "Two adapters have prompts for the same slots, or heads for the same feature: one is active at a time.",
    ),
    NotApplicable(
        "test_disable_adapters",
        "(?!COPA-clip|ADAPTFORMER).*",
        r"assert torch.allclose\(outputs_base, outputs_before",
        "Expects the identity at the start; prompts and prototypes are none, TSA's maps start beside it.",
    ),
    NotApplicable(
        "test_adapter_name_makes_no_difference",
        "COPA-clip|ADAPTFORMER.*",
        r"assert not torch.allclose\(output_base, output_default",
        "Expects weights away from the identity, which is where CoPA's heads and AdaptFormer start.",
    ),
    NotApplicable(
        "test_adapter_dtype_autocast autocast_adapter_dtype=False dtype=torch.b?float16 .*"
        "|test_add_adapter_no_autocast_adapter_dtype .*",
        EVERY,
        "p.dtype == expected_dtype|get_adapter_dtype.* <= expected_dtype",
        "What is learned is float32 whatever the model's type, also without autocast_adapter_dtype.",
    ),
    NotApplicable(
        "test_in_features_out_features_exposed",
        "(?!COPA-clip).*",
        'hasattr.module, "in_features"',
        "For tuners of linear layers; what is wrapped here are embeddings, layers, heads and convolutions.",
    ),
    NotApplicable(
        "test_(set_adapter_non_overlapping_modules.*|set_requires_grad|multiple_adapters_mixed_modules_to_save.*)",
        EVERY,
        "has no attribute '(layers|lin1)'",
        "Looks at the linear layers of a made-up network that our methods have no place in.",
    ),
    NotApplicable(
        "test_(save_pretrained_with_target_modules|inject_adapter_in_model_rejects_shared_state_tuners)",
        EVERY,
        "unexpected keyword argument 'target_modules'",
        "Places are found by the model's structure: no target_modules, and no state shared between layers either.",
    ),
    NotApplicable(
        "test_(training_layer_indexing|config_layers_to_transform_index_zero)",
        EVERY,
        "layers_to_transform",
        "Depth and first_layer say which layers have prompts: no layers_to_transform.",
    ),
    NotApplicable(
        "test_(adding_multiple_adapters_with_bias_raises|disable_adapter_with_bias_warns"
        "|save_load_roundtrip_fsdp_wrapped_learnable_bias .*)",
        EVERY,
        "Skipped: .*(bias)",
        "No bias of the model is trained: no such field.",
    ),
    NotApplicable(
        "test_save_load_roundtrip_fsdp_wrapped",
        ".*-clip.*",
        "FSDP doesn't support scalar parameters.*logit_scale",
        "FSDP's first version refuses CLIP itself, for its logit_scale; the round trip is made by ViT and ResNet.",
    ),
    NotApplicable(
        "test_training_gradient_checkpointing .*",
        ".*-resnet.*",
        "Skipped: .*does not support gradient checkpointing",
        "Transformers' ResNet has no gradient checkpointing.",
    ),
    NotApplicable(
        "test_prepare_for_training_parametrized",
        EVERY,
        "get_input_embeddings.*not auto.handled|KeyError: 'input_ids'",
        "Passes tokens to get_input_embeddings(); CLIPModel and ResNet have none, and ViT's takes images.",
    ),
    NotApplicable(
        "test_(training_prompt_learning_tasks|passing_input_embeds_works|set_requires_grad_prompt_learning_raises)",
        EVERY,
        "Skipped: ",
        "For PEFT's own prompt types, which lengthen the input of a language model; ours wrap layers.",
    ),
    NotApplicable(
        "test_prompt_learning_with_gradient_checkpointing",
        EVERY,
        "backend tokenizer|asks for the network|does not support activation checkpointing",
        "Trains a language model on a text from the network.",
    ),
    NotApplicable(
        "test_generate|test_generate_(pos_args|half_prec)|test_disable_adapter",
        EVERY,
        "has no attribute 'generate'|KeyError: 'input_ids'",
        "Generates text.",
    ),
    NotApplicable(
        "test_(generate_with_)?mixed_adapter_batches",
        EVERY,
        "Skipped: Mixed adapter batches",
        "An adapter a row of the batch: only LoRA and RoAD have it.",
    ),
    NotApplicable(
        "test_weighted_combination_of_adapters",
        EVERY,
        "Skipped: Test not applicable",
        "Combines the factors of LoRA and IA3; our add_weighted_adapter has tests of its own.",
    ),
]
# Tests and files with a name of every method in them that are not for every method.
NOT_RUN = {
    "test_add_weighted_adapter_cat_with_rank_pattern": "makes LoRA whatever class it is given",
    "test_encoder_decoder_models": "text to text; the checks are those of test_decoder_models",
    "test_initialization": "LoRA's ranks for grouped convolutions",
    "test_lora_variants": "LoRA's variants",
    "test_other": "LoRA's and VeRA's targets",
    "test_quantization": "quantized linear layers",
    "test_seq_classifier": "text classification; the checks are those of test_feature_extraction_models",
    "test_stablediffusion": "diffusion models",
    "test_target_parameters": "LoRA on parameters",
    "test_token_classification_qa": "token classification and answers to questions",
}


def label(test: Callable, others: dict[str, Any]) -> str:
    """A test with those of its parameters that are not ours, as `NOT_APPLICABLE` reads it."""
    return " ".join([test.__name__, *(f"{name}={value}" for name, value in sorted(others.items()))])


def entry_for(text: str, case: Case) -> NotApplicable | None:
    """The first entry of the list for a test and a case."""
    entries = (e for e in NOT_APPLICABLE if re.fullmatch(e.tests, text) and re.fullmatch(e.cases, case.name))
    return next(entries, None)


def ours(names: list[str], values: list) -> bool:
    """Return True if the parameters are those that the cases give."""
    return len(methods(values)) >= METHODS or bool(MODELS & set(names))


def for_all_methods(test: Callable) -> bool:
    """Return True if a test names enough methods and takes only what the cases give; note what else it takes."""
    if test.__name__ in NOT_RUN or all(len(methods(values)) < METHODS for _, values, _ in parametrized(test)):
        return False
    taken = [name for names, values, _ in parametrized(test) if ours(names, values) for name in names]
    strange = sorted(set(taken) - ARGUMENTS.keys())
    if strange:
        PROBLEMS.append(f"{test.__name__} takes {', '.join(strange)}")
    return not strange


def adopt(test: Callable, cases: list[Case]) -> Callable:
    """The test with our cases in the place of PEFT's, and its other parameters as they are."""
    given: list[str] = []
    others: dict[str, list] = {}
    marks = []
    for names, values, mark in parametrized(test):
        if ours(names, values):
            given += names
        else:
            marks.append(mark)
            others |= {name: [v if len(names) == 1 else v[i] for v in values] for i, name in enumerate(names)}
    alone = len(given) == 1

    @functools.wraps(test)
    def run(self: Any, **arguments: Any) -> None:
        case = arguments[given[0]]
        rest = {name: value for name, value in arguments.items() if name not in given}
        entry = entry_for(label(test, {name: rest[name] for name in others}), case)
        self.case = case
        try:
            with pytest.MonkeyPatch.context() as patch:
                prepare(patch, sys.modules[test.__module__], case)
                test(self, **rest, **{name: ARGUMENTS[name](case, alone) for name in given})
        except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:
            if entry is None or not re.search(entry.says, ending(error)):
                if isinstance(error, pytest.skip.Exception):
                    pytest.fail(f"PEFT skips it, and no reason is listed: {ending(error)}", pytrace=False)
                raise
        else:
            if entry is not None:
                pytest.fail(f"It passes; take it out of the list: {entry}", pytrace=False)
            return
        # here, not where the error is at hand: the source of every traceback would be parsed
        raise pytest.xfail.Exception(entry.reason, pytrace=False)

    run.pytestmark = [
        *marks,
        pytest.mark.parametrize(given, [pytest.param(*[case] * len(given), id=case.name) for case in cases]),
    ]
    for values in itertools.product(*others.values()):
        LABELS.extend((label(test, dict(zip(others, values, strict=True))), case) for case in cases)
    return run


AROUND = {  # what PEFT's test classes ask of themselves
    "transformers_class": Models,
    "prepare_inputs_for_testing": lambda self: inputs(self.case.model_cls),
    "resolve_model_cls": lambda self, path: Models.from_pretrained(path),
    "model_id": property(lambda self: plain_resnet()),
    "data": pytest.fixture(lambda self: {"pixel_values": pixels(1)}),
}
LABELS: list[tuple[str, Case]] = []
MODULES, PROBLEMS = import_files(FILES)


def checks(test: Callable) -> tuple[frozenset, frozenset]:
    """Which of the checks that PEFT's files share a test calls, and with which keywords."""
    code = test.__code__
    names = frozenset(name for name in code.co_names if name.startswith("_test_"))
    return names, frozenset(value for value in code.co_consts if isinstance(value, tuple))


def adopted_classes() -> Iterator[type]:
    """PEFT's test classes with their tests for all methods and no others."""
    done: set[tuple] = set()  # in the files so far
    for name, module in MODULES.items():
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        found = set()
        for cls in classes:
            tests = {n: test for n, test in vars(cls).items() if n.startswith("test") and callable(test)}
            general = {n: test for n, test in tests.items() if for_all_methods(test)}
            run = {n: adopt(t, FILES[name]) for n, t in general.items() if not checks(t)[0] or checks(t) not in done}
            if run:
                yield type(cls.__name__, (cls,), {**dict.fromkeys(tests), **AROUND, **run})
            found |= {checks(test) for test in general.values()}
        done |= found
        if not found:
            PROBLEMS.append(f"{name}.py has no test for all methods")


for adopted in adopted_classes():
    if adopted.__name__ in globals():
        PROBLEMS.append(f"two files have a class {adopted.__name__}")
    globals()[adopted.__name__] = adopted


def test_the_suite_has_the_layout_that_is_read_here():
    """Another version's may not; a file with tests for all methods that is neither run nor listed is one sign."""
    general = re.compile(r'parametrize\(\s*"[^"]*config_cl(s|ass)')
    unknown = [path.stem for path in sorted(TESTS.glob("*.py")) if general.search(path.read_text(encoding="utf-8"))]
    problems = PROBLEMS + [f"{stem}.py is new" for stem in unknown if stem not in FILES and stem not in NOT_RUN]
    if problems:
        pytest.fail(
            f"PEFT {VERSION}'s suite has another layout than {READ}'s, which {__name__} reads: {'; '.join(problems)}.",
            pytrace=False,
        )


def test_nothing_is_listed_that_the_suite_does_not_have():
    listed = {entry for text, case in LABELS if (entry := entry_for(text, case)) is not None}
    assert [entry for entry in NOT_APPLICABLE if entry not in listed] == []
    text = "".join(path.read_text(encoding="utf-8") for path in TESTS.glob("*.py"))
    assert [n for n in NOT_RUN if f"def {n}(" not in text and not (TESTS / f"{n}.py").exists()] == []
