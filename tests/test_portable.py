"""tests/portable.py, and the cheapest part of `make portable`: what depends most on rounding, as the oldest processor
rounds.
"""

import sys

import pytest

from tests.portable import ATEN, FEATURES, MKL, ONEDNN, SETTINGS, Setting, environment, run_tests, without_effect

# A singular system of an oracle and SOAP's directions were once what another processor rounded away.
KEY_TESTS = (
    "tests/test_directions.py",
    "tests/test_curvature.py::test_the_largest_curvature_among_signs_is_that_of_all_corners_or_faces[of rank 3-by_faces-5]",
)
OLDEST = next(s for s in SETTINGS if s.name.startswith("oldest"))


def test_what_depends_most_on_rounding_holds_as_the_oldest_processor_rounds():
    outcome = run_tests(sys.executable, OLDEST.variables, KEY_TESTS)
    assert outcome.passed > 1 and not outcome.failures


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({MKL: "AVX2"}, "this torch is built without mkl"),
        ({ONEDNN: "AVX2"}, "this torch is built without onednn"),
        ({FEATURES: ""}, "this numpy has no other kernels here"),
        (OLDEST.variables, None),
        ({}, None),
    ],
)
def test_a_setting_that_changes_nothing_is_left_out_with_its_reason(variables: dict[str, str], reason: str | None):
    assert (
        without_effect(sys.executable, Setting("", variables), {"mkl": False, "onednn": False, "numpy": []}) == reason
    )


def test_a_setting_has_no_variables_of_the_run_around_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ATEN, "default")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert environment({MKL: "AVX2"}).items() >= {MKL: "AVX2"}.items()
    assert not environment({}).keys() & {ATEN, "PYTEST_XDIST_WORKER"}
