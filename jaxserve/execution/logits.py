"""What is done to logits before a token is chosen: masks, bias, penalties, and the functions that an engine was started with.

In vLLM's order (`docs/compatibility.md`). Each part sits under a condition on the batch, so that it costs nothing where nobody
asks for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.execution.row_state import RowState
from jaxserve.execution.struct import Leaf, struct


@struct
class SamplingInputs:
    """How each row samples.

    Attributes:
        positions_S: position of the token to be sampled; with the key it decides the random number.
        temperature_S, top_k_S, top_p_S, min_p_S: as in SamplingParams; top_k 0 keeps all.
        keys_S2: two words of the request's key.
        repetition_S, frequency_S, presence_S: penalties.
        is_masked_S: 1 where some token is not allowed.
        has_bias_S: 1 where the row has a bias.
        logprobs_S: 0 for no log-probabilities, RAW or PROCESSED.
        picks_S: 1 where given tokens' log-probabilities are asked for.
        processors: (parameters [S, P], 1 where it applies [S]) of each registered processor.
    """

    positions_S: Leaf
    temperature_S: Leaf
    top_k_S: Leaf
    top_p_S: Leaf
    min_p_S: Leaf
    keys_S2: Leaf
    repetition_S: Leaf
    frequency_S: Leaf
    presence_S: Leaf
    is_masked_S: Leaf
    has_bias_S: Leaf
    logprobs_S: Leaf
    picks_S: Leaf
    processors: tuple[tuple[Leaf, Leaf], ...] = ()

    @property
    def has_penalties_S(self) -> jax.Array:
        return (self.repetition_S != 1.0) | (self.frequency_S != 0.0) | (self.presence_S != 0.0)


RAW, PROCESSED = 1, 2


class LogitsFunction(Protocol):
    """A pure JAX function of logits; called per device with whole rows, traced once a program.

    Its result in a row must depend on that row alone, so that a request's tokens do not depend on its neighbours.
    """

    def __call__(self, logits_SV: jax.Array, params_SP: jax.Array, positions_S: jax.Array, /) -> jax.Array:
        """Returns float32 [S, V].

        Args:
            logits_SV: float32, after masks, bias and penalties, before temperature; -inf where a token is not allowed.
            params_SP: float32, what the request gives it (`SamplingParams.extra_args`).
            positions_S: position of the token to be sampled.
        """
        ...


@dataclass(frozen=True, slots=True)
class LogitsProcessor:
    """A function on logits that requests use by name.

    Attributes:
        name: the key in `SamplingParams.extra_args`.
        function: see `LogitsFunction`.
        num_params: numbers that a request gives it.
    """

    name: str
    function: LogitsFunction
    num_params: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the head's rows find what the device keeps of them."""

    state: RowState
    rows_S: jax.Array


def expand_mask(words_SW: jax.Array, vocab_size: int) -> jax.Array:
    """Returns booleans [S, vocab_size]: bit t % 32 of word t // 32."""
    bits = (words_SW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & jnp.uint32(1)
    return bits.reshape(words_SW.shape[0], -1)[:, :vocab_size].astype(bool)


def is_adjusted(inputs: SamplingInputs) -> jax.Array:
    """Returns whether any row's logits are changed by `adjust`."""
    is_adjusted_S = (inputs.is_masked_S > 0) | (inputs.has_bias_S > 0) | inputs.has_penalties_S
    for _, is_on_S in inputs.processors:
        is_adjusted_S |= is_on_S > 0
    return jnp.any(is_adjusted_S)


def adjust(
    raw_SV: jax.Array, allowed_SW: jax.Array, inputs: SamplingInputs, rows: Rows, processors: Sequence[LogitsProcessor]
) -> jax.Array:
    """Returns the logits that temperature and truncation begin with."""
    logits_SV = jnp.where(expand_mask(allowed_SW, raw_SV.shape[-1]), raw_SV, -jnp.inf)
    logits_SV = _where(inputs.has_bias_S > 0, lambda x: _biased(x, rows), logits_SV)
    logits_SV = _where(inputs.has_penalties_S, lambda x: _penalised(x, inputs, rows), logits_SV)
    for processor, (params_SP, is_on_S) in zip(processors, inputs.processors, strict=True):

        def apply(x: jax.Array, processor: LogitsProcessor = processor, params_SP: jax.Array = params_SP) -> jax.Array:
            return processor.function(x, params_SP, inputs.positions_S).astype(jnp.float32)

        logits_SV = _where(is_on_S > 0, apply, logits_SV)
    return logits_SV


def _where(is_on_S: jax.Array, change: Callable[[jax.Array], jax.Array], logits_SV: jax.Array) -> jax.Array:
    """Returns changed logits in the rows where it is on; computes nothing where it is on nowhere."""
    return lax.cond(jnp.any(is_on_S), lambda x: jnp.where(is_on_S[:, None], change(x), x), lambda x: x, logits_SV)


def _biased(logits_SV: jax.Array, rows: Rows) -> jax.Array:
    ids_SB, values_SB = rows.state.bias_ids_RB[rows.rows_S], rows.state.bias_values_RB[rows.rows_S]
    return logits_SV.at[jnp.arange(len(logits_SV))[:, None], ids_SB].add(values_SB, mode="drop")


def _penalised(logits_SV: jax.Array, inputs: SamplingInputs, rows: Rows) -> jax.Array:
    """Repetition over prompt and output, then frequency and presence over the output alone."""
    counts_SV = rows.state.counts_RV[rows.rows_S]
    factor_S = inputs.repetition_S[:, None]
    repeated_SV = jnp.where(logits_SV > 0, logits_SV / factor_S, logits_SV * factor_S)
    logits_SV = jnp.where(counts_SV > 0, repeated_SV, logits_SV)
    times_SV = (counts_SV >> 1).astype(jnp.float32)
    logits_SV = logits_SV - inputs.frequency_S[:, None] * times_SV
    return logits_SV - inputs.presence_S[:, None] * jnp.minimum(times_SV, 1.0)
