"""Attention's time as a share of its ceiling, beside JAX's own paged kernel and cuDNN, and the tiles that are fastest here."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.numerics import device_tiling
from benchmarks.gpu.report import Ceilings, Part, Row, share_of_ceiling
from benchmarks.gpu.timing import seconds_a_call
from kernels_pallas.paged_attention.api import (
    Tiling,
    num_decode_items,
    num_prefill_tiles,
    paged_attention,
    plan_ragged_batch,
)
from kernels_pallas.paged_attention.cases import Case


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        decodes: (sequences, tokens of context each) of a decode step.
        prefills: tokens of one prompt, computed at once.
        beside: of these, decodes and prompts that the peers do too. cuDNN's keys do not rotate, so a decode here should read
            more than l2_bytes.
        tuned: the decode and the prompt for which tiles are tried; None tries none.
        l2_bytes: what the device's cache may hold; calls rotate over twice as much, where the pool has it.
        pool_bytes: most of the memory that a pool of keys, or of values, takes.
        num_calls: in one program.
    """

    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[int, ...]
    beside: tuple[tuple[int, int] | int, ...]
    tuned: tuple[tuple[int, int], int] | None = None
    l2_bytes: int = 64 << 20
    pool_bytes: int = 16 << 30
    num_calls: int = 20


def measure(ceilings: Ceilings, sizes: Sizes, case: Case, report: Callable[[Part], None]) -> None:
    """Reports decode, prefill, and what was tried to make either faster."""
    for title, steps in (("Decode", sizes.decodes), ("Prefill", sizes.prefills)):
        rows = [_row(ceilings, sizes, case, step) for step in steps]
        report(Part(f"{title} attention of {case.name}", rows))
    for step in sizes.tuned or ():
        report(Part(f"Tiles of {case.name}, {_name(step)}", _tune(sizes, case, step)))


def attention_of(case: Case, tiling: Tiling) -> Callable[[jax.Array, Any], jax.Array]:
    """Returns the function of (block tables, (q, keys, values, batch)) that is timed."""

    def attention(tables_RP: jax.Array, operands: Any) -> jax.Array:
        q_TNH, k_pages, v_pages, batch = operands
        return paged_attention(q_TNH, k_pages, v_pages, tables_RP, batch, scale=case.scale, tiling=tiling)

    return attention


