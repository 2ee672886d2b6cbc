"""Every implementation against float64 numpy, over every pair of what can vary, with NaN wherever nothing may be read."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention.api import RaggedBatch, Tiling, default_tiling, paged_attention, plan_ragged_batch
from kernels_pallas.paged_attention.cases import CASES, FACTORS, Case, case_of, pairwise
from kernels_pallas.paged_attention.reference import paged_attention_reference

# (KV length, query length) of each sequence, one-token ones first, at most 300 tokens: primes, so that nothing is a multiple of
# a page, a tile or a split, but for those that end a split on purpose. Each mix reaches past a page of 128 and a window of 40.
MIXES = {
    "ones": ((1, 1), (1, 1), (151, 3)),
    "primes": ((2, 1), (131, 1), (3, 3), (139, 11)),
    "long": ((293, 1), (257, 19)),
    "empty rows": ((173, 1), (137, 23)),
    "decodes": ((7, 1), (128, 1), (129, 1), (211, 1)),
    "prompts": ((5, 5), (149, 149), (2, 2)),
    "mixed": ((41, 1), (283, 1), (167, 29), (31, 31)),
    "chunk": ((199, 47), (271, 17)),
}
LONG_MIXES = {
    "ones": ((1, 1), (1, 1), (4093, 3)),
    "primes": ((1021, 1), (2039, 1), (3, 3), (1543, 11)),
    "long": ((4096, 1), (4093, 19)),
    "empty rows": ((3067, 1), (2053, 23)),
    "decodes": ((4093, 1), (3967, 1), (512, 1), (2, 1)),
    "prompts": ((5, 5), (701, 701), (2, 2)),
    "mixed": ((1277, 1), (3581, 1), (1097, 29), (431, 131)),
    "chunk": ((3001, 47), (2711, 61)),
}
Sequences = tuple[tuple[int, int], ...]
LAYOUTS = ("shuffled", "shared", "reversed", "last")
EVERYTHING = {**FACTORS, "layout": LAYOUTS, "mix": tuple(MIXES)}
ROWS = pairwise(EVERYTHING)
A_FEW_LONG = tuple(next(i for i, row in enumerate(ROWS) if row["mix"] == mix) for mix in ("long", "primes", "decodes"))
"""The rows whose long contexts are not left to the slow tests."""
BACKENDS = ("xla", "triton_interpret")

SUM_TOLERANCE = 4e-6
"""Products and sums in float32, in another order. A score reaches 60, half an ulp of which is 2e-6: the relative error of its
exponential, and so of a weight; values reach 4.5, and weights sum to at most 1."""
UNIT_ROUNDOFF = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
"""Half an ulp, relative: what rounding to that dtype may change. Of float32 it is part of SUM_TOLERANCE."""

FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each program runs once: half of its time is LLVM's. The bits of optimised code are the subject of test_determinism."""


@dataclasses.dataclass
class Problem:
    """One ragged step over a pool in which everything that must not be read is NaN."""

    case: Case
    q_TNH: np.ndarray
    k_pages_GKZH: np.ndarray
    v_pages_GKZH: np.ndarray
    block_tables_RP: np.ndarray
    batch: RaggedBatch
    sinks_N: np.ndarray | None
    num_tokens: int
    tiling: Tiling


