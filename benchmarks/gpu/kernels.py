"""The other kernels' times as shares of the stream: writing keys and values, and sampling."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.attention import page_bytes, pools_of
from benchmarks.gpu.report import Ceilings, Part, Row, share_of_ceiling
from benchmarks.gpu.timing import seconds_a_call, seconds_in_place
from jaxserve.execution.argmax import largest
from jaxserve.execution.logits import SamplingInputs
from jaxserve.execution.sampling import truncate
from kernels_pallas.kv_write.api import kv_write
from kernels_pallas.paged_attention.cases import Case

POOL_BYTES = 128 << 20
"""Of keys, and of values: what is written into at random [bytes]; more than a cache holds."""

SLOTS_APART = 1009
"""From a call to the next: a prime, so that no call meets the lines of the one before."""


def measure(
    ceilings: Ceilings,
    counts: tuple[int, ...],
    vocab_size: int,
    case: Case,
    report: Callable[[Part], None],
    *,
    num_calls: int,
) -> None:
    """Reports a row for each kernel and count, of tokens that are written or of rows that are sampled."""
    rows = [_write(ceilings, count, case, num_calls) for count in counts]
    report(Part(f"Writing keys and values of {case.name}", rows))
    report(Part("Sampling", [row for count in counts for row in _sampling(ceilings, count, vocab_size, num_calls)]))


def writes(num_calls: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the function of (pools, keys, values, slots) that writes them so many times, each time into other slots."""

    def write(pools: tuple[jax.Array, jax.Array], k_TKH: jax.Array, v_TKH: jax.Array, slots_T: jax.Array) -> Any:
        num_slots = pools[0].shape[0] * pools[0].shape[2]

        # The keys wait for the pools: what is written every time alike would else be computed once.
        def call(index: jax.Array, pools: tuple[jax.Array, jax.Array]) -> Any:
            pools, k, v, slots = jax.lax.optimization_barrier((pools, k_TKH, v_TKH, slots_T))
            return kv_write(*pools, k, v, (slots + index * SLOTS_APART) % num_slots)

        return jax.lax.fori_loop(0, num_calls, call, pools)

    return write


def _write(ceilings: Ceilings, num_tokens: int, case: Case, num_calls: int) -> Row:
    """The pools are the loop's own, and so written in place; where they are copied, the time says so."""
    num_pages = max(POOL_BYTES // page_bytes(case), -(-num_tokens // case.page_size)) + 1
    pools = pools_of(case, num_pages)
    shape = (num_tokens, case.num_kv_heads, case.head_dim)
    k_TKH, v_TKH = (jnp.ones(shape, pools[0].dtype) for _ in range(2))
    slots = np.random.default_rng(0).permutation(num_pages * case.page_size)[:num_tokens].astype(np.int32)
    program = jax.jit(writes(num_calls), donate_argnums=0)
    seconds = seconds_in_place(program, pools, k_TKH, v_TKH, jnp.asarray(slots))
    moved = 2 * 2 * k_TKH.nbytes
    return Row(f"{num_tokens} tokens", share_of_ceiling(seconds / num_calls, ceilings, num_bytes=moved))


def _sampling(ceilings: Ceilings, num_rows: int, vocab_size: int, num_calls: int) -> list[Row]:
    """Greedy reads the logits once; the truncations read them about seventy times. Few rows stay in the cache, as they do in a
    step, where the head has just written them: a share above 1 says so.
    """
    logits_SV = 4 * jax.random.normal(jax.random.key(0), (num_rows, vocab_size), jnp.float32)
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
        seconds = seconds_a_call(function, steps, logits_SV, num_calls=num_calls)
        rows.append(Row(f"{name}, {num_rows} rows", share_of_ceiling(seconds, ceilings, num_bytes=logits_SV.nbytes)))
    return rows
