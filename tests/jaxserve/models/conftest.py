"""Near ties of the parity tests are told at the end of the run, passed or not."""

import pytest

NEAR_TIES = "near_ties"
_told: list[tuple[str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _told.extend((report.nodeid.rpartition("/")[2], text) for name, text in report.user_properties if name == NEAR_TIES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _told:
        terminalreporter.section("near ties among greedy tokens")
        for test, text in _told:
            terminalreporter.line(f"{test}: {text}")
