"""kv_write to the bit: what is written, over every pair of what can vary, and that nothing else is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.kv_write import xla
from kernels_pallas.kv_write.api import kv_write
from kernels_pallas.kv_write.reference import kv_write_reference
from kernels_pallas.paged_attention.cases import pairwise

G, K, Z, H = 5, 2, 16, 8


def make_arrays(pages_dtype, token_dtype):
    rng = np.random.default_rng(0)
    pools = [rng.standard_normal((G, K, Z, H)).astype(pages_dtype) for _ in range(2)]
    slots_T = np.append(rng.permutation(G * Z)[:6], [G * Z, G * Z, G * Z + 7]).astype(np.int32)
    tokens = [rng.standard_normal((slots_T.size, K, H)).astype(token_dtype) for _ in range(2)]
    for x_TKH in tokens:
        x_TKH[6:] = np.nan
    return *pools, *tokens, slots_T


DTYPES = ("float32", "bfloat16", "float16")
FACTORS = {
    "num_kv_heads": (1, 2, 3),
    "head_dim": (1, 64, 80, 96, 128, 256),
    "page_size": (8, 16, 32, 64, 128, 256),
    "pages_dtype": DTYPES,
    "token_dtype": DTYPES,
    "slots": ("shuffled", "reversed", "first and last", "nothing"),
}
ROWS = pairwise(FACTORS)
NUM_PAGES = 3
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def slots_of(kind: str, num_slots: int, rng: np.random.Generator) -> np.ndarray:
    """Returns where 11 tokens go; from num_slots on they are padding."""
    padding = np.array([num_slots, num_slots + 7, 2**31 - 1, num_slots], np.int32)
    live = rng.permutation(np.arange(1, num_slots - 1))[:7]
    live = {
        "shuffled": live,
        "reversed": np.sort(live)[::-1],
        "first and last": np.array([num_slots - 1, *live[:5], 0]),
        "nothing": np.full(7, num_slots),
    }[kind]
    return np.concatenate([live, padding]).astype(np.int32)


def random_bits(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Returns numbers of every kind: NaN with any payload, infinities, subnormals, minus zero."""
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]


def random_rows(row: dict, *, is_finite_pool: bool = False):
    rng = np.random.default_rng(0)
    shape = (NUM_PAGES, row["num_kv_heads"], row["page_size"], row["head_dim"])
    dtype, token_dtype = jnp.dtype(row["pages_dtype"]), jnp.dtype(row["token_dtype"])
    pools = [
        rng.standard_normal(shape).astype(dtype) if is_finite_pool else random_bits(shape, dtype, rng) for _ in range(2)
    ]
    slots_T = slots_of(row["slots"], NUM_PAGES * row["page_size"], rng)
    tokens = [rng.standard_normal((slots_T.size, *shape[1::2])).astype(token_dtype) for _ in range(2)]
    for x_TKH in tokens:
        x_TKH[7:] = np.nan
    return *pools, *tokens, slots_T


def assert_equal_to_the_bit(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def name_of(row):
    return "-".join(map(str, row.values())).replace(" ", "_")


def test_reference_is_the_definition():
    """Where a slot's bytes lie, by arithmetic on the flat pool: page, head, offset, in this order."""
    row = {"num_kv_heads": 2, "head_dim": 3, "page_size": 4, "pages_dtype": "float32", "token_dtype": "float32"}
    k_pages, v_pages, k_TKH, v_TKH, slots_T = random_rows({**row, "slots": "first and last"})
    for pool, x_TKH, got in zip(
        (k_pages, v_pages), (k_TKH, v_TKH), kv_write_reference(k_pages, v_pages, k_TKH, v_TKH, slots_T), strict=True
    ):
        flat = pool.flatten()
        for token, slot in enumerate(slots_T[:7]):
            for head in range(2):
                start = (slot // 4 * 2 + head) * 12 + slot % 4 * 3
                flat[start : start + 3] = x_TKH[token, head]
        assert_equal_to_the_bit(got, flat.reshape(pool.shape))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_agrees_with_reference_to_the_bit(row):
    """Untouched rows keep every bit, the payloads of NaN too; the pool's last slot among them, unless it is written."""
    arrays = random_rows(row)
    for got, want in zip(
        jax.jit(kv_write, compiler_options=FAST_COMPILE)(*arrays), kv_write_reference(*arrays), strict=True
    ):
        assert_equal_to_the_bit(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_scatter_of_a_gpu_agrees_too(dtype, monkeypatch):
    """What 16-bit pages take on a GPU. A CPU computes it in float32 and so loses NaN payloads: here the pool is finite."""
    monkeypatch.setattr(xla.dispatch, "current_platform", lambda: "gpu")
    row = {"num_kv_heads": 2, "head_dim": 80, "page_size": 16, "pages_dtype": dtype, "token_dtype": "float32"}
    arrays = random_rows({**row, "slots": "first and last"}, is_finite_pool=True)
    for got, want in zip(jax.jit(lambda *args: kv_write(*args))(*arrays), kv_write_reference(*arrays), strict=True):
        assert_equal_to_the_bit(got, want)


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
