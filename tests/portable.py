"""Run the numerical tests as other processors, thread counts and versions of torch round: `make portable`.

python -m tests.portable [further interpreters …] [--only WORD] [--files NAME …]

Each setting makes one library choose other kernels, so that sums are taken in another order. Two extremes change
everything at once. A setting that cannot change anything on this machine is named and left out. Ends with exit code
1 if a test has failed anywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
TORCH = ("norms", "polar", "directions", "points", "curvature", "modular", "dualized", "smoothness", "comm")
NUMPY = ("statistics", "verdict")

# What a library is told about the processor or about threads, and by which variable.
ATEN, MKL, ONEDNN, THREADS = "ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS"
FEATURES = "NPY_DISABLE_CPU_FEATURES"
UNSET = (ATEN, MKL, ONEDNN, THREADS, FEATURES)

PROBE = """
import json, sys, numpy, torch
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
json.dump({
    "torch": torch.__version__,
    "aten": torch.backends.cpu.get_cpu_capability(),
    "mkl": torch.backends.mkl.is_available(),
    "onednn": torch.backends.mkldnn.is_available(),
    "numpy": [f for f in __cpu_dispatch__ if __cpu_features__.get(f)],
}, sys.stdout)
"""


@dataclass(frozen=True)
class Setting:
    """Variables of the environment, beside which the five of UNSET are not set, and the test files that they may
    change.
    """

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    files: Sequence[str] = TORCH


ONE = {THREADS: "1"}
SETTINGS = (
    Setting("as it is", {}, (*TORCH, *NUMPY)),
    Setting("1 thread", ONE),
    Setting("2 threads", {THREADS: "2"}),
    Setting("ATen without vectors", ONE | {ATEN: "default"}),
    Setting("ATen AVX2", ONE | {ATEN: "avx2"}),
    Setting("ATen AVX-512", ONE | {ATEN: "avx512"}),
    Setting("MKL compatible", ONE | {MKL: "COMPATIBLE"}),
    Setting("MKL AVX2", ONE | {MKL: "AVX2"}),
    Setting("oneDNN AVX2", ONE | {ONEDNN: "AVX2"}),
    Setting("oldest processor, 1 thread", ONE | {ATEN: "default", MKL: "COMPATIBLE", ONEDNN: "SSE41"}),
    Setting("AVX2 processor, 2 threads", {THREADS: "2", ATEN: "avx2", MKL: "AVX2", ONEDNN: "AVX2"}),
    Setting("numpy without vectors", ONE | {FEATURES: ""}, NUMPY),
)
# Of another version of torch: as it is, and the furthest from that.
ELSEWHERE = ("as it is", "oldest processor, 1 thread")


def environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's, without UNSET and what a pytest around it has set, and with `variables`."""
    return {k: v for k, v in os.environ.items() if k not in UNSET and not k.startswith("PYTEST_")} | variables


def probe(python: str, variables: dict[str, str]) -> dict:
    """Versions and kernels of this interpreter under these variables."""
    done = subprocess.run([python, "-c", PROBE], env=environment(variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without_effect(python: str, setting: Setting, plain: dict) -> str | None:
    """Why a setting of one variable changes nothing here; None if it may."""
    variables = [v for v in setting.variables if v != THREADS]
    if len(variables) != 1:
        return None
    (variable,) = variables
    if variable == ATEN:
        kernels = probe(python, setting.variables)["aten"]
        return f"this machine uses {kernels} anyway" if kernels == plain["aten"] else None
    if variable == FEATURES:
        return None if plain["numpy"] else "this numpy has no other kernels here"
    library = {MKL: "mkl", ONEDNN: "onednn"}[variable]
    return None if plain[library] else f"this torch is built without {library}"


@dataclass(frozen=True)
class Outcome:
    passed: int
    failures: list[str]
    seconds: dict[str, float]  # by file


def run_tests(python: str, variables: dict[str, str], arguments: Sequence[str]) -> Outcome:
    """pytest's outcome under these variables, from its XML."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        done = subprocess.run(command, env=environment(variables), cwd=ROOT, capture_output=True, text=True)
        assert report.exists(), done.stdout + done.stderr
        cases = list(ElementTree.parse(report).iter("testcase"))
    seconds: dict[str, float] = {}
    failures, passed = [], 0
    for case in cases:
        file = case.get("classname", "").rpartition("test_")[2]
        seconds[file] = seconds.get(file, 0.0) + float(case.get("time", 0))
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failures.append(f"{file}: {case.get('name')}")
        passed += not outcomes & {"failure", "error", "skipped"}
    assert cases or done.returncode == 0, done.stdout + done.stderr
    return Outcome(passed, failures, seconds)


def report(python: str, setting: Setting, plain: dict, files: Sequence[str]) -> Outcome | None:
    """Run one setting and print its row."""
    label = f"{setting.name:<28} torch {plain['torch']:<14}"
    reason = without_effect(python, setting, plain)
    if reason:
        print(f"{label} left out: {reason}", flush=True)
        return None
    variables = setting.variables
    if FEATURES in variables:
        variables = variables | {FEATURES: ",".join(plain["numpy"])}
    paths = [p for f in setting.files if f in files and (p := ROOT / f"tests/test_{f}.py").exists()]
    if not paths:
        return None
    began = time.monotonic()
    outcome = run_tests(python, variables, list(map(str, paths)))
    print(
        f"{label} {outcome.passed:>5} passed {len(outcome.failures):>3} failed {time.monotonic() - began:>5.0f} s",
        flush=True,
    )
    for failure in outcome.failures:
        print(f"    {failure}", flush=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help="interpreters with other versions of torch")
    parser.add_argument("--only", default="", help="settings whose name holds this word")
    parser.add_argument("--files", nargs="+", default=[*TORCH, *NUMPY], help="such as norms for tests/test_norms.py")
    options = parser.parse_args()
    failed = False
    for python in (sys.executable, *options.pythons):
        plain = probe(python, {})
        for setting in SETTINGS:
            if options.only in setting.name and (python == sys.executable or setting.name in ELSEWHERE):
                outcome = report(python, setting, plain, options.files)
                failed |= outcome is not None and bool(outcome.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
