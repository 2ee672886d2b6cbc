"""One safetensors file: what is refused, and that any part of a tensor is read exactly."""

import json
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.checkpoints import safetensors_file
from jaxserve.checkpoints.source import FLOATS
from jaxserve.errors import CheckpointError


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(tensors, headers): random bits, so NaNs of every kind are among them."""
    generator = np.random.default_rng(0)
    tensors = {
        "matrix": generator.integers(0, 1 << 16, (67, 1030), np.uint16).view(ml_dtypes.bfloat16),
        "vector": generator.integers(0, 1 << 32, (33,), np.uint32).view(np.float32),
        "cube": generator.integers(0, 1 << 16, (3, 4, 5), np.uint16).view(np.float16),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors, safetensors_file.read_header(path, path)


def _raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("name", ["matrix", "vector", "cube", "scalar", "empty"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("strip_bytes", [1, 4 << 20])
def test_whole_tensors_keep_every_bit(stored, pool, name, is_transposed, strip_bytes, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_STRIP_BYTES", strip_bytes)
    tensors, headers = stored
    expected = tensors[name].T if is_transposed else tensors[name]
    index = (slice(None),) * expected.ndim
    found = safetensors_file.read(headers[name], index, expected.dtype, is_transposed=is_transposed, pool=pool)
    assert found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_parts_are_what_slicing_gives(stored, pool, data):
    tensors, headers = stored
    name = data.draw(st.sampled_from(["matrix", "vector", "cube"]))
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in tensors[name].shape]
    index = tuple(slice(*b) for b in bounds)
    is_transposed = data.draw(st.booleans())
    part = tensors[name][index]
    expected = part.T if is_transposed else part
    found = safetensors_file.read(headers[name], index, part.dtype, is_transposed=is_transposed, pool=pool)
    assert found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_bfloat16_becomes_float32_exactly_and_back_to_nearest_even(pool, tmp_path):
    values = np.float32([1, 1.00390625, 3.14159, -0.0, 1e-40, np.inf, 65504.0])
    save_file({"x": values.astype(ml_dtypes.bfloat16), "y": values}, tmp_path / "x.safetensors")
    headers = safetensors_file.read_header(tmp_path / "x.safetensors", tmp_path / "x.safetensors")
    index = (slice(None),)
    wide = safetensors_file.read(headers["x"], index, FLOATS["float32"], is_transposed=False, pool=pool)
    assert wide.tobytes() == values.astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()
    narrow = safetensors_file.read(headers["y"], index, FLOATS["bfloat16"], is_transposed=False, pool=pool)
    assert narrow.tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()


def test_a_value_beyond_float16_is_an_error_not_an_infinity(pool, tmp_path):
    save_file({"big": np.float32([1.0, 70000.0])}, tmp_path / "x.safetensors")
    headers = safetensors_file.read_header(tmp_path / "x.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"big holds values beyond the range of float16.*bfloat16 or float32"):
        safetensors_file.read(headers["big"], (slice(None),), FLOATS["float16"], is_transposed=False, pool=pool)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty file": (b"", "not a complete"),
    "length alone": ((1 << 40).to_bytes(8, "little"), "not a complete"),
    "header is a list": (b"\x02\0\0\0\0\0\0\0[]", "not a complete"),
    "header is not JSON": (b"\x04\0\0\0\0\0\0\0{{{{", "not a complete"),
    "header is not UTF-8": (b"\x08\0\0\0\0\0\0\0" + b'{"\xff":1}', "not a complete"),
    "offsets beyond the end": ({"x": ENTRY | {"data_offsets": [0, 80]}}, "not a complete"),
    "negative offset": ({"x": ENTRY | {"data_offsets": [-8, 0]}}, "not a complete"),
    "shape and offsets disagree": ({"x": ENTRY | {"shape": [3]}}, "not a complete"),
    "negative shape": ({"x": ENTRY | {"shape": [-2]}}, "not a complete"),
    "shape product overflows": ({"x": ENTRY | {"shape": [2**62, 2**62]}}, "not a complete"),
    "unknown dtype": ({"x": ENTRY | {"dtype": "F99"}}, "not a complete"),
    "overlap": ({"x": ENTRY, "y": ENTRY}, "not a complete"),
    "a name twice": (b'{"x":%s,"x":%s}' % ((json.dumps(ENTRY).encode(),) * 2), "'x' is there twice"),
    "a field twice": (b'{"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', "twice|not a complete"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_name(case, tmp_path):
    header, message = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    if isinstance(header, bytes) and header[:1] != b"{":
        path.write_bytes(header)
    else:
        _raw(path, header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors_file.read_header(path, path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("magic", [b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}q\0" + b"." * 60, b"\x80\x04\x95" + b"." * 60])
def test_a_pickle_by_another_name_is_named_as_one(magic, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(magic)
    with pytest.raises(CheckpointError, match=r"pickle.*Convert it to safetensors first"):
        safetensors_file.read_header(tmp_path / "model.safetensors", tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32", "F64", "BOOL"])
def test_other_types_are_refused_with_the_tensor_and_a_remedy(dtype, tmp_path):
    size = {"F8_E4M3": 1, "I32": 4, "F64": 8, "BOOL": 1}[dtype]
    header = {"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}
    path = _raw(tmp_path / "x.safetensors", header, b"\0" * 2 * size)
    with pytest.raises(CheckpointError, match=rf"w has dtype {dtype}; allowed are F32, BF16, F16; start from"):
        _ = safetensors_file.read_header(path, path)["w"].spec


def test_a_file_that_shrinks_while_it_is_read_is_an_error(pool, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones(100, np.float32)}, path)
    header = safetensors_file.read_header(path, path)["x"]
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match="x ends too early"):
        safetensors_file.read(header, (slice(None),), FLOATS["float32"], is_transposed=False, pool=pool)
