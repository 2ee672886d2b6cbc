"""One module imports Pallas, and one warning is silenced, in one place."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas import pallas_triton

ROOT = pathlib.Path(kernels_pallas.__file__).parent


def files_with(pattern):
    return sorted(p.name for p in ROOT.rglob("*.py") if re.search(pattern, p.read_text(), re.MULTILINE))


def test_one_module_imports_pallas_and_silences_warnings():
    assert files_with(r"^\s*(from|import) jax\.experimental.*\bpallas\b") == ["pallas_triton.py"]
    assert files_with(r"filterwarnings|simplefilter") == ["pallas_triton.py"]
    assert len(pallas_triton.SILENCED_WARNINGS) == 1


def test_nothing_above_is_imported():
    assert files_with(r"^\s*(from|import) (jaxserve|sharding|serve)\b") == []


def copy_rows(index_ref, x_ref, out_ref):
    row = pallas_triton.program_id(0)
    column = jnp.arange(8, dtype=jnp.int32)
    mask = column < 5
    value = pallas_triton.load_tile(x_ref, (index_ref[row], column), mask, other=-1)
    pallas_triton.store_tile(out_ref, (row, column), value, value > -2)


def test_tiles_are_gathered_and_masked():
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    (out,) = pallas_triton.call(
        copy_rows,
        (np.array([2, 0], np.int32), x),
        grid=(2,),
        out_shape=[jax.ShapeDtypeStruct((2, 8), np.float32)],
        num_warps=1,
        num_stages=1,
        interpret=True,
        name="copy_rows",
    )
    expected = x[[2, 0]]
    expected[:, 5:] = -1
    np.testing.assert_array_equal(out, expected)
