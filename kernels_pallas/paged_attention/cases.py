"""Named attention shapes of real models, shared by tests, benchmarks and tuning.

Between them they pair every query group (1, 3, 4, 7, 8) with windows, soft caps and sinks, every page size from 16 to 128
with powers of two and other head dims, and each dtype with each kernel feature; they are not the product of all of it.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's attention in one model."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "bfloat16"
    sliding_window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    @property
    def scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return self.head_dim**-0.5

    def shrunk(self, *, num_kv_heads: int, sliding_window: int) -> "Case":
        """Returns the case with fewer KV heads (the group stays) and a window, where it has one, of a test's size."""
        group = self.num_q_heads // self.num_kv_heads
        window = None if self.sliding_window is None else sliding_window
        return dataclasses.replace(self, num_q_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, sliding_window=window)


CASES = (
    Case("llama3-8b", 32, 8, 128, 64),
    Case("gpt2-125m", 12, 12, 64, 16, dtype="float32"),
    Case("smollm-135m", 9, 3, 64, 128, dtype="float16", sliding_window=4096),
    Case("phi3-mini", 32, 32, 96, 32, sliding_window=2047),
    Case("gemma2-9b-local", 16, 8, 256, 16, sliding_window=4096, soft_cap=50.0),
    Case("gpt-oss-20b-local", 64, 8, 64, 64, sliding_window=128, has_sinks=True),
    Case("qwen2.5-7b", 28, 4, 128, 32, dtype="float32", has_sinks=True),
    Case("stablelm-3b", 32, 32, 80, 64, dtype="float16", soft_cap=30.0, has_sinks=True),
)
