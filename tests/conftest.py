"""A skip needs one of these reasons; any other fails the run.

Files of tests run in the order of their measured durations, the longest first, so that workers end together.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

SECONDS = Path(__file__).parent / "seconds.json"  # of each file, in a whole `make test`
UNKNOWN = 10.0  # seconds of a file that is new
REASONS = ("needs the texts of NANODUAL_DATA", "needs a GPU", "needs a browser")
_unexplained: list[str] = []
_seconds: defaultdict[str, float] = defaultdict(float)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that a test saves, in order."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: saved.append(figure) or save(figure, *args, **kw)
    )
    return saved


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-seconds", action="store_true", help=f"write {SECONDS.name}, by which files of tests are ordered"
    )


def pytest_configure() -> None:
    """Choose the day's tenth of the fleet, before xdist starts workers: all of them take one."""
    os.environ.setdefault("NANODUAL_FLEET", str(date.today().timetuple().tm_yday))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = json.loads(SECONDS.read_text())
    items.sort(key=lambda item: -seconds.get(item.path.name, UNKNOWN))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[Path(report.location[0]).name] += report.duration
    reason = (
        report.longrepr[2].removeprefix("Skipped: ") if report.skipped and isinstance(report.longrepr, tuple) else None
    )
    if reason is not None and reason not in REASONS:
        _unexplained.append(f"{report.nodeid}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _unexplained:
        terminalreporter.write_line(f"SKIPPED WITHOUT AN ALLOWED REASON {line}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-seconds") and not hasattr(session.config, "workerinput"):
        SECONDS.write_text(
            json.dumps({name: round(s, 1) for name, s in sorted(_seconds.items(), key=lambda x: -x[1])}, indent=1)
            + "\n"
        )
    if _unexplained:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def no_lines_in_the_checkout() -> Iterator[None]:
    """What a test trains is no evidence: no study of a test begins a file of results here."""
    results = Path(__file__).parent.parent / "studies/results"
    before = {p.name for p in results.glob("*.jsonl")}
    yield
    assert {p.name for p in results.glob("*.jsonl")} == before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of many small operations."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
