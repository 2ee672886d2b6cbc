"""Steps of attention that tests and the GPU's own check share: inputs with NaN wherever nothing may be read, and the answer.

Knows the definition, in float64 numpy, and how far from it rounding may lead; knows no implementation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas.paged_attention.cases import FACTORS, Case, case_of, pairwise
from kernels_pallas.paged_attention.tiling import Tiling, default_tiling
from kernels_pallas.paged_attention.work import RaggedBatch, plan_ragged_batch

Sequences = tuple[tuple[int, int], ...]
"""(KV length, query length) of each sequence, one-token ones first."""

LAYOUTS = ("shuffled", "shared", "reversed", "last")
"""How a pool's pages belong to sequences; see `place_pages`."""

MIXES: dict[str, Sequences] = {
    "ones": ((1, 1), (1, 1), (151, 3)),
    "primes": ((2, 1), (131, 1), (3, 3), (139, 11)),
    "long": ((293, 1), (257, 19)),
    "empty rows": ((173, 1), (137, 23)),
    "decodes": ((7, 1), (128, 1), (129, 1), (211, 1)),
    "prompts": ((5, 5), (149, 149), (2, 2)),
    "mixed": ((41, 1), (283, 1), (167, 29), (31, 31)),
    "chunk": ((199, 47), (271, 17)),
}
"""At most 300 tokens each: primes, so that nothing is a multiple of a page, a tile or a split, but for those that end a split
on purpose. Each mix reaches past a page of 128 and a window of 40."""

LONG_MIXES: dict[str, Sequences] = {
    "ones": ((1, 1), (1, 1), (4093, 3)),
    "primes": ((1021, 1), (2039, 1), (3, 3), (1543, 11)),
    "long": ((4096, 1), (4093, 19)),
    "empty rows": ((3067, 1), (2053, 23)),
    "decodes": ((4093, 1), (3967, 1), (512, 1), (2, 1)),
    "prompts": ((5, 5), (701, 701), (2, 2)),
    "mixed": ((1277, 1), (3581, 1), (1097, 29), (431, 131)),
    "chunk": ((3001, 47), (2711, 61)),
}
"""Likewise, at most 4,096 tokens."""

EVERYTHING = {**FACTORS, "layout": LAYOUTS, "mix": tuple(MIXES)}
ROWS = pairwise(EVERYTHING)
"""Every pair of a kernel's features, layouts and mixes."""

SUM_TOLERANCE = 4e-6
"""Products and sums in float32, in another order. A score reaches 60, half an ulp of which is 2e-6: the relative error of its
exponential, and so of a weight; values reach 4.5, and weights sum to at most 1."""
UNIT_ROUNDOFF = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
"""Half an ulp, relative: what rounding to that dtype may change. Of float32 it is part of SUM_TOLERANCE."""


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


def make_problem(
    case: Case, layout: str, sequences: Sequences, tiling: Tiling, *, padding: int = 2, seed: int = 0
) -> Problem:
    """Returns the step; `padding` empty rows, sequences, decode slots, items and tiles are in its bucket."""
    rng = np.random.default_rng(seed)
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
    out_TNH, magnitude_TNH = (np.zeros(problem.q_TNH.shape) for _ in range(2))
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


def problem_of(
    row: dict[str, Any], tiling_of: Callable[[Case], Tiling], mixes: dict[str, Sequences] = MIXES, *, seed: int = 0
) -> Problem:
    """Returns the step of one of `ROWS`, with two KV heads."""
    case = case_of(row, num_kv_heads=2)
    padding = 9 if row["mix"] == "empty rows" else 2
    return make_problem(case, row["layout"], mixes[row["mix"]], tiling_of(case), padding=padding, seed=seed)


def shipped_tiling(case: Case, platform: str, device_kind: str) -> Tiling:
    """Returns the tiles of `tuned.json` for a case."""
    return default_tiling(
        platform,
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype_bytes=jnp.dtype(case.dtype).itemsize,
        device_kind=device_kind,
    )


def with_short_splits(tiling: Tiling, case: Case) -> Tiling:
    """Returns the tiles with several splits in the contexts of `MIXES`."""
    return dataclasses.replace(tiling, split_size=max(128, case.page_size))


def name_of(row: dict[str, Any]) -> str:
    """Returns a row's values as one word."""
    return "-".join(map(str, row.values())).replace(" ", "_")


def error_in_roundings(problem: Problem, out_TNH: np.ndarray, answer: Answer, *, rounds_weights: bool) -> float:
    """Returns the largest error as a multiple of what rounding explains, so that up to 1 is right.

    Args:
      problem: the step.
      out_TNH: what an implementation says, in the queries' dtype.
      answer: from `attention_float64`.
      rounds_weights: the implementation rounds the weights to that dtype before its second product, as Triton does.

    Returns:
      infinity where a number is not finite, in a token of no sequence too: padding leaked into the output.
    """
    roundoff = UNIT_ROUNDOFF[str(out_TNH.dtype)]
    out_TNH = out_TNH.astype(np.float64)
    if not np.isfinite(out_TNH).all():
        return float("inf")
    tolerance_TNH = SUM_TOLERANCE + roundoff * np.abs(answer.out_TNH)
    if rounds_weights:
        tolerance_TNH += roundoff * answer.magnitude_TNH
    error_TNH = np.abs(out_TNH - answer.out_TNH)[: problem.num_tokens]
    return float(np.max(error_TNH / tolerance_TNH[: problem.num_tokens]))
