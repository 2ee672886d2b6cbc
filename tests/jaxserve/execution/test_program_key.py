"""Keys of compiled programs: what changes a program changes its key, and what cannot be told apart has none."""

import dataclasses
import functools
import math
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.execution import program_key, step
from jaxserve.execution.program_key import UnknownDependency, describe
from jaxserve.models import layers
from jaxserve.models.gemma import read_gemma
from jaxserve.models.linear import LinearContext
from jaxserve.models.llama import read_llama
from jaxserve.models.registry import decoder_family, make_model
from jaxserve.models.toy import Toy
from sharding.mesh import TensorParallelism

IMPORTED_S = time.time()
ROOT = Path(__file__).parents[3]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}


def mesh(*ids, name="x"):
    return Mesh(np.array([jax.devices()[i] for i in ids]), (name,), axis_types=(AxisType.Auto,))


def array(shape=(2, 3), dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def bound(value):
    """Returns a function of the package that has bound `value`."""
    return functools.partial(layers.soft_capped, cap=value)


DIFFERENT = [
    (0, 0.0, False, None, "0", b"0", "None", np.dtype("int32"), np.int32),
    ((1, 2), [1, 2], (12,), (1, (2,)), ((1,), 2), {1, 2}, {1: 2}, ("1", "2")),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}),
    (0.1, math.nextafter(0.1, 1), math.inf),
    (LinearContext("cpu"), LinearContext("gpu"), TensorParallelism(), TensorParallelism(2), TensorParallelism(1, 2)),
    (P(), P(None), P("x"), P("x", None), P(("x", "y")), ("x",)),
    (array(), array((3, 2)), array(dtype=jnp.bfloat16), array(sharding=NamedSharding(mesh(0), P()))),
    (mesh(0), mesh(1), mesh(0, 1), mesh(1, 0), mesh(0, name="y")),
    (decoder_family(read_llama).make, decoder_family(read_gemma).make),
    (bound(1.0), bound(2.0), functools.partial(layers.soft_capped, 1.0), layers.soft_capped, layers.embed),
    (
        *(make_model(LLAMA | change) for change in ({}, {"rms_norm_eps": 1e-5}, {"rope_theta": 5e5}, {"vocab_size": 256})),
        make_model(LLAMA, dtype=jnp.dtype("bfloat16")),
        make_model(LLAMA, tensor_parallel_size=2),
        Toy(TensorParallelism()),
    ),
]


@pytest.mark.parametrize("values", DIFFERENT, ids=lambda values: type(values[0]).__name__)
def test_different_values_differ(values):
    texts = [describe(value) for value in values]
    assert len(set(texts)) == len(values), texts


def test_equal_values_agree():
    for one, other in (
        (make_model(LLAMA), make_model(dict(LLAMA))),
        (bound(1.5), bound(1.5)),
        (frozenset({"a", "b", "c"}), frozenset({"c", "b", "a"})),
        (mesh(0, 1), mesh(0, 1)),
    ):
        assert describe(one) == describe(other)


class OwnFamily(Toy):
    """A family of a user, which inherits `trace_key`."""


@dataclasses.dataclass
class Own:
    cap: float = 1.0


@pytest.mark.parametrize(
    "value",
    [
        lambda logits: logits,
        functools.partial(step.backbone, model=OwnFamily(TensorParallelism())),
        bound(lambda: 1.0),
        decoder_family(lambda config: read_llama(config)).make,
        Own(),
        Own,
        {"cap": Own()},
        object(),
        np.zeros(3),
        jnp.zeros,
    ],
    ids=["function", "family", "argument", "closure", "dataclass", "class", "nested", "object", "array", "jax function"],
)
def test_what_cannot_be_told_apart_is_refused(value):
    with pytest.raises(UnknownDependency):
        describe(value)


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(monkeypatch):
    """Describes this process, as if no source had changed since it started."""
    monkeypatch.setattr(program_key, "_process_start_s", lambda: math.inf)
    return lambda *ids: program_key.describe_process([jax.devices()[i] for i in ids or (0,)])


def test_flags_processors_versions_and_devices_are_in_the_key(process, monkeypatch):
    texts = {process(), process(1), process(0, 1)}
    assert len(texts) == 3 and process() in texts
    with monkeypatch.context() as m:
        m.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        texts.add(process())
    jax.config.update("jax_default_matmul_precision", "bfloat16")
    try:
        texts.add(process())
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    for where, name, value in (
        (program_key.os, "sched_getaffinity", lambda pid: set(range(99))),
        (program_key, "_processor", lambda: "flags: fpu avx512f"),
        (program_key.metadata, "version", lambda distribution: "0.99"),
        (program_key.sys, "version", "3.99"),
    ):
        with monkeypatch.context() as m:
            m.setattr(where, name, value)
            texts.add(process())
    assert len(texts) == 9


def test_where_programs_are_kept_is_not_in_the_key(process, tmp_path):
    before, directory = process(), jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert process() == before
    finally:
        jax.config.update("jax_compilation_cache_dir", directory)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for source in program_key.SOURCES:
        (root / source).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copy if (ROOT / source).is_file() else shutil.copytree
        copy(ROOT / source, root / source)
    return root


def digest(root):
    return program_key.digest_sources(root, unchanged_since_s=math.inf)


def test_one_constant_in_one_source_file_changes_every_key(copied):
    assert digest(copied) == digest(ROOT)
    for name in ("jaxserve/models/layers.py", "kernels_pallas/paged_attention/xla.py", "jaxserve/plan.py"):
        path = copied / name
        text = path.read_text()
        path.write_text(text + "\nCONSTANT = 1\n")
        changed = digest(copied)
        path.write_text(text + "\nCONSTANT = 2\n")
        assert len({digest(ROOT), changed, digest(copied)}) == 3, name
        path.write_text(text)
    (copied / "sharding/new.py").touch()
    assert digest(copied) != digest(ROOT)
    (copied / "sharding/new.py").unlink()
    (copied / "sharding/rules.py").rename(copied / "sharding/laws.py")
    assert digest(copied) != digest(ROOT)
    (copied / "sharding/laws.py").rename(copied / "sharding/rules.py")
    assert digest(copied) == digest(ROOT)


def test_a_source_that_changed_under_a_running_process_is_told(copied):
    """What the process has imported may be older than what its key would be made of."""
    last_s = max(path.stat().st_ctime for path in copied.rglob("*.py"))
    program_key.digest_sources(copied, unchanged_since_s=last_s + 1)
    with pytest.raises(UnknownDependency, match=r"\.py has changed since this process started"):
        program_key.digest_sources(copied, unchanged_since_s=last_s)
    with pytest.raises(UnknownDependency, match="no source text"):
        program_key.digest_sources(copied / "nowhere", unchanged_since_s=math.inf)


def test_this_process_started_before_its_tests_and_after_its_machine():
    booted_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    assert booted_s < program_key._process_start_s() < IMPORTED_S
