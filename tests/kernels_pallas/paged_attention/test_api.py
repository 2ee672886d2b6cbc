"""Every backend x every case against the reference, with NaN wherever nothing may be read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import triton, xla
from kernels_pallas.paged_attention.api import (
    RaggedBatch,
    Tiling,
    default_tiling,
    paged_attention,
    plan_ragged_batch,
)
from kernels_pallas.paged_attention.cases import CASES
from kernels_pallas.paged_attention.reference import paged_attention_reference

SPLIT_SIZE = 128
WINDOW = 70
CASE_BY_NAME = {case.name: case.shrunk(num_kv_heads=2, sliding_window=WINDOW) for case in CASES}

# Contexts of one token, inside a split, exactly one split, just past it, and of three splits; then prompts: a chunk on top
# of cached pages that starts inside a split and ends in the next, a whole one shorter than a tile, a chunk from a split's start.
KV_LENS = (1, 17, 128, 129, 300, 150, 3, 145)
Q_LENS = (1, 1, 1, 1, 1, 40, 3, 17)
NUM_DECODES = 5

TOLERANCES = {
    "float32": 4e-6,  # outputs reach 4 (half an ulp is 2.4e-7), sums of up to 300 products in another order
    "float16": 2e-3,  # weights and outputs are rounded to 11 bits
    "bfloat16": 2e-2,  # weights and outputs are rounded to 8 bits
}

FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each program runs once: half of its time is LLVM's. The bits of optimised code are the subject of test_determinism."""


@dataclasses.dataclass
class Problem:
    """One ragged step over a pool in which everything that must not be read is NaN."""

    q_TNH: np.ndarray
    k_pages_GKZH: np.ndarray
    v_pages_GKZH: np.ndarray
    block_tables_RP: np.ndarray
    batch: RaggedBatch
    sinks_N: np.ndarray | None
    num_tokens: int
    sequences: tuple[int, int]


