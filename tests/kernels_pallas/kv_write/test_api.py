"""kv_write against its specification, in place, with padding dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.kv_write.api import kv_write
from kernels_pallas.kv_write.reference import kv_write_reference

G, K, Z, H = 5, 2, 16, 8


def make_arrays(pages_dtype, token_dtype):
    rng = np.random.default_rng(0)
    pools = [rng.standard_normal((G, K, Z, H)).astype(pages_dtype) for _ in range(2)]
    slots_T = np.append(rng.permutation(G * Z)[:6], [G * Z, G * Z, G * Z + 7]).astype(np.int32)
    tokens = [rng.standard_normal((slots_T.size, K, H)).astype(token_dtype) for _ in range(2)]
    for x_TKH in tokens:
        x_TKH[6:] = np.nan
    return *pools, *tokens, slots_T


@pytest.mark.parametrize(
    ("pages_dtype", "token_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")],
)
def test_agrees_with_reference_to_the_bit(pages_dtype, token_dtype):
    arrays = make_arrays(jnp.dtype(pages_dtype), jnp.dtype(token_dtype))
    expected = kv_write_reference(*arrays)
    for got, want in zip(jax.jit(kv_write)(*arrays), expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def test_donated_pool_is_written_in_place():
    arrays = [jnp.asarray(a) for a in make_arrays(np.float32, np.float32)]
    compiled = jax.jit(kv_write, donate_argnums=(0, 1)).lower(*arrays).compile()
    pool_bytes = sum(a.nbytes for a in arrays[:2])
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 2, "a copy or a conversion of the pool"
    pointers = [a.unsafe_buffer_pointer() for a in arrays[:2]]
    assert [a.unsafe_buffer_pointer() for a in compiled(*arrays)] == pointers
    assert all(a.is_deleted() for a in arrays[:2])


def test_16_bit_pages_are_never_converted_to_float32():
    """`test_gpu_compile` has the GPU's half: there 16-bit pages are written in place."""
    arrays = [jnp.asarray(a) for a in make_arrays(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))]
    text = jax.jit(kv_write, donate_argnums=(0, 1)).lower(*arrays).compile().as_text()
    assert "u16[5,2,16,8]" in text
    assert "f32[5,2,16,8]" not in text


def test_a_pool_that_is_not_donated_is_copied():
    arrays = [jnp.asarray(a) for a in make_arrays(np.float32, np.float32)]
    memory = jax.jit(kv_write).lower(*arrays).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 0


def test_wrong_shapes_are_named():
    k_pages, v_pages, k_TKH, v_TKH, slots_T = make_arrays(np.float32, np.float32)
    with pytest.raises(ValueError, match="do not belong together"):
        kv_write(k_pages, v_pages, k_TKH, v_TKH, slots_T[:-1])
    with pytest.raises(ValueError, match=r"tokens have \(KV heads, head_dim\) \(1, 8\), the pool has \(2, 8\)"):
        kv_write(k_pages, v_pages, k_TKH[:, :1], v_TKH[:, :1], slots_T)
