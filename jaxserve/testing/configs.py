"""A small `ResolvedConfig` for tests of parts that need one and no engine."""

import dataclasses
from typing import Any

from jaxserve.config import ResolvedConfig
from jaxserve.execution.buckets import powers_of_two


def small_config(**changes: Any) -> ResolvedConfig:
    """Returns limits that make trouble soon; `changes` replaces fields, and buckets follow from the limits."""
    config = ResolvedConfig(
        model_name="test",
        platform="cpu",
        vocab_size=128,
        tensor_parallel_size=1,
        dtype="float32",
        kv_dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        page_size=8,
        num_pages=32,
        max_pages_per_seq=16,
        token_buckets=(),
        sequence_buckets=(),
        split_size=32,
        query_tile=8,
        max_decode_items=16,
        seed=0,
        max_logprobs=5,
        attention_backend="auto",
    )
    config = dataclasses.replace(config, **changes)
    if not config.token_buckets:
        config = dataclasses.replace(
            config,
            token_buckets=powers_of_two(min(16, config.max_num_batched_tokens), config.max_num_batched_tokens),
            sequence_buckets=powers_of_two(1, config.max_num_seqs),
            max_pages_per_seq=-(-config.max_model_len // config.page_size),
        )
    return config
