import fnmatch
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    """The files of a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("jaxserve-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_top_level_is_four_packages(names):
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {
        "jaxserve",
        "kernels_pallas",
        "serve",
        "sharding",
    }


def test_every_file_of_the_packages_is_in(names):
    packages = ("jaxserve", "kernels_pallas", "serve", "sharding")
    files = [path for package in packages for path in (ROOT / package).rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts} <= names


@pytest.mark.parametrize(
    "pattern",
    [
        "jaxserve/embedded_model/*config.json",
        "jaxserve/embedded_model/tokenizer.model",
        "jaxserve/py.typed",
        "kernels_pallas/*/tuned.json",
        "kernels_pallas/targets/h200.txtpb",
        "kernels_pallas/py.typed",
        "serve/protos/*.proto",
        "serve/protos/*_pb2.pyi",
        "serve/py.typed",
        "sharding/py.typed",
    ],
)
def test_data_is_in(names, pattern):
    assert fnmatch.filter(names, pattern)


def test_nothing_of_a_build_or_a_test_is_in(names):
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", "examples/", "benchmarks/"))]
