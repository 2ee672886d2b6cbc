import ast
import os
import pathlib
import subprocess
import sys
import types

import pytest

import jaxserve
from jaxserve import errors

ROOT = pathlib.Path(jaxserve.__file__).parent.parent

PUBLIC = {
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
}


def test_all_is_exactly_what_is_public():
    tree = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert set(jaxserve.__all__) == PUBLIC.union(tree)
    assert dir(jaxserve) == sorted(jaxserve.__all__)


@pytest.mark.parametrize("name", jaxserve.__all__)
def test_every_public_name_resolves(name):
    value = getattr(jaxserve, name)
    assert name == "__version__" or value.__name__ == name


def test_what_type_checkers_see_is_what_is_exported():
    tree = ast.parse(pathlib.Path(jaxserve.__file__).read_text())
    seen = {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    exported = {name: getattr(jaxserve, name).__module__ for name in jaxserve.__all__ if name != "__version__"}
    assert {name: seen[name] for name in exported} == exported


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = jaxserve.Llm


@pytest.mark.parametrize("sibling", ["kernels_pallas", "sharding"])
@pytest.mark.parametrize("intruder", ["{}.py", "{}/__init__.py"])
def test_a_stranger_of_a_siblings_name_is_named(tmp_path, sibling, intruder):
    path = tmp_path / intruder.format(sibling)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", "import jaxserve"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: jaxserve needs its own package {sibling!r} at {ROOT / sibling}" in done.stderr
    assert str(tmp_path / sibling) in done.stderr


def test_a_missing_sibling_is_named(monkeypatch):
    with pytest.raises(ImportError, match=r"'no_such_sibling' at .* finds nothing"):
        jaxserve._check_sibling("no_such_sibling")
    monkeypatch.setitem(sys.modules, "put_by_hand", types.ModuleType("put_by_hand"))
    with pytest.raises(ImportError, match=r"'put_by_hand' at .* finds nothing"):
        jaxserve._check_sibling("put_by_hand")
