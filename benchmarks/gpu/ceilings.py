"""What the machine can do at best, by programs of XLA's own: every other figure is a share of one of these."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.gpu.report import Ceilings, Part, Row
from benchmarks.gpu.timing import seconds_a_call


def measure(report: Callable[[Part], None], *, num_bytes: int, matrix_size: int, num_calls: int) -> Ceilings:
    """Returns the ceilings, and reports them.

    Args:
        report: gets the part.
        num_bytes: of the copied and of the summed array; far above the caches.
        matrix_size: rows and columns.
        num_calls: of each program in a row.
    """
    steps = jnp.arange(4, dtype=jnp.int32)
    x = jnp.ones((num_bytes // 4096, 2048), jnp.bfloat16)
    copy_s = seconds_a_call(lambda step, x: x + step.astype(x.dtype), steps, x, num_calls=num_calls)
    # Integers: the sum of as many ones has no rounding to hide behind, and nothing but reading takes time.
    numbers = jnp.ones((num_bytes // 4096, 1024), jnp.int32)
    stream_s = seconds_a_call(lambda step, x: jnp.sum(x ^ step, axis=1), steps, numbers, num_calls=num_calls)
    size = matrix_size
    matrices = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    matmul_s = seconds_a_call(lambda _, m: m[0] @ m[1], steps, tuple(matrices), num_calls=num_calls)
    ceilings = Ceilings(2 * x.nbytes / copy_s, numbers.nbytes / stream_s, 2.0 * size**3 / matmul_s)
    rows = [
        Row("device copy", {"GB/s": ceilings.copy_bytes_s / 1e9}),
        Row("read-only stream", {"GB/s": ceilings.stream_bytes_s / 1e9}),
        Row(f"bfloat16 matmul of {size} x {size}", {"TFLOP/s": ceilings.matmul_flop_s / 1e12}),
    ]
    report(Part("Ceilings", rows))
    return ceilings
