"""The engine core needs what a bare GPU machine has (`tests/bare_machine.txt`), and nothing else.

Each test is a process in which every other distribution that is installed here is blocked, as if it were not. `make test-bare`
runs the core's own tests where they really are not installed.
"""

import functools
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN = {"jaxserve", "kernels_pallas", "serve", "sharding"}
PLUGIN = re.compile("jax-cuda|jax-rocm|nvidia-")
"""A GPU machine's jax has these; without a GPU they do nothing."""

BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {blocked}):
            raise ModuleNotFoundError(f"No module named {{name!r}}: a bare machine has none", name=name)

sys.meta_path.insert(0, Blocker())
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bare_distributions() -> set[str]:
    """What `tests/bare_machine.txt` installs: the packages that it names and all that they require."""
    lines = (ROOT / "tests" / "bare_machine.txt").read_text().splitlines()
    waiting = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    found: set[str] = set()
    while waiting:
        name = canonical(waiting.pop())
        if name not in found:
            found.add(name)
            try:
                requirements = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # required on another platform or Python
                continue
            waiting += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    return found


@functools.cache
def blocked_modules() -> list[str]:
    """Modules of all other distributions; in a namespace that several share (google), the second level counts."""
    bare = bare_distributions()
    modules: dict[bool, set[str]] = {True: set(), False: set()}
    for distribution in metadata.distributions():
        name = canonical(distribution.metadata["Name"])
        is_bare = name in bare or PLUGIN.match(name) is not None
        for file in distribution.files or ():
            if file.suffix in (".py", ".so") and not file.parts[0].endswith((".dist-info", "..", "bin")):
                top = file.parts[0].partition(".")[0]
                module = f"google.{file.parts[1]}" if top == "google" and len(file.parts) > 2 else top
                modules[is_bare].add(module)
    return sorted(name for name in modules[False] - modules[True] - OWN if not name.startswith("_"))


def run_bare(code: str) -> str:
    """Runs code with everything else blocked; returns what it prints."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=blocked_modules()) + code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_block_is_about_the_right_packages():
    blocked = set(blocked_modules())
    assert not blocked & {
        "jax",
        "jaxlib",
        "flax",
        "numpy",
        "orbax",
        "tokenizers",
        "sentencepiece",
        "ml_dtypes",
        "google.protobuf",
    }
    installed = {"pytest", "hypothesis"} | {
        name for name in ("grpc", "jinja2", "pydantic", "safetensors", "typer", "google.rpc") if _is_installed(name)
    }
    assert installed <= blocked
    code = f"""
import importlib
for name in {sorted(installed)}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    assert run_bare(code).count("a bare machine has none") == len(installed)


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name.partition(".")[0]) is not None and find_spec(name) is not None


def test_every_module_of_the_core_can_be_imported():
    """All of jaxserve, its kernels and its sharding; chat templates alone need another package, when they are rendered."""
    folders = ("jaxserve", "kernels_pallas", "sharding")
    files = [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    core = [name for name in modules if not name.startswith("jaxserve.tokenization.template_")]
    assert len(core) > 60
    run_bare(f"import importlib\nfor name in {core}: importlib.import_module(name)")


def test_the_engine_runs():
    """The toy's tokens, and those of a tiny Llama of the caller's own, equal what a recomputation in numpy says."""
    run_bare("""
import numpy as np
from jaxserve import LLM, SamplingParams
from jaxserve.models import toy
from jaxserve.models.weights import flatten
from jaxserve.testing import oracle
from jaxserve.testing.tiny_checkpoint import TinyLlama, caller_params

limits = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 64, "page_size": 8, "num_pages": 8, "use_tqdm": False}
greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
with LLM("toy", **limits) as llm:
    (output,) = llm.generate("hello", greedy, use_tqdm=False)
    assert output.outputs[0].token_ids == toy.continuation(b"hello", 6)
    assert output.outputs[0].text == bytes(toy.continuation(b"hello", 6)).decode()

tiny = TinyLlama(num_layers=1, vocab_size=64)
own = caller_params(tiny)
with LLM(**own, **limits) as llm:
    (output,) = llm.generate([[5, 6, 7]], greedy, use_tqdm=False)
    assert output.outputs[0].token_ids == oracle.greedy(flatten(own["params"]), tiny.config(), [5, 6, 7], 6).token_ids
""")


def test_the_script_for_a_gpu_runs(tmp_path):
    """Its imports are all parts'; the small numerics stand for the rest, which `tests/benchmarks` runs."""
    printed = run_bare(f"""
from pathlib import Path
from benchmarks.gpu.__main__ import run
assert run(["numerics"], is_small=True, seed=1, directory=Path({str(tmp_path)!r})) == 0
""")
    assert "All is right." in printed and (tmp_path / "report.md").exists()


def test_an_orbax_checkpoint_loads_and_the_rest_says_what_it_lacks(tmp_path):
    """The model in the package was written by `jaxserve convert`; its tokenizer is a tokenizer.json."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    printed = run_bare(f"""
import jax
from jaxserve import CheckpointError, ConfigError
from jaxserve.checkpoints import huggingface
from jaxserve.checkpoints.load import load_parameters, read_config
from jaxserve.model_source import EMBEDDED
from jaxserve.models.registry import make_model
from jaxserve.tokenization.chat_template import encode_chat
from jaxserve.tokenization.loading import load_tokenizer

parameters = make_model(read_config(EMBEDDED)).parameters()
leaves = load_parameters(EMBEDDED, parameters, {{p.path: jax.ShapeDtypeStruct(p.shape, "float32") for p in parameters}})
assert leaves.keys() == {{p.path for p in parameters}}
tokenizer = load_tokenizer(EMBEDDED)
assert tokenizer.decode(tokenizer.encode("def fib(n):")) == "def fib(n):"
try:
    encode_chat(tokenizer, [{{"role": "user", "content": "hi"}}], chat_template="x")
except ConfigError as error:
    print(error)
try:
    load_parameters({str(tmp_path)!r}, parameters, {{}})
except CheckpointError as error:
    print(error)
""")
    chat, safetensors = printed.splitlines()
    assert re.search("Chat templates need the package jinja2, .* install it with pip", chat)
    assert re.search("model.safetensors needs the package safetensors; install it with pip", safetensors)
