"""Hugging Face directories: every tensor bit for bit, each shard on its device alone, every lie of an index named."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoints import huggingface, safetensors_file
from jaxserve.errors import CheckpointError
from jaxserve.testing.tiny_checkpoint import LLAMA3_ROPE_SCALING
from sharding.mesh import TensorParallelism, make_mesh
from sharding.rules import spec_for

SHAPES = [
    {},
    {"is_tied": True},
    {"dtype": "bfloat16", "num_shards": 3},
    {"dtype": "float16", "is_tied": True, "rope_scaling": LLAMA3_ROPE_SCALING},
]


def _bytes(array):
    return np.ascontiguousarray(array).tobytes()


def _expected(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_every_tensor_keeps_its_bits(fields, make_llama, parameters_of, abstract_of):
    path = make_llama(**fields)
    expected = _expected(path)
    loaded = huggingface.load(path, parameters_of(path), abstract_of(path, fields.get("dtype", "float32")))
    assert len(loaded) == len(expected)
    for p in parameters_of(path):
        tensor = expected[p.huggingface_name]
        assert _bytes(loaded[p.path]) == _bytes(tensor.T if p.path.endswith("/kernel") else tensor), p.path


def test_types_are_cast_to_what_is_asked_for(make_llama, parameters_of, abstract_of):
    path = make_llama()
    loaded = huggingface.load(path, parameters_of(path), abstract_of(path, ml_dtypes.bfloat16))
    expected = _expected(path)["model.norm.weight"].astype(ml_dtypes.bfloat16)
    assert loaded["norm/scale"].dtype == ml_dtypes.bfloat16
    assert _bytes(loaded["norm/scale"]) == _bytes(expected)


@pytest.mark.parametrize("size", [2, 4])
def test_each_device_gets_its_shard_alone(size, make_llama, parameters_of, abstract_of):
    path = make_llama(dtype="bfloat16", num_shards=3)
    mesh = make_mesh(TensorParallelism.of(size, 2), jax.devices()[:size])
    abstract = abstract_of(path, sharding_for=lambda p: NamedSharding(mesh, spec_for(p.axes)))
    loaded = huggingface.load(path, parameters_of(path), abstract)
    expected = _expected(path)
    on_device = dict.fromkeys(mesh.devices.flat, 0)
    for p in parameters_of(path):
        tensor = expected[p.huggingface_name].astype(np.float32)
        assert loaded[p.path].sharding == abstract[p.path].sharding
        assert np.array_equal(loaded[p.path], tensor.T if p.path.endswith("/kernel") else tensor), p.path
        for shard in loaded[p.path].addressable_shards:
            on_device[shard.device] += shard.data.nbytes
    wanted = sum(
        np.dtype(np.float32).itemsize * int(np.prod(target.sharding.shard_shape(target.shape)))
        for target in abstract.values()
    )
    whole = sum(4 * int(np.prod(target.shape)) for target in abstract.values())
    assert set(on_device.values()) == {wanted}
    assert wanted < whole


def test_a_host_reads_only_the_rows_of_its_own_devices(make_llama, parameters_of, monkeypatch):
    """Stands for one of two hosts, which has devices for the second half of the embedding alone."""
    path = make_llama()
    parameter = next(p for p in parameters_of(path) if p.path == "embed_tokens/embedding")
    here = (slice(160, 320), slice(None))
    sharding = SimpleNamespace(addressable_devices_indices_map=lambda shape: {"device": here})
    offsets = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: offsets.append((at, len(views[0]))) or preadv(fd, views, at))
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, part: part(here))
    source = huggingface.HuggingFaceSource(path, parameters_of(path))
    with ThreadPoolExecutor(1) as pool:
        part = huggingface._place(source, parameter, SimpleNamespace(dtype=np.float32, sharding=sharding), pool)
    assert np.array_equal(part, _expected(path)["model.embed_tokens.weight"][160:])
    assert sum(length for _, length in offsets) == part.nbytes


def test_no_more_than_one_tensor_is_held(make_llama, parameters_of, abstract_of, monkeypatch):
    path = make_llama()
    alive, peak, wait = set(), [], jax.block_until_ready
    read = safetensors_file.read

    def counting_read(tensor, *args, **kwargs):
        alive.add(tensor.name)
        peak.append(len(alive))
        return read(tensor, *args, **kwargs)

    def counting_wait(array):
        alive.clear()
        return wait(array)

    monkeypatch.setattr(safetensors_file, "read", counting_read)
    monkeypatch.setattr(jax, "block_until_ready", counting_wait)
    huggingface.load(path, parameters_of(path), abstract_of(path))
    assert len(peak) == len(parameters_of(path))
    assert max(peak) == 1


def test_parameters_may_be_donated(make_llama, parameters_of, abstract_of):
    """Replicated arrays come from one host buffer; a program that overwrites one must not reach the others."""
    path = make_llama()
    mesh = make_mesh(TensorParallelism.of(2, 2), jax.devices()[:2])
    abstract = abstract_of(path, sharding_for=lambda p: NamedSharding(mesh, PartitionSpec()))
    loaded = huggingface.load(path, parameters_of(path), abstract)
    kept = np.array(loaded["norm/scale"])
    added = jax.jit(lambda x: x + 1, donate_argnums=0)(loaded["norm/scale"])
    for shard in added.addressable_shards:
        assert np.array_equal(shard.data, kept + 1)


# What a directory may claim that its files do not hold.


@pytest.fixture
def copy_of(make_llama, tmp_path):
    def copy_of(**fields):
        return shutil.copytree(make_llama(**fields), tmp_path / "copy")

    return copy_of


def _rewrite(path, change):
    """Applies `change` to the tensors of model.safetensors."""
    tensors = {name: tensor.copy() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _rewrite_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _load(path, parameters_of, abstract_of):
    return huggingface.load(path, parameters_of(path), abstract_of(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
        (lambda t: t.update(surprise=np.zeros(2, np.float32)), r"1 unknown \(surprise\)"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head.weight is missing.*tie_word_embeddings to true"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            r"model.norm.weight has shape \(31,\), the configuration says \(32,\)",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((32, 48), np.float32)}),
            r"layers.0.mlp.up_proj.weight has shape \(32, 48\), the configuration says \(48, 32\)",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int32)}), "model.norm.weight has dtype I32"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(change, message, copy_of, parameters_of, abstract_of):
    path = copy_of()
    _rewrite(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        _load(path, parameters_of, abstract_of)
    assert str(path) in str(caught.value)


def test_buffers_of_older_exports_are_ignored(copy_of, parameters_of, abstract_of):
    path = copy_of()
    _rewrite(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}))
    assert len(_load(path, parameters_of, abstract_of)) == len(parameters_of(path))


def test_a_head_beside_tied_embeddings_must_equal_them(copy_of, parameters_of, abstract_of):
    path = copy_of(is_tied=True)
    _rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head/kernel" not in _load(path, parameters_of, abstract_of)
    _rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"embeddings are tied.*differs.*tie_word_embeddings to false"):
        _load(path, parameters_of, abstract_of)


SHARD = "model-00002-of-00003.safetensors"  # holds model.norm.weight


def _claim(content, name="model.norm.weight", file=SHARD):
    content["weight_map"][name] = file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["weight_map"].pop("model.norm.weight"), r"holds model.norm.weight, which .* says is nowhere"),
        (lambda c: _claim(c, "ghost"), rf"{SHARD} lacks ghost"),
        (lambda c: _claim(c, file="model-00003-of-00003.safetensors"), "holds model.norm.weight, which .* says is in"),
        (lambda c: _claim(c, file="gone.safetensors"), "gone.safetensors is missing"),
        (lambda c: _claim(c, file="../outside.safetensors"), r"'../outside.safetensors' is not a file name inside"),
        (lambda c: _claim(c, file="/etc/passwd.safetensors"), "is not a file name inside"),
        (lambda c: _claim(c, file="pytorch_model.bin"), r"only .safetensors files are read"),
        (lambda c: _claim(c, file=7), "weight_map must map tensor names to file names"),
        (lambda c: c.pop("weight_map"), "weight_map must map tensor names to file names"),
    ],
)
def test_an_index_that_lies_is_refused(change, message, copy_of):
    path = copy_of(dtype="bfloat16", num_shards=3)
    _rewrite_json(path / huggingface.INDEX, change)
    with pytest.raises(CheckpointError, match=message):
        huggingface.read_tensors(path)


def test_an_index_with_a_name_twice_is_refused(copy_of):
    path = copy_of(dtype="bfloat16", num_shards=3)
    text = (path / huggingface.INDEX).read_text()
    name = '"model.norm.weight":'
    (path / huggingface.INDEX).write_text(text.replace(name, f'{name} "{SHARD}", {name}'))
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json: the key 'model.norm.weight' is there twice"):
        huggingface.read_tensors(path)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
@pytest.mark.parametrize("file", ["model-00001-of-00003.safetensors", SHARD, "model-00003-of-00003.safetensors"])
def test_each_shard_truncated_is_named(file, length, copy_of):
    path = copy_of(dtype="bfloat16", num_shards=3)
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[:length])
    with pytest.raises(CheckpointError, match=file):
        huggingface.read_tensors(path)


def test_a_missing_shard_is_named(copy_of):
    path = copy_of(dtype="bfloat16", num_shards=3)
    (path / SHARD).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD} is missing"):
        huggingface.read_tensors(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused_by_name_and_never_opened(name, tmp_path):
    (tmp_path / name).mkdir()  # opening it would fail in another way
    with pytest.raises(CheckpointError, match=rf"{name}.*never opened.*Convert it to safetensors first"):
        huggingface.read_tensors(tmp_path)


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold model.safetensors or model.safetensors.index.json.*no weights"):
        huggingface.read_tensors(tmp_path)
    save_file({"x": np.zeros(1)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"it has consolidated.safetensors"):
        huggingface.read_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        huggingface.read_tensors(tmp_path / "nowhere")


def test_an_abstract_tree_of_another_model_is_refused(make_llama, parameters_of, abstract_of):
    path = make_llama()
    abstract = abstract_of(path)
    del abstract["norm/scale"]
    with pytest.raises(CheckpointError, match=r"the abstract tree: .*1 missing \(norm/scale\)"):
        huggingface.load(path, parameters_of(path), abstract)
