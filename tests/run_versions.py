"""Run the tests with other versions: a new environment, the tests, and their counts as one file in tests/versions.

python tests/run_versions.py --python python3.10 --constraint constraints-oldest.txt
python tests/run_versions.py --python python3.12 --tests tests/tuners tests/losses -- transformers==5.10.1 peft==0.21.0
python examples/update_docs.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
SHOWN = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "numpy",
    "scipy",
    "POT",
    "pillow",
)
ASK = f"""
import json, platform
from importlib.metadata import version
print(json.dumps({{"python": platform.python_version(), **{{name: version(name) for name in {SHOWN}}}}}))
"""


def install(folder: Path, python: str, constraint: Path | None, packages: list[str]) -> None:
    """An environment in `folder` with the package, its development tools and `packages`; none of the user's own."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    command = [folder / "bin" / "pip", "install", "--quiet", "--editable", ".[dev,plot]", *packages]
    subprocess.run(command + (["--constraint", constraint] if constraint else []), cwd=ROOT, check=True)


def run_tests(folder: Path, tests: list[str], processes: int) -> dict:
    """Run the tests and return the result file's content: versions, tests, passed and skipped counts, failures."""
    python = folder / "bin" / "python"
    versions = json.loads(subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as outcome:
        report = Path(outcome, "report.xml")
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        command += ["--numprocesses", str(processes), "--dist", "loadfile"]
        subprocess.run(command, cwd=ROOT, env=environment)
        if not report.exists():
            raise SystemExit("pytest did not get as far as to run a test.")
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = [{part.tag for part in case} & {"failure", "error", "skipped"} for case in cases]
    failed = [case for case, outcome in zip(cases, outcomes, strict=True) if outcome & {"failure", "error"}]
    return {
        "versions": versions,
        "tests": tests,
        "passed": outcomes.count(set()),
        "failed": sorted(f"{case.get('classname')}.{case.get('name')}" for case in failed),
        "skipped": outcomes.count({"skipped"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="python3", help="the interpreter to make the environment with")
    parser.add_argument("--constraint", type=Path, help="a constraints file; without one, the newest versions")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="folders and files to run")
    parser.add_argument("--processes", type=int, default=2, help="how many run tests side by side")
    parser.add_argument("--environment", type=Path, help="keep it here; one that exists is used as it is")
    parser.add_argument("packages", nargs="*", help="more requirements, such as transformers==5.10.0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.environment or Path(temporary, "environment")).absolute()
        if not folder.exists():
            install(folder, args.python, args.constraint and args.constraint.absolute(), args.packages)
        result = run_tests(folder, args.tests, args.processes)
    names = {name: result["versions"][name].partition("+")[0] for name in ("python", "torch", "transformers", "peft")}
    path = ROOT / "tests" / "versions" / f"{'-'.join(f'{name}{version}' for name, version in names.items())}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['passed']} passed, {len(result['failed'])} failed, {result['skipped']} skipped: {path}")
    raise SystemExit(bool(result["failed"]))


if __name__ == "__main__":
    main()
