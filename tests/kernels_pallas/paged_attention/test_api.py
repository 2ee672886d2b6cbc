"""The contract of the one function that the engine calls: what is traced, what is refused, and how that is said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import triton, xla
from kernels_pallas.paged_attention.api import RaggedBatch, Tiling, empty_ragged_batch, paged_attention

T, N, K, H, Z = 24, 4, 2, 16, 16
TILING = Tiling(split_size=128, query_tile=8, head_block=2, kv_block=32)
DECODE = {"num_decode_slots": 4, "max_decode_items": 6, "max_prefill_tiles": 0}
PREFILL = {"num_decode_slots": 0, "max_decode_items": 0, "max_prefill_tiles": 5}
BACKENDS = ("xla", "triton_interpret")


def empty_batch(bucket: dict[str, int]) -> RaggedBatch:
    return empty_ragged_batch(num_seq_slots=4, **bucket)


def call(bucket=DECODE, *, tiling=TILING, **kwargs):
    """Attention of nothing over a pool of NaN."""
    q, pages = jnp.full((T, N, H), jnp.nan), jnp.full((5, K, Z, H), jnp.nan)
    tables = jnp.full((4, 8), 99, jnp.int32)
    return paged_attention(q, pages, pages, tables, empty_batch(bucket), scale=1.0, tiling=tiling, **kwargs)


def must_not_be_traced(*_):
    raise AssertionError("traced for a bucket without it")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bucket", "absent"), [(DECODE, "_prefill"), (PREFILL, "_decode")], ids=["decode", "prefill"])
def test_bucket_of_one_kind_traces_only_its_code(backend, bucket, absent, monkeypatch):
    monkeypatch.setattr(triton if "triton" in backend else xla, absent, must_not_be_traced)
    jax.eval_shape(functools.partial(call, bucket, backend=backend))
    with pytest.raises(AssertionError, match="traced for a bucket without it"):
        jax.eval_shape(functools.partial(call, PREFILL if bucket is DECODE else DECODE, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_is_finite(backend):
    out_TNH = jax.jit(functools.partial(call, {**DECODE, "max_prefill_tiles": 5}, backend=backend))()
    assert np.isfinite(np.asarray(out_TNH)).all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        call(sliding_window=0)
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        call(backend="cuda")
    with pytest.raises(NotImplementedError, match="triton: no Triton on platform 'cpu'; .*kv_block not a power of two"):
        call(tiling=Tiling(query_tile=8, kv_block=24), backend="triton")
    with pytest.raises(NotImplementedError, match="xla: split_size 100 is not a multiple of the page size 16"):
        call(tiling=Tiling(query_tile=8, split_size=100))
    q, pages, tables = jnp.zeros((T, 3, H)), jnp.zeros((5, K, Z, H)), jnp.zeros((4, 8), jnp.int32)
    with pytest.raises(ValueError, match="heads a multiple of the KV heads"):
        paged_attention(q, pages, pages, tables, empty_batch(DECODE), scale=1.0, tiling=TILING)
