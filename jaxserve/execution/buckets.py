"""The ladder: the few shapes that steps are padded to. The compile key is a bucket and nothing else."""

from bisect import bisect_left
from dataclasses import dataclass

from jaxserve.config import ResolvedConfig
from kernels_pallas.paged_attention.work import num_prefill_tiles

MAX_SCORED_BYTES = 64 << 20
"""Of float32 logits that one call of the score program makes."""

MAX_SCORED_ROWS = 128

MAX_FULL_ROWS = 4
"""Rows of the head that gives the whole vocabulary's log-probabilities, if the ladder has one as small."""


@dataclass(frozen=True, slots=True, order=True)
class BackboneBucket:
    """A shape of the backbone program.

    Attributes:
        num_tokens: T.
        is_decode: every sequence has one token; no prefill code is in the program.
    """

    num_tokens: int
    is_decode: bool


@dataclass(frozen=True, slots=True)
class Ladder:
    """All buckets of an engine; one program each."""

    config: ResolvedConfig

    def backbones(self) -> tuple[BackboneBucket, ...]:
        decode = [BackboneBucket(n, True) for n in self.config.sequence_buckets]
        mixed = [BackboneBucket(n, False) for n in self.config.token_buckets]
        return tuple(sorted(decode + mixed))

    def backbone_for(self, num_tokens: int, is_decode: bool) -> BackboneBucket:
        sizes = self.config.sequence_buckets if is_decode else self.config.token_buckets
        return BackboneBucket(sizes[bisect_left(sizes, num_tokens)], is_decode)

    def heads(self) -> tuple[int, ...]:
        return self.config.sequence_buckets

    def head_for(self, num_sequences: int) -> int:
        sizes = self.config.sequence_buckets
        return sizes[bisect_left(sizes, num_sequences)]

    @property
    def full_head(self) -> int:
        """Rows of the head that gives the whole vocabulary's log-probabilities too."""
        sizes = self.config.sequence_buckets
        return max((size for size in sizes if size <= MAX_FULL_ROWS), default=sizes[0])

    @property
    def num_scored(self) -> int:
        """Tokens that one call of the score program scores: their logits are bounded, whatever the vocabulary."""
        return num_scored_tokens(self.config.vocab_size, self.config.max_num_batched_tokens)

    def num_sequences(self, bucket: BackboneBucket) -> int:
        """Returns most sequences a bucket holds."""
        return min(bucket.num_tokens, self.config.max_num_seqs)

    def num_decode_items(self, bucket: BackboneBucket) -> int:
        """Returns most decode work items: each sequence may need its share of the longest context, up to the budget."""
        longest = -(-self.config.max_model_len // self.config.split_size)
        return min(self.num_sequences(bucket) * longest, self.config.max_decode_items)

    def num_prefill_tiles(self, bucket: BackboneBucket) -> int:
        """Returns most prefill tiles: full ones, and a ragged one a sequence of at least two tokens."""
        if bucket.is_decode:
            return 0
        ragged = min(self.num_sequences(bucket), bucket.num_tokens // 2)
        return num_prefill_tiles(bucket.num_tokens, self.config.query_tile) + ragged

    def num_page_updates(self, bucket: BackboneBucket) -> int:
        """Returns most block table entries a step can begin to use, a group.

        One a page of tokens, one a sequence, and what the prefix cache may give in one step.
        """
        return bucket.num_tokens // self.config.page_size + self.num_sequences(bucket) + self.config.max_cached_pages


def powers_of_two(low: int, high: int, factor: int = 2) -> tuple[int, ...]:
    """Returns low, low * factor, ... and high."""
    sizes = []
    size = low
    while size < high:
        sizes.append(size)
        size *= factor
    return (*sizes, high)


def num_scored_tokens(vocab_size: int, max_num_batched_tokens: int) -> int:
    """Returns the largest power of two, within limits, whose logits stay below MAX_SCORED_BYTES."""
    limit = max(1, min(MAX_SCORED_BYTES // (4 * vocab_size), MAX_SCORED_ROWS, max_num_batched_tokens))
    return 1 << (limit.bit_length() - 1)
