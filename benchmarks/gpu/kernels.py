"""Each kernel's time as a share of the ceiling that bounds it: attention, the write of keys and values, and sampling."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.numerics import device_tiling
from benchmarks.gpu.report import Part, Row
from benchmarks.gpu.timing import seconds_a_call, seconds_in_place
from jaxserve.execution.argmax import largest
from jaxserve.execution.logits import SamplingInputs
from jaxserve.execution.sampling import truncate
from kernels_pallas.kv_write.api import kv_write
from kernels_pallas.paged_attention.api import (
    num_decode_items,
    num_prefill_tiles,
    paged_attention,
    plan_ragged_batch,
)
from kernels_pallas.paged_attention.cases import CASES, Case


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        decodes: (sequences, tokens of context each) of a decode step.
        prefills: tokens of one prompt, computed at once.
        tokens: written to pages, and rows that are sampled.
        vocab_size: of the logits.
        l2_bytes: what the device's cache may hold; calls rotate over more than twice as much, where the pool has it.
        pool_bytes: most of the memory that a pool of keys, or of values, takes.
        num_calls: in one program.
    """

    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[int, ...]
    tokens: tuple[int, ...]
    vocab_size: int
    l2_bytes: int = 64 << 20
    pool_bytes: int = 16 << 30
    num_calls: int = 20


def measure(ceilings: Ceilings, sizes: Sizes, report: Callable[[Part], None], *, case_name: str) -> None:
    """Reports a row for each kernel and size, a part for each kernel."""
    (case,) = (case for case in CASES if case.name == case_name)
    decodes = [_decode(ceilings, sizes, case, *decode) for decode in sizes.decodes]
    report(Part(f"Decode attention of {case_name}", decodes))
    prefills = [_prefill(ceilings, sizes, case, length) for length in sizes.prefills]
    report(Part(f"Prefill attention of {case_name}", prefills))
    report(Part(f"Writing keys and values of {case_name}", [_write(ceilings, sizes, case, n) for n in sizes.tokens]))
    report(Part("Sampling", [row for count in sizes.tokens for row in _sampling(ceilings, sizes, count)]))


def _row(name: str, seconds: float, *, ceilings: Ceilings, num_bytes: float = 0.0, flop: float = 0.0) -> Row:
    """Returns a row with the share of the larger of two bounds, reading at the stream's rate or computing at the matmul's."""
    bounds = {"stream": num_bytes / ceilings.stream_bytes_s, "matmul": flop / ceilings.matmul_flop_s}
    bound = max(bounds, key=lambda name: bounds[name])
    figures: dict[str, float | int | str] = {"us": seconds * 1e6, "GB/s": num_bytes / seconds / 1e9}
    figures |= {"TFLOP/s": flop / seconds / 1e12, "ceiling": bound, "share of ceiling": bounds[bound] / seconds}
    return Row(name, figures)


def _pools(case: Case, num_pages: int) -> tuple[jax.Array, jax.Array]:
    shape = (num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.dtype(case.dtype)))
    return draw(jax.random.key(0)), draw(jax.random.key(1))


def attention_of(case: Case) -> Callable[[jax.Array, Any], jax.Array]:
    """Returns the function of (block tables, (q, keys, values, batch)) that is timed."""
    tiling = device_tiling(case)

    def attention(tables_RP: jax.Array, operands: Any) -> jax.Array:
        q_TNH, k_pages, v_pages, batch = operands
        return paged_attention(q_TNH, k_pages, v_pages, tables_RP, batch, scale=case.scale, tiling=tiling)

    return attention


def _attend(sizes: Sizes, case: Case, kv_lens: list[int], q_lens: list[int], num_pages_each: int, pools: int) -> float:
    """Returns the time of a step [s]; calls take turns with `pools` tables of disjoint pages, shuffled."""
    tiling = device_tiling(case)
    num_decodes = q_lens.count(1)
    batch = plan_ragged_batch(
        range(len(kv_lens)),
        kv_lens,
        q_lens,
        num_seq_slots=len(kv_lens),
        num_decode_slots=num_decodes,
        max_decode_items=sum(num_decode_items(kv_len, tiling.split_size) for kv_len in kv_lens[:num_decodes]),
        max_prefill_tiles=sum(num_prefill_tiles(q_len, tiling.query_tile) for q_len in q_lens[num_decodes:]),
        split_size=tiling.split_size,
        query_tile=tiling.query_tile,
    )
    num_rows = len(kv_lens)
    num_pages = pools * num_rows * num_pages_each
    k_pages, v_pages = _pools(case, num_pages)
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    tables = jnp.asarray(pages.reshape(pools, num_rows, num_pages_each))
    q_shape = (sum(q_lens), case.num_q_heads, case.head_dim)
    q_TNH = jax.random.normal(jax.random.key(2), q_shape, jnp.dtype(case.dtype))
    shared = (q_TNH, k_pages, v_pages, jax.tree.map(jnp.asarray, batch))
    return seconds_a_call(attention_of(case), tables, shared, num_calls=sizes.num_calls)