@functools.cache
def make_problem(name: str, query_tile: int, first: int = 0, last: int = len(Q_LENS)) -> Problem:
    case = CASE_BY_NAME[name]
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(case.dtype)
    kv_lens, q_lens = KV_LENS[first:last], Q_LENS[first:last]
    N, K, H, Z = case.num_q_heads, case.num_kv_heads, case.head_dim, case.page_size
    pages_per_seq = [-(-n // Z) for n in kv_lens]
    G, P, R = sum(pages_per_seq) + 3, max(pages_per_seq) + 1, len(kv_lens) + 2
    k_pages_GKZH, v_pages_GKZH = (np.full((G, K, Z, H), np.nan, dtype) for _ in range(2))
    # Unused entries: a page that is NaN, one past the pool, and a negative one.
    block_tables_RP = rng.choice(np.array([G - 1, G + 1000, -1], np.int32), (R, P))
    rows = rng.permutation(R)[: len(kv_lens)].astype(np.int32)
    free_pages = iter(rng.permutation(G - 1))
    for row, kv_len in zip(rows, kv_lens, strict=True):
        for page_index in range(-(-kv_len // Z)):
            page = next(free_pages)
            block_tables_RP[row, page_index] = page
            live = min(Z, kv_len - page_index * Z)
            for pages in (k_pages_GKZH, v_pages_GKZH):
                pages[page, :, :live] = rng.standard_normal((K, live, H)).astype(dtype)
    num_tokens = sum(q_lens)
    q_TNH = np.full((num_tokens + 9, N, H), np.nan, dtype)
    q_TNH[:num_tokens] = 2 * rng.standard_normal((num_tokens, N, H)).astype(dtype)
    num_decodes = q_lens.count(1)
    batch = plan_ragged_batch(
        rows,
        kv_lens,
        q_lens,
        num_seq_slots=len(kv_lens) + 2,
        num_decode_slots=num_decodes and num_decodes + 2,
        max_decode_items=num_decodes and 11,
        max_prefill_tiles=0 if num_decodes == len(q_lens) else 10,
        split_size=SPLIT_SIZE,
        query_tile=query_tile,
    )
    sinks_N = rng.standard_normal(N).astype(np.float32) if case.has_sinks else None
    return Problem(q_TNH, k_pages_GKZH, v_pages_GKZH, block_tables_RP, batch, sinks_N, num_tokens, (first, last))


def attend(name: str, problem: Problem, tiling: Tiling, backend: str) -> np.ndarray:
    case = CASE_BY_NAME[name]

    def step(q, k, v, tables, batch, sinks):
        return paged_attention(
            q,
            k,
            v,
            tables,
            batch,
            scale=case.scale,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
            sinks_N=sinks,
            tiling=tiling,
            backend=backend,
        )

    arguments = [problem.q_TNH, problem.k_pages_GKZH, problem.v_pages_GKZH, problem.block_tables_RP]
    options = None if backend == "triton" else FAST_COMPILE
    return np.asarray(jax.jit(step, compiler_options=options)(*arguments, problem.batch, problem.sinks_N))


@functools.cache
def reference(name: str, first: int = 0, last: int = len(Q_LENS)) -> np.ndarray:
    case, problem = CASE_BY_NAME[name], make_problem(name, 16, first, last)
    features = {"sliding_window": case.sliding_window, "soft_cap": case.soft_cap, "scale": case.scale}

    def specification(*arguments, sinks_N):
        return paged_attention_reference(*arguments, **features, sinks_N=sinks_N)

    arguments = (problem.q_TNH, problem.k_pages_GKZH, problem.v_pages_GKZH, problem.block_tables_RP, problem.batch)
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(jax.jit(specification, compiler_options=FAST_COMPILE)(*arguments, sinks_N=problem.sinks_N))


def naive_attention(name: str, problem: Problem) -> np.ndarray:
    """The third opinion: float64 numpy, one query at a time, no masks."""
    case = CASE_BY_NAME[name]
    Z, group = case.page_size, case.num_q_heads // case.num_kv_heads
    batch, out_TNH = problem.batch, np.zeros(problem.q_TNH.shape)
    for s in range(batch.num_seqs_1[0]):
        q_first, q_stop = batch.cu_q_lens_S1[s : s + 2]
        for token in range(q_first, q_stop):
            stop = batch.kv_lens_S[s] - (q_stop - token) + 1
            start = 0 if case.sliding_window is None else max(stop - case.sliding_window, 0)
            at = np.arange(start, stop)
            pages = problem.block_tables_RP[batch.rows_S[s], at // Z]
            for n in range(case.num_q_heads):
                k_CH, v_CH = (
                    pool[pages, n // group, at % Z].astype(np.float64)
                    for pool in (problem.k_pages_GKZH, problem.v_pages_GKZH)
                )
                score_C = k_CH @ problem.q_TNH[token, n].astype(np.float64) * case.scale
                if case.soft_cap is not None:
                    score_C = case.soft_cap * np.tanh(score_C / case.soft_cap)
                weight_C = np.exp(score_C)
                sink = 0.0 if problem.sinks_N is None else np.exp(np.float64(problem.sinks_N[n]))
                out_TNH[token, n] = weight_C @ v_CH / (weight_C.sum() + sink)
    return out_TNH


def assert_agrees(name: str, problem: Problem, out_TNH: np.ndarray) -> None:
    assert out_TNH.dtype == problem.q_TNH.dtype
    assert np.isfinite(out_TNH.astype(np.float32)).all(), "padding leaked into the output"
    live = slice(problem.num_tokens)
    expected = reference(name, *problem.sequences)[live].astype(np.float32)
    tolerance = TOLERANCES[CASE_BY_NAME[name].dtype]
    np.testing.assert_allclose(out_TNH[live].astype(np.float32), expected, rtol=0, atol=tolerance * 2)


@pytest.mark.parametrize("name", CASE_BY_NAME)
def test_reference_is_naive_attention(name):
    problem = make_problem(name, 16)
    out_TNH = reference(name).astype(np.float64)
    assert not out_TNH[problem.num_tokens :].any()
    tolerance = TOLERANCES[CASE_BY_NAME[name].dtype]
    np.testing.assert_allclose(out_TNH, naive_attention(name, problem), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASE_BY_NAME)
def test_xla_agrees_with_reference(name):
    problem = make_problem(name, 16)
    tiling = Tiling(split_size=SPLIT_SIZE, query_tile=16, decode_block=4)
    assert_agrees(name, problem, attend(name, problem, tiling, "xla"))


def triton_tiling(name: str) -> Tiling:
    group = CASE_BY_NAME[name].num_q_heads // CASE_BY_NAME[name].num_kv_heads
    # 16 rows is the smallest tile of the matrix unit, and few rows interpret fast.
    return Tiling(split_size=SPLIT_SIZE, query_tile=max(16 // group, 8), kv_block=32)


@pytest.mark.parametrize("name", CASE_BY_NAME)
def test_triton_interpreted_agrees_with_reference(name):
    tiling = triton_tiling(name)
    problem = make_problem(name, tiling.query_tile)
    assert_agrees(name, problem, attend(name, problem, tiling, "triton_interpret"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASE_BY_NAME)
def test_triton_on_a_gpu_agrees_with_reference(name):
    """With the rows and warps that ship: xla#19780 was wrong results of 64 rows and 8 warps on an H100."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU; `test_gpu_compile` covers the compilation without one")
    case = CASE_BY_NAME[name]
    tiling = default_tiling(
        "gpu",
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype_bytes=jnp.dtype(case.dtype).itemsize,
        device_kind=jax.devices()[0].device_kind,
    )
    tiling = dataclasses.replace(tiling, split_size=SPLIT_SIZE)  # several splits in short contexts
    problem = make_problem(name, tiling.query_tile)
    assert_agrees(name, problem, attend(name, problem, tiling, "triton"))


def must_not_be_traced(*_):
    raise AssertionError("traced for a bucket without it")


@pytest.mark.parametrize("backend", ["xla", "triton_interpret"])
@pytest.mark.parametrize(("first", "last"), [(0, NUM_DECODES), (NUM_DECODES, len(Q_LENS))], ids=["decode", "prefill"])
def test_bucket_of_one_kind_traces_only_its_code(backend, first, last, monkeypatch):
    monkeypatch.setattr(triton if "triton" in backend else xla, "_decode" if first else "_prefill", must_not_be_traced)
    problem = make_problem("gpt2-125m", 16, first, last)
    tiling = Tiling(split_size=SPLIT_SIZE, query_tile=16, kv_block=32)
    assert_agrees("gpt2-125m", problem, attend("gpt2-125m", problem, tiling, backend))


def call_with(problem: Problem, batch: RaggedBatch, tiling: Tiling) -> jax.Array:
    arguments = [problem.q_TNH, problem.k_pages_GKZH, problem.v_pages_GKZH, problem.block_tables_RP]
    return paged_attention(*map(jnp.asarray, arguments), batch, scale=1.0, tiling=tiling, backend="xla")


def test_empty_batch_is_finite():
    problem = make_problem("gpt2-125m", 16)
    batch = jax.tree.map(np.zeros_like, problem.batch)
    out_TNH = jax.jit(lambda b: call_with(problem, b, Tiling(query_tile=16)))(batch)
    assert np.isfinite(np.asarray(out_TNH)).all()


def test_wrong_arguments_are_named():
    problem = make_problem("gpt2-125m", 16)
    arguments = [problem.q_TNH, problem.k_pages_GKZH, problem.v_pages_GKZH, problem.block_tables_RP]
    call = functools.partial(paged_attention, *arguments, problem.batch, scale=1.0)
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        call(sliding_window=0, tiling=Tiling(query_tile=16))
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        call(tiling=Tiling(query_tile=16), backend="cuda")
    with pytest.raises(NotImplementedError, match="triton: no Triton on platform 'cpu'; .*kv_block not a power of two"):
        call(tiling=Tiling(query_tile=16, kv_block=24), backend="triton")
    with pytest.raises(NotImplementedError, match="xla: split_size 100 is not a multiple of the page size 16"):
        call(tiling=Tiling(query_tile=16, split_size=100))
    with pytest.raises(ValueError, match="heads a multiple of the KV heads"):
        paged_attention(arguments[0][:, :1], *arguments[1:], problem.batch, scale=1.0, tiling=Tiling(query_tile=16))
