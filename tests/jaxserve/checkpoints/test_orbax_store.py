"""Orbax directories: bit for bit, straight to shards, and no damage goes unnoticed."""

import json
import math
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from jaxserve.checkpoints import huggingface, manifest, orbax_store
from jaxserve.checkpoints.source import FLOATS
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import unflatten
from sharding.mesh import TensorParallelism, make_mesh
from sharding.rules import spec_for

CONFIG = {"architectures": ["LlamaForCausalLM"], "x": "ü"}


def _bits(array):
    return np.ascontiguousarray(array).tobytes()


def _abstract(params):
    return {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in params.items()}


@pytest.fixture
def params():
    """Random bits, so that NaNs of every kind, infinities and denormals are among them."""
    generator = np.random.default_rng(0)
    return {
        "embed_tokens/embedding": generator.integers(0, 1 << 16, (37, 8), np.uint16).view(ml_dtypes.bfloat16),
        "layers/0/mlp/up_proj/kernel": generator.integers(0, 1 << 32, (8, 12), np.uint32).view(np.float32),
        "layers/1/mlp/up_proj/kernel": generator.integers(0, 1 << 16, (8, 12), np.uint16).view(np.float16),
        "norm/scale": np.float32([-0.0]),
    }


def test_round_trip_keeps_every_bit_and_file(params, tmp_path):
    files = {"tokenizer.json": b"{}", "chat_template.jinja": "é".encode()}
    written = orbax_store.save(tmp_path / "m", unflatten(params), CONFIG, files)
    loaded = orbax_store.load(tmp_path / "m", _abstract(params))
    assert loaded.keys() == params.keys()
    for path, array in params.items():
        assert loaded[path].dtype == array.dtype
        assert _bits(loaded[path]) == _bits(array), path
    assert orbax_store.read_config(tmp_path / "m") == CONFIG
    assert {name: (tmp_path / "m" / name).read_bytes() for name in files} == files
    assert orbax_store.verify(tmp_path / "m") == written
    assert written.dtype == "mixed"
    assert written.num_parameters == sum(array.size for array in params.values())
    assert written.num_bytes == sum(array.nbytes for array in params.values())


@pytest.mark.parametrize("group_bytes", [1, 600])
def test_groups_do_not_show(group_bytes, params, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_store, "GROUP_BYTES", group_bytes)
    told = []
    source = orbax_store.InMemory(params)
    orbax_store.save_from(tmp_path / "m", source, CONFIG, {}, on_bytes=told.append)
    assert len(told) > 1
    assert sum(told) == sum(array.nbytes for array in params.values())
    loaded = orbax_store.load(tmp_path / "m", _abstract(params))
    assert all(_bits(loaded[path]) == _bits(array) for path, array in params.items())
    stored = orbax_store.OrbaxSource(tmp_path / "m")
    for path, array in stored.iterate(reversed(list(params))):
        assert isinstance(array, np.ndarray)
        assert _bits(array) == _bits(params[path])


def test_orbax_alone_reads_the_nested_tree(params, tmp_path):
    orbax_store.save(tmp_path / "m", params, CONFIG)
    tree = ocp.load(str(tmp_path / "m" / "params"))
    assert tree.keys() == {"embed_tokens", "layers", "norm"}
    assert _bits(tree["layers"]["1"]["mlp"]["up_proj"]["kernel"]) == _bits(params["layers/1/mlp/up_proj/kernel"])


def test_both_formats_cast_alike(make_llama, shared_orbax, parameters_of, abstract_of):
    """One rounding wherever a checkpoint comes from: float32 -> bfloat16 -> float32 and bfloat16 -> float32."""
    source = make_llama(dtype="bfloat16", tokenizer="bytes")
    for dtype in FLOATS.values():
        one = huggingface.load(source, parameters_of(source), abstract_of(source, dtype))
        other = orbax_store.load(shared_orbax, abstract_of(source, dtype))
        assert all(_bits(one[path]) == _bits(other[path]) for path in one)


