"""A skip needs one of these reasons; any other fails the run."""

from collections.abc import Iterator

import pytest

REASONS = ("needs the texts of NANODUAL_DATA", "needs a GPU", "needs a browser")
_unexplained: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped and isinstance(report.longrepr, tuple) else None
    if reason is not None and reason not in REASONS:
        _unexplained.append(f"{report.nodeid}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _unexplained:
        terminalreporter.write_line(f"SKIPPED WITHOUT AN ALLOWED REASON {line}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexplained:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of many small operations."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
