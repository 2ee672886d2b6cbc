"""Seconds that a device takes for one call, without what the host takes to ask for it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def seconds_a_call(
    function: Callable[..., jax.Array], rotated: Any, shared: Any, *, num_calls: int, num_rounds: int = 5
) -> float:
    """Returns the median time of a call, warm [s].

    The calls are one program, a loop on the device in which each call waits for the result of the one before: the host asks
    once, and nothing is left out or done beside another. Their first arguments differ from call to call, so that a call does
    not find in the L2 cache what the last one read; who times a call that reads less than that must rotate enough.

    Args:
        function: of (one of rotated, shared), to an array.
        rotated: a pytree of arrays with a leading axis, one entry a call, repeated from the start when they end. The loop copies
            an entry, so they are small beside what the call reads.
        shared: a pytree of arrays that every call gets as they are.
        num_calls: in one program.
        num_rounds: runs of the program, after one that warms up.
    """
    repeat = jax.jit(loop(function, num_calls))

    def run(_: None) -> None:
        jax.block_until_ready(repeat(rotated, shared))

    return seconds_in_place(run, None, num_rounds=num_rounds) / (num_calls + 1)


def loop(function: Callable[..., jax.Array], num_calls: int) -> Callable[[Any, Any], jax.Array]:
    """Returns the function of (rotated, shared) that makes one call more than `num_calls`; see `seconds_a_call`."""

    def repeat(rotated: Any, shared: Any) -> jax.Array:
        num_rotated = jax.tree.leaves(rotated)[0].shape[0]

        def call(index: jax.Array, last: jax.Array) -> jax.Array:
            entry = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index % num_rotated, keepdims=False), rotated)
            # All that a call reads waits for the last result: XLA may not move what never changes out of the loop.
            entry, operands, _ = lax.optimization_barrier((entry, shared, last))
            return function(entry, operands)

        first = function(jax.tree.map(lambda x: x[0], rotated), shared)
        return lax.fori_loop(0, num_calls, call, first)

    return repeat


def seconds_in_place(program: Any, donated: Any, *rest: Any, num_rounds: int = 5) -> float:
    """Returns the median time of a program that takes its first argument and returns it [s]."""
    donated = jax.block_until_ready(program(donated, *rest))
    taken_s = []
    for _ in range(num_rounds):
        started = time.perf_counter()
        donated = jax.block_until_ready(program(donated, *rest))
        taken_s.append(time.perf_counter() - started)
    return statistics.median(taken_s)