def test_rounding_is_to_nearest_even(tmp_path):
    values = np.random.default_rng(0).standard_normal(4096, np.float32)
    orbax_store.save(tmp_path / "m", {"norm": {"scale": values}}, CONFIG)
    target = {"norm/scale": jax.ShapeDtypeStruct((4096,), jnp.bfloat16)}
    assert _bits(orbax_store.load(tmp_path / "m", target)["norm/scale"]) == _bits(values.astype(ml_dtypes.bfloat16))


def test_each_device_gets_its_shard_alone_and_shards_are_saved_from_where_they_are(shared_orbax, abstract_of, tmp_path):
    mesh = make_mesh(TensorParallelism.of(4, 2), jax.devices()[:4])
    abstract = abstract_of(shared_orbax, ml_dtypes.bfloat16, lambda p: NamedSharding(mesh, spec_for(p.axes)))
    loaded = orbax_store.load(shared_orbax, abstract)
    cut = 0
    for path, array in loaded.items():
        assert array.sharding == abstract[path].sharding
        wanted = array.sharding.shard_shape(array.shape)
        cut += wanted != array.shape
        assert all(shard.data.shape == wanted for shard in array.addressable_shards)
    assert cut >= 14  # seven matrices a layer, two layers
    orbax_store.save(tmp_path / "again", loaded, CONFIG)
    whole = abstract_of(shared_orbax, ml_dtypes.bfloat16)
    again, first = orbax_store.load(tmp_path / "again", whole), orbax_store.load(shared_orbax, whole)
    assert all(_bits(again[path]) == _bits(first[path]) for path in whole)


@pytest.mark.parametrize("shape", [(1511, 2048), (2048, 2048), (6_000_000,)])
def test_large_tensors_are_cut_into_chunks(shape, tmp_path, monkeypatch):
    """1,511 is a prime: Orbax alone would cut 1,511 chunks."""
    monkeypatch.setattr(orbax_store, "_CONCURRENT_BYTES", 1)  # Orbax refuses to read a tensor above its limit, so ours grows
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    orbax_store.save(tmp_path / "m", {"w": values}, CONFIG)
    loaded = orbax_store.load(tmp_path / "m", {"w": jax.ShapeDtypeStruct(shape, np.float32)})
    assert np.array_equal(loaded["w"], values)
    chunk = ocp.metadata(str(tmp_path / "m" / "params")).metadata["w"].storage_metadata.chunk_shape
    assert 1 << 20 <= math.prod(chunk) * 4 <= 4 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("norm/scale"), r"1 unknown \(norm/scale\)"),
        (lambda a: a.update(more=jax.ShapeDtypeStruct((1,), np.float32)), r"1 missing \(more\)"),
        (lambda a: a.update({"norm/scale": jax.ShapeDtypeStruct((2,), np.float32)}), r"norm/scale has shape \(1,\).*\(2,\)"),
        (lambda a: a.update({"norm/scale": jax.ShapeDtypeStruct((1,), np.int32)}), r"norm/scale is asked for as int32"),
    ],
)
def test_another_tree_than_the_stored_one_is_refused_by_name(change, message, params, tmp_path):
    orbax_store.save(tmp_path / "m", params, CONFIG)
    abstract = _abstract(params)
    change(abstract)
    with pytest.raises(CheckpointError, match=message):
        orbax_store.load(tmp_path / "m", abstract)