def place_pages(layout: str, pages_per_seq: list[int], num_pages: int, rng: np.random.Generator) -> list[list[int]]:
    """Returns each sequence's page ids. Page 0 and, but for "last", the last page of the pool belong to nobody."""
    last = num_pages - 1
    free = list(rng.permutation(np.arange(1, last)))
    if layout == "reversed":
        free = sorted(free)  # taken from the end: every table counts down
    tables = [[int(free.pop()) for _ in range(count)] for count in pages_per_seq]
    if layout == "last":
        tables[0][-1] = last
    if layout == "shared":
        # Everybody begins with the pages of the longest, of whose first page a short one sees only a part.
        longest = max(tables, key=len)
        for table in tables:
            common = -(-len(table) // 2)
            table[:common] = longest[:common]
    return tables


def make_problem(case: Case, layout: str, sequences: Sequences, tiling: Tiling, *, padding: int = 2) -> Problem:
    """Returns the step; `padding` empty rows, sequences, decode slots, items and tiles are in its bucket."""
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(case.dtype)
    N, K, H, Z = case.num_q_heads, case.num_kv_heads, case.head_dim, case.page_size
    pages_per_seq = [-(-kv_len // Z) for kv_len, _ in sequences]
    G, P, R = sum(pages_per_seq) + 4, max(pages_per_seq) + 1, len(sequences) + padding
    tables = place_pages(layout, pages_per_seq, G, rng)
    # Entries past the end: a page that is NaN, and ids beyond the pool on either side.
    block_tables_RP = rng.choice(np.array([0, G, G + 1000, -1, 2**31 - 1, -(2**31)], np.int32), (R, P))
    rows = rng.permutation(R)[: len(sequences)].astype(np.int32)
    live_G = np.zeros(G, int)
    for row, table, (kv_len, _) in zip(rows, tables, sequences, strict=True):
        block_tables_RP[row, : len(table)] = table
        for place, page in enumerate(table):
            live_G[page] = max(live_G[page], min(Z, kv_len - place * Z))
    k_pages_GKZH, v_pages_GKZH = (np.full((G, K, Z, H), np.nan, dtype) for _ in range(2))
    for page, live in enumerate(live_G):
        for pages in (k_pages_GKZH, v_pages_GKZH):
            pages[page, :, :live] = rng.standard_normal((K, live, H)).astype(dtype)
    kv_lens, q_lens = zip(*sequences, strict=True)
    num_tokens, num_decodes = sum(q_lens), q_lens.count(1)
    q_TNH = np.full((num_tokens + 9, N, H), np.nan, dtype)
    q_TNH[:num_tokens] = 2 * rng.standard_normal((num_tokens, N, H)).astype(dtype)
    num_items = sum(-(-kv_len // tiling.split_size) for kv_len in kv_lens[:num_decodes])
    num_tiles = sum(-(-q_len // tiling.query_tile) for q_len in q_lens[num_decodes:])
    batch = plan_ragged_batch(
        rows,
        kv_lens,
        q_lens,
        num_seq_slots=len(sequences) + padding,
        num_decode_slots=num_decodes and num_decodes + padding,
        max_decode_items=num_items and num_items + padding,
        max_prefill_tiles=num_tiles and num_tiles + padding,
        split_size=tiling.split_size,
        query_tile=tiling.query_tile,
    )
    sinks_N = rng.standard_normal(N).astype(np.float32) if case.has_sinks else None
    return Problem(case, q_TNH, k_pages_GKZH, v_pages_GKZH, block_tables_RP, batch, sinks_N, num_tokens, tiling)


@dataclasses.dataclass
class Answer:
    """What attention is, and the weighted sum of the values' magnitudes: what rounded weights may change, by half an ulp."""

    out_TNH: np.ndarray
    magnitude_TNH: np.ndarray


def attention_float64(problem: Problem) -> Answer:
    """The definition, one query at a time over the keys that it sees: no mask, no split, no tile."""
    case, batch = problem.case, problem.batch
    Z, K, shape = case.page_size, case.num_kv_heads, (case.num_q_heads, case.head_dim)
    out_TNH, magnitude_TNH = np.zeros((2, *problem.q_TNH.shape))
    for s in range(batch.num_seqs_1[0]):
        q_first, q_stop = batch.cu_q_lens_S1[s : s + 2]
        at = np.arange(batch.kv_lens_S[s])
        pages = problem.block_tables_RP[batch.rows_S[s], at // Z]
        k_CKH, v_CKH = (pool[pages, :, at % Z].astype(np.float64) for pool in (problem.k_pages_GKZH, problem.v_pages_GKZH))
        for token in range(q_first, q_stop):
            stop = batch.kv_lens_S[s] - (q_stop - token) + 1
            start = 0 if case.sliding_window is None else max(stop - case.sliding_window, 0)
            q_KMH = problem.q_TNH[token].astype(np.float64).reshape(K, case.group, -1)
            score_KMC = np.einsum("kmh,ckh->kmc", q_KMH, k_CKH[start:stop], optimize=True) * case.scale
            if case.soft_cap is not None:
                score_KMC = case.soft_cap * np.tanh(score_KMC / case.soft_cap)
            weight_KMC = np.exp(score_KMC)
            total_KM1 = weight_KMC.sum(axis=-1, keepdims=True)
            if problem.sinks_N is not None:
                total_KM1 += np.exp(problem.sinks_N.astype(np.float64)).reshape(K, case.group, 1)
            for out, v in ((out_TNH, v_CKH), (magnitude_TNH, np.abs(v_CKH))):
                out_KMH = np.einsum("kmc,ckh->kmh", weight_KMC / total_KM1, v[start:stop], optimize=True)
                out[token] = out_KMH.reshape(shape)
    return Answer(out_TNH, magnitude_TNH)


def run(problem: Problem, backend: str) -> np.ndarray:
    case = problem.case
    features = {"scale": case.scale, "sliding_window": case.sliding_window, "soft_cap": case.soft_cap}

    def step(q, k_pages, v_pages, tables, batch, sinks):
        if backend == "reference":
            return paged_attention_reference(q, k_pages, v_pages, tables, batch, **features, sinks_N=sinks)
        options = {**features, "sinks_N": sinks, "tiling": problem.tiling, "backend": backend}
        return paged_attention(q, k_pages, v_pages, tables, batch, **options)

    options = None if backend == "triton" else FAST_COMPILE
    arrays = (problem.q_TNH, problem.k_pages_GKZH, problem.v_pages_GKZH, problem.block_tables_RP)
    return np.asarray(jax.jit(step, compiler_options=options)(*arrays, problem.batch, problem.sinks_N))


def assert_agrees(problem: Problem, backend: str, answer: Answer | None = None) -> None:
    out_TNH = run(problem, backend)
    assert out_TNH.dtype == problem.q_TNH.dtype
    roundoff = UNIT_ROUNDOFF[str(out_TNH.dtype)]
    out_TNH = out_TNH.astype(np.float64)
    assert np.isfinite(out_TNH).all(), "padding leaked into the output"
    answer = attention_float64(problem) if answer is None else answer
    # The output is rounded by all; before its second product, Triton rounds the weights too.
    tolerance_TNH = SUM_TOLERANCE + roundoff * np.abs(answer.out_TNH)
    if "triton" in backend:
        tolerance_TNH += roundoff * answer.magnitude_TNH
    error_TNH = np.abs(out_TNH - answer.out_TNH)[: problem.num_tokens]
    worst = np.max(error_TNH / tolerance_TNH[: problem.num_tokens])
    assert worst <= 1, f"an error of {worst:.3g} times what rounding explains"


def small_tiling(case: Case, backend: str) -> Tiling:
    """Several splits and tiles in short contexts; few rows, because they interpret fast, and two blocks for a group of 16."""
    if backend == "xla":
        return Tiling(split_size=max(128, case.page_size), query_tile=16, decode_block=4)
    head_block = min(8, 1 << (case.group - 1).bit_length())
    return Tiling(split_size=max(128, case.page_size), query_tile=16 // head_block, head_block=head_block, kv_block=32)


def gpu_tiling(case: Case) -> Tiling:
    tiling = default_tiling(
        "gpu",
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype_bytes=jnp.dtype(case.dtype).itemsize,
        device_kind=jax.devices()[0].device_kind,
    )
    return dataclasses.replace(tiling, split_size=max(128, case.page_size))  # several splits in short contexts


def problem_of(row: dict, tiling_of: Callable[[Case], Tiling], mixes: dict[str, Sequences] = MIXES) -> Problem:
    case = case_of(row, num_kv_heads=2)
    padding = 9 if row["mix"] == "empty rows" else 2
    return make_problem(case, row["layout"], mixes[row["mix"]], tiling_of(case), padding=padding)


def name_of(row: dict) -> str:
    return "-".join(map(str, row.values())).replace(" ", "_")


def test_every_pair_is_covered():
    for (a, values_a), (b, values_b) in itertools.combinations(EVERYTHING.items(), 2):
        assert {(row[a], row[b]) for row in ROWS} == set(itertools.product(values_a, values_b)), (a, b)


@functools.cache
def answer_of(index: int) -> Answer:
    return attention_float64(problem_of(ROWS[index], lambda _: Tiling()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(ROWS)), ids=map(name_of, ROWS))
def test_agrees_with_float64(index, backend):
    assert_agrees(problem_of(ROWS[index], lambda case: small_tiling(case, backend)), backend, answer_of(index))


LONG = [
    pytest.param(row, id=name_of(row), marks=() if index in A_FEW_LONG else pytest.mark.slow)
    for index, row in enumerate(ROWS)
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", LONG)
def test_agrees_with_float64_in_long_contexts(row, backend):
    assert_agrees(problem_of(row, lambda case: small_tiling(case, backend), LONG_MIXES), backend)


@pytest.mark.parametrize("name", ["llama3-8b", "gemma2-9b-local", "gpt-oss-20b-local", "qwen2.5-7b"])
def test_specification_agrees_with_float64(name):
    (case,) = (case.shrunk(num_kv_heads=2, sliding_window=40) for case in CASES if case.name == name)
    assert_agrees(make_problem(case, "shuffled", MIXES["mixed"], Tiling()), "reference")


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case, backends in (
            (Case("multi-query-71", 71, 1, 64, 256), BACKENDS),
            (Case("odd-head-dim", 6, 2, 21, 8, "float32", sliding_window=40), BACKENDS),
            (Case("wide-head", 2, 1, 512, 64, "float16"), ["xla"]),
        )
        for backend in backends
    ],
)
def test_unusual_shapes_agree_with_float64(case, backend):
    assert_agrees(make_problem(case, "shuffled", MIXES["mixed"], small_tiling(case, backend)), backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_queries_over_float32_pages_agree_with_float64(dtype):
    """What a CPU serves in 16 bits: its pages are float32 all the same."""
    case = Case("cpu", 4, 2, 64, 16, "float32")
    problem = make_problem(case, "shuffled", MIXES["mixed"], small_tiling(case, "xla"))
    problem.q_TNH = problem.q_TNH.astype(jnp.dtype(dtype))
    assert_agrees(problem, "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("mixes", [MIXES, LONG_MIXES], ids=["short", "long"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_triton_on_a_gpu_agrees_with_float64(row, mixes):
    """With the rows and warps that ship: xla#19780 was wrong results of 64 rows and 8 warps on an H100."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU; `test_gpu_compile` covers the compilation without one")
    assert_agrees(problem_of(row, gpu_tiling, mixes), "triton")