def pools_of(case: Case, num_pages: int) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [pages, KV heads, page size, head dim], random."""
    shape = (num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.dtype(case.dtype)))
    return draw(jax.random.key(0)), draw(jax.random.key(1))


def page_bytes(case: Case) -> int:
    """Returns the size of a page of keys, or of values."""
    return case.num_kv_heads * case.page_size * case.head_dim * jnp.dtype(case.dtype).itemsize


def _name(step: tuple[int, int] | int) -> str:
    return f"{step} tokens" if isinstance(step, int) else f"{step[0]} x {step[1]}"


def _lengths(step: tuple[int, int] | int) -> tuple[list[int], list[int]]:
    """Returns (KV lengths, query lengths) of the sequences."""
    return ([step], [step]) if isinstance(step, int) else ([step[1]] * step[0], [1] * step[0])


def _tables(sizes: Sizes, case: Case, step: tuple[int, int] | int) -> tuple[jax.Array, int]:
    """Returns block tables [pools, rows, pages] of disjoint shuffled pages for the calls to take turns, and how many pages."""
    kv_lens, _ = _lengths(step)
    num_rows, pages_each = len(kv_lens), -(-kv_lens[0] // case.page_size)
    read_bytes = 2 * num_rows * pages_each * page_bytes(case)
    pools = max(1, min(-(-2 * sizes.l2_bytes // read_bytes), 2 * sizes.pool_bytes // read_bytes))
    num_pages = pools * num_rows * pages_each
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    return jnp.asarray(pages.reshape(pools, num_rows, pages_each)), num_pages


def _queries(case: Case, num_tokens: int) -> jax.Array:
    shape = (num_tokens, case.num_q_heads, case.head_dim)
    return jax.random.normal(jax.random.key(2), shape, jnp.dtype(case.dtype))


def _ours_s(sizes: Sizes, case: Case, step: tuple[int, int] | int, tiling: Tiling) -> float:
    kv_lens, q_lens = _lengths(step)
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
    tables, num_pages = _tables(sizes, case, step)
    shared = (_queries(case, sum(q_lens)), *pools_of(case, num_pages), jax.tree.map(jnp.asarray, batch))
    return seconds_a_call(attention_of(case, tiling), tables, shared, num_calls=sizes.num_calls)


def _row(ceilings: Ceilings, sizes: Sizes, case: Case, step: tuple[int, int] | int) -> Row:
    kv_lens, q_lens = _lengths(step)
    num_read = 2 * sum(kv_lens) * page_bytes(case) / case.page_size
    if num_read / 2 > sizes.pool_bytes:
        return Row(_name(step), {"ceiling": f"not measured: pools of {num_read / 1e9:.0f} GB"})
    # A query at position p sees p + 1 keys.
    num_seen = sum(q * kv - q * (q - 1) / 2 for kv, q in zip(kv_lens, q_lens, strict=True))
    flop = 4.0 * num_seen * case.num_q_heads * case.head_dim
    moved = num_read + 2 * sum(q_lens) * case.num_q_heads * case.head_dim * jnp.dtype(case.dtype).itemsize
    seconds = _ours_s(sizes, case, step, device_tiling(case))
    figures = share_of_ceiling(seconds, ceilings, num_bytes=moved, flop=flop)
    if step in sizes.beside:
        for name, peer_s in (("JAX's paged", _jax_paged_s), ("cuDNN", _cudnn_s)):
            try:
                figures[f"{name} / ours"] = peer_s(sizes, case, step) / seconds
            except Exception as error:  # each has its own way to say that it cannot
                figures[f"{name} / ours"] = f"cannot: {type(error).__name__}"
    return Row(_name(step), figures)


def _jax_paged_s(sizes: Sizes, case: Case, step: tuple[int, int] | int) -> float:
    """The decode kernel in JAX's tree, which keeps each head's pages together, over as many random pages."""
    if isinstance(step, int):
        raise NotImplementedError("decode alone")
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as jax_paged_attention

    tables, num_pages = _tables(sizes, case, step)
    k_pages, v_pages = (x.reshape(case.num_kv_heads, num_pages, *x.shape[2:]) for x in pools_of(case, num_pages))
    q = _queries(case, step[0])
    lengths = jnp.full(step[0], step[1], jnp.int32)
    # Its split count has to divide the pages of a sequence.
    splits = next(n for n in (16, 8, 4, 2, 1) if tables.shape[-1] % n == 0)

    def attention(tables_RP: jax.Array, operands: Any) -> jax.Array:
        q, k_pages, v_pages, lengths = operands
        return jax_paged_attention(q, k_pages, v_pages, tables_RP, lengths, k_splits=splits)

    return seconds_a_call(attention, tables, (q, k_pages, v_pages, lengths), num_calls=sizes.num_calls)


def _cudnn_s(sizes: Sizes, case: Case, step: tuple[int, int] | int) -> float:
    """Attention of cuDNN through `jax.nn`, over contiguous keys: it need not look up a page."""
    kv_lens, q_lens = _lengths(step)
    dtype = jnp.dtype(case.dtype)
    kv_shape = (len(kv_lens), kv_lens[0], case.num_kv_heads, case.head_dim)
    k, v = (jax.random.normal(jax.random.key(seed), kv_shape, dtype) for seed in (0, 1))
    q = _queries(case, sum(q_lens)).reshape(len(q_lens), q_lens[0], case.num_q_heads, case.head_dim)

    def attention(_: jax.Array, operands: Any) -> jax.Array:
        q, k, v = operands
        return jax.nn.dot_product_attention(q, k, v, scale=case.scale, is_causal=q_lens[0] > 1, implementation="cudnn")

    return seconds_a_call(attention, jnp.arange(2), (q, k, v), num_calls=sizes.num_calls)


def _tune(sizes: Sizes, case: Case, step: tuple[int, int] | int) -> list[Row]:
    """Returns the tiles that differ from the shipped ones in one size, fastest first; the sizes are what `tuned.json` holds."""
    found: list[tuple[float, Row]] = []
    shipped = device_tiling(case)
    for tiling in _neighbours(shipped, is_decode=not isinstance(step, int), page_size=case.page_size):
        name = _difference(tiling, shipped)
        try:
            seconds = _ours_s(sizes, case, step, tiling)
        except Exception as error:  # too much shared memory, say
            found.append((float("inf"), Row(name, {"us": f"cannot: {type(error).__name__}"})))
        else:
            found.append((seconds, Row(name, {"us": 1e6 * seconds})))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _difference(tiling: Tiling, shipped: Tiling) -> str:
    new, old = dataclasses.asdict(tiling), dataclasses.asdict(shipped)
    return ", ".join(f"{name} {new[name]} for {old[name]}" for name in new if new[name] != old[name]) or "as shipped"


def _neighbours(tiling: Tiling, *, is_decode: bool, page_size: int) -> Iterator[Tiling]:
    yield tiling
    kind = "decode" if is_decode else "prefill"
    tried = {"kv_block": (32, 64, 128), f"{kind}_num_warps": (4, 8), f"{kind}_num_stages": (2, 3, 4, 5)}
    tried |= {"split_size": (128, 256, 512, 1024)} if is_decode else {"query_tile": (16, 32, 64, 128)}
    for name, values in tried.items():
        for value in values:
            is_whole = name != "split_size" or value % page_size == 0
            if value != getattr(tiling, name) and is_whole:
                yield dataclasses.replace(tiling, **{name: value})
