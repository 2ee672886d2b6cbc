"""Attention shapes that tests, benchmarks and tuning share: named ones of real models, and every pair of what can vary."""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from typing import Any


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

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def shrunk(self, *, num_kv_heads: int, sliding_window: int) -> "Case":
        """Returns the case with fewer KV heads (the group stays) and a window, where it has one, of a test's size."""
        window = None if self.sliding_window is None else sliding_window
        heads = {"num_q_heads": self.group * num_kv_heads, "num_kv_heads": num_kv_heads}
        return dataclasses.replace(self, **heads, sliding_window=window)


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


FACTORS: dict[str, tuple] = {
    "group": (1, 4, 7, 8, 16),
    "head_dim": (64, 80, 96, 128, 256),
    "page_size": (16, 32, 64, 128),
    "dtype": ("bfloat16", "float16", "float32"),
    "sliding_window": (None, 1, 7, 40),
    "soft_cap": (None, 30.0),
    "has_sinks": (False, True),
}
"""What changes a kernel's code."""


def pairwise(factors: dict[str, Sequence[Hashable]]) -> tuple[dict[str, Any], ...]:
    """Returns rows {factor: value} in which any two values of two factors meet at least once.

    A fault that needs one value, or two together, shows in some row, and a few dozen rows do what thousands of the product
    would. Greedy and deterministic: each row starts from the first pair that is missing and takes, factor by factor, the
    value that meets most of what is missing.

    Source: Cohen et al., "The AETG system", IEEE TSE 1997.
    """
    choices = {name: [(name, value) for value in values] for name, values in factors.items()}
    missing = dict.fromkeys(
        frozenset(pair) for a, b in itertools.combinations(choices.values(), 2) for pair in itertools.product(a, b)
    )
    rows = []
    while missing:
        row = set(next(iter(missing)))
        for name, options in choices.items():
            if all(name != taken for taken, _ in row):
                row.add(max(options, key=lambda option: sum(frozenset((option, other)) in missing for other in row)))
        for pair in itertools.combinations(row, 2):
            missing.pop(frozenset(pair), None)
        rows.append({name: dict(row)[name] for name in choices})
    return tuple(rows)


def case_of(row: dict[str, Any], *, num_kv_heads: int) -> Case:
    """Returns the case of a row of `pairwise`, named after its values."""
    fields = {name: row[name] for name in FACTORS if name != "group"}
    name = "-".join(str(value) for value in row.values())
    return Case(name, row["group"] * num_kv_heads, num_kv_heads, **fields)
