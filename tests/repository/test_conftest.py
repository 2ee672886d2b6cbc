"""The rules of tests/conftest.py and pyproject.toml hold: each of them can fail a run."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, test: str, **replaced: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on one file of a package, under a copy of our conftest in which some texts are replaced."""
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    for old, new in replaced.items():
        assert old in conftest
        conftest = conftest.replace(old, new)
    (folder / "tests" / "serve").mkdir(parents=True)
    (folder / "tests" / "conftest.py").write_text(conftest)
    (folder / "tests" / "serve" / "test_it.py").write_text(f"import pytest\n\n{test}")
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_eight_strict_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8
    with pytest.raises(Exception, match="implicit dtype promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="never mind"):
        warnings.warn("never mind", stacklevel=1)


def test_a_run_without_complaints_passes(tmp_path):
    done = _run(tmp_path, "def test_it(): pass")
    assert done.returncode == 0, done.stdout
    assert "1 tests" in done.stdout


@pytest.mark.parametrize(
    "test",
    [
        "def test_it(): pytest.skip('not today')",
        "@pytest.mark.skip('not today')\ndef test_it(): pass",
        "pytest.skip('not today', allow_module_level=True)",
    ],
)
def test_an_unexpected_skip_fails_the_run(tmp_path, test):
    done = _run(tmp_path, f"def test_that(): pass\n\n{test}")
    assert "UNEXPECTED SKIP tests/serve/test_it.py" in done.stdout
    assert "not today" in done.stdout
    assert done.returncode != 0


def test_an_expected_skip_and_an_expected_failure_are_fine(tmp_path):
    test = "def test_it(): pytest.skip('not today')\n\n@pytest.mark.xfail\ndef test_that(): assert False"
    done = _run(tmp_path, test, **{"EXPECTED_SKIPS = {": "EXPECTED_SKIPS = {'not today': True,"})
    assert done.returncode == 0, done.stdout


def test_a_package_over_its_budget_fails_the_run(tmp_path):
    done = _run(tmp_path, "def test_it(): pass", **{'"serve": 120.0': '"serve": 0.0'})
    assert "OVER BUDGET" in done.stdout
    assert done.returncode == 1
