"""What may import what, where import-linter does not look: at run time, in scripts, and in the list of dependencies."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import jaxserve

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxserve", "kernels_pallas", "serve", "sharding")


def _imports(*folders: str) -> Iterator[tuple[Path, str, str]]:
    """Yields (file, module, imported name or "") for every import statement below these folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((path.relative_to(ROOT), alias.name, "") for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield from ((path.relative_to(ROOT), node.module, alias.name) for alias in node.names)


def _python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "jaxserve",
        "jaxserve.async_engine",
        "jaxserve.config",
        "jaxserve.engine_client",
        "jaxserve.errors",
        "jaxserve.outputs",
        "jaxserve.plan",
        "jaxserve.request",
        "jaxserve.request_factory",
        "jaxserve.scheduling.scheduler",
        "jaxserve.tokenization.tokenizer",
        "serve.cli",
    ],
)
def test_what_starts_in_milliseconds_imports_no_jax(module):
    heavy = "{'jax', 'jaxlib', 'flax', 'orbax', 'torch', 'transformers'}"
    assert _python(f"import sys, {module}; print({heavy} & set(sys.modules))") == "set()\n"


def test_the_engine_core_needs_only_what_a_bare_gpu_machine_has():
    """jax, flax, numpy, orbax and a tokenizer: everything else is blocked, as if it were not installed."""
    blocked = ["grpc", "grpc_health", "grpc_reflection", "grpc_status", "huggingface_hub", "jinja2", "pydantic_settings"]
    blocked += ["torch", "transformers", "typer"]
    _python(f"import sys; sys.modules.update(dict.fromkeys({blocked})); import jaxserve; jaxserve.LLM")


def test_the_siblings_are_imported_by_module():
    """`import sharding` would hide which of its modules is meant."""
    bare = [(str(path), module) for path, module, name in _imports(*PACKAGES) if module in PACKAGES and not name]
    assert bare == []


def test_examples_and_benchmarks_use_the_public_api():
    """The names of `jaxserve`, and `jaxserve.checkpoints` for those who write checkpoints from a training script."""
    for path, module, name in _imports("examples", "benchmarks"):
        if module.partition(".")[0] in ("jaxserve", "serve", "sharding"):
            assert module in ("jaxserve", "jaxserve.checkpoints"), f"{path} imports {module}"
            assert module != "jaxserve" or not name or name in jaxserve.__all__, f"{path} imports {name}"


def test_dependencies_are_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {_canonical(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}
    providers = metadata.packages_distributions()
    modules = {module.partition(".")[0] for _, module, _ in _imports(*PACKAGES)} - sys.stdlib_module_names - set(PACKAGES)
    imported = {_canonical(provider) for module in modules for provider in _distributions(module, providers)}
    # jax brings its own jaxlib, grpcio-status the google.rpc messages: declared by the one that pins them.
    assert imported - declared <= {"googleapis-common-protos", "jaxlib"}
    assert declared - imported == set()


def _distributions(module: str, providers: dict[str, list[str]]) -> list[str]:
    # The google namespace is shared: google.protobuf is the one that we use.
    return ["protobuf"] if module == "google" else providers[module][:1]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
