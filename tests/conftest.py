"""How every test runs: on 8 CPU devices, strictly, offline, and within the time its package may take.

Three tables say what is tolerated, and a run fails on anything beyond them: `BUDGETS_S`, `EXPECTED_SKIPS`, and the warning
filters in pyproject.toml.
"""

import importlib.util
import os
import pathlib
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Before anything imports jax, and through the environment, so that the processes that tests start are as strict.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
# A second run need not compile again what the first one did; which programs a test may compile is counted either way.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# XLA reads this once: a kernel compiled for a GPU that is not there must fit into its registers.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_fail_ptx_compilation_on_register_spilling=true"

BUDGETS_S = {
    "benchmarks": 25.0,
    "examples": 20.0,
    "jaxserve": 255.0,
    "jaxserve/scheduling": 20.0,
    "jaxserve/tokenization": 30.0,
    "kernels_pallas": 135.0,
    "repository": 45.0,
    "serve": 120.0,
    "sharding": 45.0,
}
"""What the tests below tests/<key> may take together on an idle machine [s]; the longest key counts. All: under 10 minutes."""

EXPECTED_SKIPS = {
    r"could not import '(torch|transformers)'|transformers is the oracle": sys.version_info >= (3, 12),
    r"could not import 'jinja2'": importlib.util.find_spec("jinja2") is None,
}
"""Pattern of a skip's reason -> whether it is expected here.

torch, transformers: the oracle of the parity tests is installed on Python 3.11 alone. What it checks, our arithmetic, does
not depend on the interpreter, and it would double the size of the second environment (2026-11-23).
jinja2: a bare machine (`make test-bare`) has none; the error that it gets is tested in tests/repository/test_bare_machine.py.
"""

NEAR_TIES = "near_ties"
"""Property by which a test tells how often a reference could not decide between two tokens; told at the end, passed or not."""


class _Ledger:
    """What the run has used up, and what it skipped. One a run, owned by the plugin hooks below."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.num_tests: dict[str, int] = defaultdict(int)
        self.unexpected_skips: list[str] = []
        self.near_ties: list[str] = []

    def package_of(self, path: str) -> str:
        folder = path.removeprefix("tests/")
        matches = [key for key in BUDGETS_S if folder.startswith(f"{key}/")]
        return max(matches, key=len, default="(no budget)")

    def over_budget(self) -> list[str]:
        return [key for key, seconds in self.seconds.items() if seconds > BUDGETS_S.get(key, 0.0)]

    def note_skip(self, nodeid: str, reason: str) -> None:
        if not any(expected and re.search(pattern, reason) for pattern, expected in EXPECTED_SKIPS.items()):
            self.unexpected_skips.append(f"{nodeid}: {reason}")


_ledger = _Ledger()


def _crowding() -> float:
    """How much slower than alone we are: runnable threads a core, at least 1. Keeps a busy machine from failing the run."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "slow" not in report.keywords:
        package = _ledger.package_of(report.location[0])
        _ledger.seconds[package] += report.duration / _crowding()
        _ledger.num_tests[package] += report.when == "call"
    if report.when == "call":
        test = report.nodeid.rpartition("/")[2]
        _ledger.near_ties += [f"{test}: {text}" for name, text in report.user_properties if name == NEAR_TIES]
    if report.skipped and not hasattr(report, "wasxfail"):
        _ledger.note_skip(report.nodeid, _reason(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _ledger.note_skip(report.nodeid, _reason(report))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    if exitstatus == pytest.ExitCode.OK and (_ledger.over_budget() or _ledger.unexpected_skips):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    over_budget = _ledger.over_budget()
    if _ledger.near_ties:
        terminalreporter.section("near ties among greedy tokens")
        for line in _ledger.near_ties:
            terminalreporter.line(line)
    terminalreporter.section("time by package (slow tests not counted)")
    for key in sorted(_ledger.seconds):
        mark = "  OVER BUDGET" if key in over_budget else ""
        row = f"{key:24} {_ledger.num_tests[key]:5} tests {_ledger.seconds[key]:7.1f} s of {BUDGETS_S.get(key, 0.0):5.0f} s"
        terminalreporter.line(row + mark, red=bool(mark))
    for skip in _ledger.unexpected_skips:
        terminalreporter.line(f"UNEXPECTED SKIP {skip} (EXPECTED_SKIPS in tests/conftest.py)", red=True)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt here, and in what a test starts.

    A run that was started in the background ignores the signal, and its children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