def _files(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_every_flipped_bit_and_every_cut_is_found_and_the_file_named(orbax_copy, abstract_of):
    abstract = abstract_of(orbax_copy)
    generator = np.random.default_rng(0)
    for name in _files(orbax_copy):
        path = orbax_copy / name
        original = path.read_bytes()
        damaged = []
        for bit in generator.integers(0, 8 * len(original), 3) if original else []:
            flipped = bytearray(original)
            flipped[bit // 8] ^= 1 << (bit % 8)
            damaged.append(bytes(flipped))
        damaged += [original[: len(original) // 2], original[:-1]] if original else [b"x"]
        for data in damaged:
            path.write_bytes(data)
            with pytest.raises(CheckpointError) as caught:
                orbax_store.load(orbax_copy, abstract)
            assert name in str(caught.value)
        path.unlink()
        with pytest.raises(CheckpointError, match=r"missing|cannot be read") as caught:
            orbax_store.load(orbax_copy, abstract)
        assert name in str(caught.value)
        path.write_bytes(original)
    orbax_store.load(orbax_copy, abstract)


def test_every_single_bit_of_the_manifest_is_guarded(params, tmp_path):
    orbax_store.save(tmp_path / "m", {"s": np.zeros(1, np.float32)}, CONFIG)
    path = tmp_path / "m" / manifest.NAME
    original = path.read_bytes()
    for bit in range(0, 8 * len(original), 61):  # odd, so it meets every bit of a byte
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"manifest.json"):
            manifest.read(tmp_path / "m")


def test_without_verification_a_flip_in_the_payload_goes_unnoticed(orbax_copy, abstract_of):
    """The reason for the manifest. If Orbax ever finds this itself, hashing at load may go."""
    abstract = abstract_of(orbax_copy, ml_dtypes.bfloat16)
    before = orbax_store.load(orbax_copy, abstract)
    payload = max((p for p in (orbax_copy / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)
    after = orbax_store.load(orbax_copy, abstract, verify=False)
    assert sum(_bits(after[path]) != _bits(before[path]) for path in before) == 1
    with pytest.raises(CheckpointError, match="another sha256"):
        orbax_store.verify(orbax_copy)


def test_a_later_version_says_so(orbax_copy):
    path = orbax_copy / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match=r"version must be 1, it says 2; use a matching jaxserve release"):
        orbax_store.verify(orbax_copy)
    path.write_text(json.dumps({"format": "something"}))
    with pytest.raises(CheckpointError, match=r"format must be 'jaxserve-checkpoint', it says 'something'"):
        orbax_store.verify(orbax_copy)


def test_a_listed_file_that_is_a_link_outwards_is_refused(orbax_copy, tmp_path):
    (tmp_path / "config.json").write_bytes((orbax_copy / "config.json").read_bytes())
    (orbax_copy / "config.json").unlink()
    os.symlink(tmp_path / "config.json", orbax_copy / "config.json")
    with pytest.raises(CheckpointError, match=r"is a link to .* outside the model directory"):
        orbax_store.verify(orbax_copy)


@pytest.mark.parametrize(
    ("params", "files", "message"),
    [
        ({}, {}, "there are no parameters"),
        ({"w": np.zeros(2, np.int8)}, {}, "w has dtype int8; allowed are float32, bfloat16, float16"),
        ({"w": [1.0, 2.0]}, {}, "w must be an array, it is a list"),
        ({"w": np.zeros(2, np.float32)}, {"../evil.json": b""}, "files may hold .*; got '../evil.json'"),
        ({"w": np.zeros(2, np.float32)}, {"modeling.py": b""}, "got 'modeling.py'"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_left(params, files, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        orbax_store.save(tmp_path / "m", params, CONFIG, files)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_orbax_becomes_one_of_ours(params, tmp_path, monkeypatch):
    def full_disk(path, state):
        raise ValueError("RESOURCE_EXHAUSTED: /a/b: Failed to write: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"/m cannot be written by Orbax: No space left on device.$"):
        orbax_store.save(tmp_path / "m", params, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_does_not_say_where_it_was_written(tmp_path):
    """Orbax writes the absolute path of its staging folder into the payload."""
    orbax_store.save(tmp_path / "somewhere", {"a": np.ones(3, np.float32)}, {"architectures": []})
    for file in (tmp_path / "somewhere").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file.name
    orbax_store.verify(tmp_path / "somewhere")
