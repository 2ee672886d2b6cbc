"""The toy model: its next token can be computed by hand, and is computed through the paged cache.

    next = 32 + (7 * length of the context + sum over its positions j of ((j mod 31) + 1) * token_j) mod 95

Each step writes its tokens, as they are, into the pages and reads the whole context back through the block table; a
page in the wrong place, or a stale one, gives a wrong and predictable number. The weights by position catch swapped
pages too. The sum stays an exact float32: (31 * 127 + 7) * 4096 < 2**24. The length is in it because otherwise token 95
would change nothing and repeat for ever.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.attention import PagedCache
from jaxserve.models.model import ModelContext, ServedParams
from jaxserve.models.weights import Parameter
from jaxserve.plan import KVSpec
from sharding.mesh import TensorParallelism
from sharding.rules import spec_for

VOCAB_SIZE = 128
MAX_MODEL_LEN = 4096
WEIGHT_PERIOD, LENGTH_WEIGHT = 31, 7
FIRST_PRINTABLE, NUM_PRINTABLE = 32, 95


def next_token(context: Sequence[int]) -> int:
    """Returns what the toy model says after these tokens."""
    total = sum((position % WEIGHT_PERIOD + 1) * token for position, token in enumerate(context))
    return FIRST_PRINTABLE + (total + LENGTH_WEIGHT * len(context)) % NUM_PRINTABLE


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Returns the toy model's next `num_tokens` tokens."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


class Toy:
    """See the module docstring; implements `jaxserve.models.model.Model`. Its one parameter is a scale of 1."""

    vocab_size = VOCAB_SIZE
    max_model_len = MAX_MODEL_LEN
    hidden_size = VOCAB_SIZE
    num_heads = 1
    dtype = jnp.float32
    is_float32_only = True
    reads_prompt_len = False

    def __init__(self, parallel: TensorParallelism):
        self.parallel = self.trace_key = parallel

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], size: int, dtype: Any) -> "Toy":
        del config, dtype
        return cls(TensorParallelism.of(size, 1))

    @staticmethod
    def sizes_for(config: Mapping[str, Any], limit: int) -> tuple[int, ...]:
        del config, limit
        return (1,)

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("scale", (1,), (None,)),)

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return (KVSpec("full", num_kv_heads=1, head_dim=1),)

    def served_layout(self, leaves: Mapping[str, jax.Array]) -> ServedParams:
        return (leaves["scale"],)

    def served_specs(self) -> Any:
        return (spec_for((None,)),)

    def backbone(
        self, params: ServedParams, tokens_T: jax.Array, positions_T: jax.Array, cache: PagedCache, ctx: ModelContext
    ) -> jax.Array:
        values_TKH = tokens_T.astype(jnp.float32)[:, None, None]
        cache.write(0, values_TKH, values_TKH)
        pages_GZ = cache.v_pages[0][:, 0, :, 0]
        table_RP = cache.block_tables[0]
        rows_T = jnp.minimum(cache.rows_T, table_RP.shape[0] - 1)
        context_TC = pages_GZ[table_RP[rows_T]].reshape(tokens_T.shape[0], -1)
        places_1C = jnp.arange(context_TC.shape[1])[None, :]
        weights_1C = (places_1C % WEIGHT_PERIOD + 1).astype(jnp.float32)
        is_seen_TC = places_1C <= positions_T[:, None]
        total_T = jnp.sum(jnp.where(is_seen_TC, context_TC * weights_1C, 0.0), axis=-1) * params[0]
        total_T = total_T + LENGTH_WEIGHT * (positions_T + 1).astype(jnp.float32)
        answer_T = FIRST_PRINTABLE + jnp.mod(total_T, NUM_PRINTABLE).astype(jnp.int32)
        return jax.nn.one_hot(answer_T, VOCAB_SIZE, dtype=jnp.float32)

    def final_norm(self, params: ServedParams, hidden_TD: jax.Array) -> jax.Array:
        del params
        return hidden_TD

    def logits(self, params: ServedParams, hidden_SD: jax.Array, ctx: ModelContext) -> jax.Array:
        del params, ctx
        return hidden_SD * 10.0
