"""What the parts run: at full size, for one GPU of 80 GB or more, and small, for a CPU."""

import dataclasses
from typing import Any

from benchmarks.gpu import attention, engine
from jaxserve.testing.released import LLAMA_8B


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of every part.

    Attributes:
        ceilings: arguments of `ceilings.measure`.
        num_numerics_rows: cases of attention that are checked, None for all.
        case_name: the model whose attention is timed, of `kernels_pallas.paged_attention.cases`.
        counts: tokens that are written, and rows that are sampled, at once.
        vocab_size: of these rows.
    """

    ceilings: dict[str, int]
    num_numerics_rows: int | None
    case_name: str
    attention: attention.Sizes
    counts: tuple[int, ...]
    vocab_size: int
    engine: engine.Sizes


_CONTEXTS = (512, 2048, 8192, 32768)
_SMALL_MODEL: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}

FULL = Sizes(
    ceilings={"num_bytes": 2 << 30, "matrix_size": 8192, "num_calls": 20},
    num_numerics_rows=None,
    case_name="llama3-8b",
    attention=attention.Sizes(
        decodes=tuple((count, context) for count in (1, 8, 32, 64, 128, 256) for context in _CONTEXTS),
        prefills=(1024, 8192, 32768),
        beside=((1, 32768), (32, 2048), (128, 2048), 8192),
        tuned=((64, 2048), 8192),
    ),
    counts=(1, 64, 256),
    vocab_size=128256,
    engine=engine.Sizes(
        config=LLAMA_8B,
        dtype="bfloat16",
        batches=(1, 8, 32, 64, 128, 256),
        short_output=32,
        output=160,
        prompt=128,
        workload=(256, 1024, 1024),
        long_prompt=32768,
        # Few buckets, all of them used: each is a program of 32 layers that has to be compiled.
        options={
            "max_num_seqs": 256,
            "max_model_len": 33024,
            "max_num_batched_tokens": 8192,
            "sequence_buckets": (1, 8, 32, 64, 128, 256),
            "token_buckets": (1024, 8192),
        },
    ),
)
SMALL = Sizes(
    ceilings={"num_bytes": 1 << 22, "matrix_size": 128, "num_calls": 2},
    num_numerics_rows=3,
    case_name="gpt2-125m",
    attention=attention.Sizes(
        decodes=((1, 64), (4, 200)),
        prefills=(96,),
        beside=((1, 64), 96),
        tuned=((1, 64), 96),
        l2_bytes=1 << 18,
        pool_bytes=1 << 24,
        num_calls=2,
    ),
    counts=(1, 8),
    vocab_size=1000,
    engine=engine.Sizes(
        config=_SMALL_MODEL,
        dtype="float32",
        batches=(1, 4),
        short_output=4,
        output=12,
        prompt=16,
        workload=(6, 24, 8),
        long_prompt=200,
        options={
            "max_num_seqs": 8,
            "max_model_len": 256,
            "max_num_batched_tokens": 64,
            "num_pages": 64,
            "page_size": 16,
            "sequence_buckets": (8,),
            "token_buckets": (64,),
        },
    ),
)
