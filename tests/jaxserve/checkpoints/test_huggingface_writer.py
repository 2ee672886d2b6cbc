"""What we write is what the safetensors library would have written, and what transformers loads."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from jaxserve.checkpoints import huggingface, huggingface_writer
from jaxserve.checkpoints.huggingface_writer import write
from jaxserve.checkpoints.source import FLOATS
from jaxserve.errors import CheckpointError


@pytest.fixture
def loaded(make_llama, parameters_of, abstract_of):
    """Returns a function from fields to (directory, parameters, {path: array})."""

    def loaded(**fields):
        path = make_llama(**fields)
        abstract = abstract_of(path, FLOATS[fields.get("dtype", "float32")])
        return path, parameters_of(path), huggingface.load(path, parameters_of(path), abstract)

    return loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_file_is_the_library_s_byte_for_byte(dtype, loaded, tmp_path):
    path, parameters, params = loaded(dtype=dtype)
    held = write(tmp_path / "out", parameters, params, (path / "config.json").read_bytes())
    assert list(held) == ["model.safetensors"]
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert written == (path / "model.safetensors").read_bytes()
    assert written == save(load_file(path / "model.safetensors"), {"format": "pt"})


def test_mixed_types_are_ordered_as_the_library_orders_them(loaded, tmp_path):
    path, parameters, params = loaded()
    for number, name in enumerate(sorted(params)):
        params[name] = params[name].astype(list(FLOATS.values())[number % 3])
    write(tmp_path / "out", parameters, params, (path / "config.json").read_bytes())
    tensors = {
        p.huggingface_name: np.ascontiguousarray(params[p.path].T if p.path.endswith("/kernel") else params[p.path])
        for p in parameters
    }
    assert (tmp_path / "out/model.safetensors").read_bytes() == save(tensors, {"format": "pt"})


@pytest.mark.parametrize("strip_bytes", [1, 300])
def test_strips_do_not_show(strip_bytes, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_writer, "_STRIP_BYTES", strip_bytes)
    path, parameters, params = loaded(dtype="bfloat16")
    write(tmp_path / "out", parameters, params, (path / "config.json").read_bytes())
    assert (tmp_path / "out/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_shards_stay_below_the_limit_and_the_index_tells_the_truth(loaded, tmp_path):
    path, parameters, params = loaded(dtype="bfloat16")
    limit = 24_000  # the embedding has 20,480 bytes, the whole model 72,000
    held = write(tmp_path / "out", parameters, params, (path / "config.json").read_bytes(), max_shard_bytes=limit)
    assert len(held) > 2
    index = json.loads((tmp_path / "out" / huggingface.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in params.values())
    whole = load_file(path / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for file, names in held.items():
        assert sorted(names) == sorted(name for name, f in index["weight_map"].items() if f == file)
        part = load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in part.values()) <= limit
        assert all(np.array_equal(part[name], whole[name]) for name in names)
        with safe_open(tmp_path / "out" / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(loaded, tmp_path):
    path, parameters, params = loaded()
    held = write(tmp_path / "out", parameters, params, (path / "config.json").read_bytes(), max_shard_bytes=1)
    assert all(len(names) == 1 for names in held.values())
    assert len(held) == len(parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params.pop("norm/scale"), r"1 missing \(norm/scale\)"),
        (lambda params: params.update(extra=jnp.zeros(1)), r"1 unknown \(extra\)"),
        (lambda params: params.update({"norm/scale": jnp.zeros(3)}), r"norm/scale has shape \(3,\)"),
        (lambda params: params.update({"norm/scale": jnp.zeros(32, jnp.int8)}), "norm/scale has dtype int8; allowed are"),
        (lambda params: params.update({"norm/scale": "text"}), "norm/scale must be an array, it is a str"),
    ],
)
def test_parameters_of_another_model_are_not_written(change, message, loaded, tmp_path):
    _, parameters, params = loaded()
    change(params)
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "out", parameters, params, {})
    assert list(tmp_path.iterdir()) == []


def test_transformers_loads_what_we_write(loaded, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    path, parameters, params = loaded(num_shards=3)
    config = (path / "config.json").read_bytes()
    write(tmp_path / "cut", parameters, params, config, max_shard_bytes=50_000)
    write(tmp_path / "whole", parameters, params, config)
    expected = {}
    for file in path.glob("*.safetensors"):
        expected |= load_file(file)
    for name in ("cut", "whole"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        found = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
