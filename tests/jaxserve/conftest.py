"""Engines that several test files share, each compiled once a run."""

import pytest

from jaxserve import LLM
from jaxserve.testing.tiny_checkpoint import TinyLlama, write_tiny_llama

TINY = TinyLlama(vocab_size=320, seed=1, tokenizer="bytes", max_position_embeddings=256)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A tiny random Llama in Hugging Face form, with a byte tokenizer."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"), TINY)


@pytest.fixture(scope="session")
def tiny_llm(tiny_dir):
    """Eight rows on a pool that holds one long request and not eight, chunks of at most 64 tokens.

    At the end it must not have compiled anything since it was ready, nor lost a page.
    """
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "page_size": 8, "num_pages": 48, "sequence_buckets": (1, 8)}
    with LLM(str(tiny_dir), use_tqdm=False, **limits) as llm:
        yield llm
        stats = llm.stats()
        assert stats.num_compilations_since_ready == 0
        assert stats.num_free_pages == stats.num_pages
