"""How much a conversion and a load hold: the largest tensor and 1 GiB, on a checkpoint of 2 GB that is made on the spot."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from jaxserve.checkpoints import huggingface_writer, orbax_store
from jaxserve.checkpoints.source import FLOATS, TensorSpec
from jaxserve.models.registry import make_model
from jaxserve.testing.tiny_checkpoint import TinyLlama

ROOT = Path(__file__).resolve().parents[3]
GIB = 1 << 30
ROOM_BYTES = 14 * 10**9  # the source, and each conversion of it at a time, float32 too

# One tensor of 1 GiB in bfloat16 and 19 that together have 0.87 GB.
LARGE = TinyLlama(
    hidden_size=4096, num_layers=2, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14_336, vocab_size=131_072,
    is_tied=True, dtype="bfloat16",
)  # fmt: skip


class _Random:
    """Random bits as parameters, made when asked for; says when an earlier array is still alive."""

    def __init__(self, config, dtype):
        self.parameters = make_model(config).parameters()
        self.specs = {p.path: TensorSpec(p.shape, FLOATS[dtype]) for p in self.parameters}
        self.num_alive = []
        self._made = []

    def iterate(self, paths, dtype=None):
        generator = np.random.default_rng(0)
        for path in paths:
            spec = self.specs[path]
            self.num_alive.append(sum(array() is not None for array in self._made))
            array = np.frombuffer(generator.bytes(spec.num_bytes), spec.dtype).reshape(spec.shape)
            self._made.append(weakref.ref(array))
            yield path, array
            del array


@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_a_tensor_is_dropped_before_the_next_is_read(to, tmp_path, monkeypatch):
    config = TinyLlama(dtype="bfloat16").config()
    source = _Random(config, "bfloat16")
    monkeypatch.setattr(orbax_store, "GROUP_BYTES", 1)
    if to == "orbax":
        orbax_store.save_from(tmp_path / "m", source, config, {})
    else:
        huggingface_writer.write_from(tmp_path / "m", source.parameters, source, config, {})
    assert source.num_alive == [0] * len(source.parameters)


_CHILD = """
import json, sys
import jax, ml_dtypes, numpy as np
from jaxserve.checkpoints import directory, huggingface
from jaxserve.checkpoints.convert import convert
from jaxserve.checkpoints.load import load_parameters
from jaxserve.models.registry import make_model
from pathlib import Path

verb, source, destination, dtype, hoards = json.loads(sys.argv[1])
jax.devices()

def read(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) << 10

if hoards:
    kept = []
    one_by_one = huggingface.HuggingFaceSource.iterate
    def hoard(self, paths, dtype=None):
        for path, array in one_by_one(self, paths, dtype):
            kept.append(array)
            yield path, array
    huggingface.HuggingFaceSource.iterate = hoard
before = read("VmRSS")
held = 0
if verb == "load":
    parameters = make_model(directory.read_json(Path(source), "config.json")).parameters()
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    loaded = load_parameters(source, parameters, {p.path: jax.ShapeDtypeStruct(p.shape, target) for p in parameters})
    held = sum(array.nbytes for array in loaded.values())
else:
    convert(source, destination, to=verb, dtype=dtype)
print(read("VmHWM") - before - held)
"""


def _peak(verb, source, destination, dtype, *, hoards=False):
    """Returns what a process held beyond itself, and beyond the parameters that it was asked to hold [bytes]."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", _CHILD, json.dumps([verb, str(source), str(destination), dtype, hoards])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    free = shutil.disk_usage(folder).free
    assert free > ROOM_BYTES, f"{folder} has {free} bytes free, these tests need {ROOM_BYTES}; set TMPDIR elsewhere."
    source = _Random(LARGE.config(), "bfloat16")
    huggingface_writer.write_from(
        folder / "huggingface", source.parameters, source, LARGE.config(), {}, max_shard_bytes=800 << 20
    )
    yield folder / "huggingface", max(spec.num_bytes for spec in source.specs.values())
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_conversion_holds_the_largest_tensor_and_a_gibibyte(large, tmp_path):
    source, largest = large
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 1.9e9
    assert largest == GIB
    orbax, wide, back = tmp_path / "orbax", tmp_path / "wide", tmp_path / "back"
    for verb, one, other, dtype, limit in (
        ("orbax", source, orbax, None, largest),
        ("huggingface", orbax, back, None, largest),
        ("huggingface", orbax, wide, "float32", 2 * largest),
        ("orbax", source, wide, "float32", 2 * largest),
        ("huggingface", wide, back, "bfloat16", 2 * largest),
    ):
        shutil.rmtree(other, ignore_errors=True)
        assert _peak(verb, one, other, dtype) < limit + GIB, (verb, dtype)
    assert _peak("load", orbax, "", "bfloat16") < largest + GIB
    assert _peak("load", source, "", "bfloat16") < largest + GIB
    assert _peak("load", orbax, "", "float32") < 2 * largest + GIB
    assert _peak("load", source, "", "float32") < 2 * largest + GIB


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_conversion_that_kept_everything_would_be_noticed(large, tmp_path):
    """In float32, where the sum of the tensors is 3.9 GB and the limit 3.2."""
    source, largest = large
    assert _peak("orbax", source, tmp_path / "orbax", "float32", hoards=True) > 2 * largest + GIB