def _page_bytes(case: Case) -> int:
    return case.num_kv_heads * case.page_size * case.head_dim * jnp.dtype(case.dtype).itemsize


def _decode(ceilings: Ceilings, sizes: Sizes, case: Case, num_seqs: int, context: int) -> Row:
    num_pages = -(-context // case.page_size)
    read_bytes = 2 * num_seqs * num_pages * _page_bytes(case)
    name = f"{num_seqs} x {context}"
    if read_bytes // 2 > sizes.pool_bytes:
        return Row(name, {"ceiling": f"not measured: a pool of {read_bytes / 2e9:.0f} GB"})
    pools = max(1, min(-(-2 * sizes.l2_bytes // read_bytes), 2 * sizes.pool_bytes // read_bytes))
    seconds = _attend(sizes, case, [context] * num_seqs, [1] * num_seqs, num_pages, pools)
    flop = 4.0 * num_seqs * context * case.num_q_heads * case.head_dim
    used_bytes = 2 * num_seqs * context * _page_bytes(case) / case.page_size
    return _row(name, seconds, ceilings=ceilings, num_bytes=used_bytes, flop=flop)


def _prefill(ceilings: Ceilings, sizes: Sizes, case: Case, length: int) -> Row:
    seconds = _attend(sizes, case, [length], [length], -(-length // case.page_size), 1)
    flop = 4.0 * case.num_q_heads * case.head_dim * length * (length + 1) / 2
    used_bytes = 2 * length * _page_bytes(case) / case.page_size + 2 * length * case.num_q_heads * case.head_dim * 2
    return _row(f"{length} tokens", seconds, ceilings=ceilings, num_bytes=used_bytes, flop=flop)


def writes(num_calls: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the function of (pools, keys, values, slots) that writes them so many times."""

    def write(pools: tuple[jax.Array, jax.Array], k_TKH: jax.Array, v_TKH: jax.Array, slots_T: jax.Array) -> Any:
        # The keys wait for the pools: what is written every time alike would else be computed once.
        def call(_: jax.Array, pools: tuple[jax.Array, jax.Array]) -> Any:
            pools, k, v, slots = jax.lax.optimization_barrier((pools, k_TKH, v_TKH, slots_T))
            return kv_write(*pools, k, v, slots)

        return jax.lax.fori_loop(0, num_calls, call, pools)

    return write


def _write(ceilings: Ceilings, sizes: Sizes, case: Case, num_tokens: int) -> Row:
    """The pools are the loop's own, and so written in place; where they are copied, the time says so."""
    num_pages = max(2 * sizes.l2_bytes // _page_bytes(case), -(-num_tokens // case.page_size)) + 1
    pools = _pools(case, num_pages)
    shape = (num_tokens, case.num_kv_heads, case.head_dim)
    k_TKH, v_TKH = (jnp.ones(shape, pools[0].dtype) for _ in range(2))
    slots = np.random.default_rng(0).permutation(num_pages * case.page_size)[:num_tokens].astype(np.int32)
    program = jax.jit(writes(sizes.num_calls), donate_argnums=0)
    seconds = seconds_in_place(program, pools, k_TKH, v_TKH, jnp.asarray(slots))
    moved = 2 * 2 * k_TKH.nbytes
    return _row(f"{num_tokens} tokens", seconds / sizes.num_calls, ceilings=ceilings, num_bytes=moved)


def _sampling(ceilings: Ceilings, sizes: Sizes, num_rows: int) -> list[Row]:
    """Greedy reads the logits once; the truncations read them about seventy times, most of them from the cache."""
    logits_SV = 4 * jax.random.normal(jax.random.key(0), (num_rows, sizes.vocab_size), jnp.float32)
    ones, zeros = np.ones(num_rows, np.float32), np.zeros(num_rows, np.int32)
    inputs = SamplingInputs(
        positions_S=zeros,
        temperature_S=ones,
        top_k_S=zeros + 50,
        top_p_S=0.9 * ones,
        min_p_S=0.01 * ones,
        keys_S2=np.zeros((num_rows, 2), np.uint32),
        repetition_S=ones,
        frequency_S=0 * ones,
        presence_S=0 * ones,
        is_masked_S=zeros,
        has_bias_S=zeros,
        logprobs_S=zeros,
        picks_S=zeros,
    )
    steps = jnp.arange(4, dtype=jnp.float32)
    rows = []
    for name, function in (
        ("greedy", lambda step, x: largest(x + step)[0]),
        ("top-k, top-p and min-p", lambda step, x: truncate(x + step, inputs)),
    ):
        seconds = seconds_a_call(function, steps, logits_SV, num_calls=sizes.num_calls)
        rows.append(_row(f"{name}, {num_rows} rows", seconds, ceilings=ceilings, num_bytes=logits_SV.nbytes))
    return rows
