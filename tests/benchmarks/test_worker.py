"""A peer's own environment has numpy and the peer: the worker must not ask for more."""

import subprocess
import sys


def test_the_worker_imports_no_engine_and_no_package_but_numpy():
    program = "import sys, benchmarks.worker; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split()) - {"benchmarks", "numpy"}
    assert not loaded & {
        "jax",
        "jaxlib",
        "flax",
        "jaxserve",
        "torch",
        "transformers",
        "vllm",
        "llama_cpp",
        "gguf",
        "safetensors",
        "rich",
    }
