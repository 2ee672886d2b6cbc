"""What may import what, where import-linter does not look: at run time, in scripts, and in the list of dependencies."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

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
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_starts_in_milliseconds_imports_no_jax():
    heavy = {"flax", "jax", "jaxlib", "orbax", "torch", "transformers"}
    modules = [
        "jaxserve",
        "jaxserve.config",
        "jaxserve.errors",
        "jaxserve.request",
        "jaxserve.outputs",
        "jaxserve.plan",
        "jaxserve.engine_client",
        "jaxserve.scheduling.scheduler",
        "jaxserve.tokenization.tokenizer",
        "jaxserve.tokenization.chat_template",
        "jaxserve.request_factory",
        "jaxserve.async_engine",
        "serve.cli",
        "serve.rpc.server",
        "serve.http.server",
    ]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    if found := {heavy} & set(sys.modules):
        raise SystemExit(f"{{module}} imports {{found}}")
"""
    assert _python(code) == ""


def test_what_most_models_need_not_is_imported_when_it_is_needed():
    """Orbax takes 0.3 s of a start and Pallas 0.2 s; a Hugging Face directory on a CPU needs neither."""
    heavy = ["jax.experimental.pallas", "orbax", "tensorstore", "jinja2", "safetensors", "sentencepiece"]
    assert _python(f"import sys, jaxserve; jaxserve.LLM; print(set({heavy}) & set(sys.modules))") == "set()\n"


def test_who_turns_http_off_does_not_load_it():
    code = """
import sys
import serve.cli, serve.lifecycle, serve.rpc.server
raise SystemExit(" ".join({"starlette", "uvicorn"} & set(sys.modules)) or None)
"""
    assert _python(code) == ""


def test_the_siblings_are_imported_by_module():
    """`import sharding` would hide which of its modules is meant."""
    siblings = ("kernels_pallas", "serve", "sharding")
    assert [(str(path), module) for path, module, name in _imports(*PACKAGES) if module in siblings and not name] == []


def test_examples_and_benchmarks_use_the_public_api():
    """The names of `jaxserve`, and `jaxserve.checkpoints` for those who write checkpoints from a training script.

    Some benchmarks look inside: what the host spends in a step, whether a soaked engine is empty, and the GPU's script,
    which times sampling alone and makes the parameters of a released shape that has no files.
    """
    inside = {
        Path("benchmarks", name) for name in ("host_cost.py", "soak.py", "gpu/engine.py", "gpu/kernels.py", "gpu/sizes.py")
    }
    for path, module, name in _imports("examples", "benchmarks"):
        if path not in inside and module.partition(".")[0] in ("jaxserve", "serve", "sharding"):
            assert module in ("jaxserve", "jaxserve.checkpoints"), f"{path} imports {module}"
            assert module != "jaxserve" or not name or name in jaxserve.__all__, f"{path} imports {name}"


def test_dependencies_are_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {_canonical(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}
    providers = metadata.packages_distributions()
    imported = {_distribution(module, providers) for _, module, _ in _imports(*PACKAGES)} - {None}
    assert imported - declared == set()
    assert declared - imported == set()


def _distribution(module: str, providers: Mapping[str, list[str]]) -> str | None:
    """Returns the name under which a package index has the module; None for our own and the interpreter's."""
    top_level = module.partition(".")[0]
    if top_level in sys.stdlib_module_names or top_level in PACKAGES:
        return None
    if top_level == "google":  # a namespace that many distributions share
        return {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}[".".join(module.split(".")[:2])]
    return _canonical(providers[top_level][0])


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
