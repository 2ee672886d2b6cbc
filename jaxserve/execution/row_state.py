"""What the device keeps of each row between steps for the sake of sampling: counted tokens, bias, tokens to report.

Written when a request is admitted that uses any of it; the head counts each token that it samples. Donated to each head.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ResolvedConfig
from jaxserve.execution.struct import Leaf, struct
from jaxserve.request import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS

ADMISSION_TOKENS = 1024
"""Prompt and output tokens that one call of `admit` counts."""


@struct
class RowState:
    """See the module docstring; a row that nobody has written since its admission means nothing, and nobody reads it.

    Attributes:
        counts_RV: twice how often the output holds a token, and 1 more where the prompt does.
        bias_ids_RB: token ids; V where unused.
        bias_values_RB: float32.
        picked_ids_RI: tokens whose log-probabilities are reported.
    """

    counts_RV: Leaf
    bias_ids_RB: Leaf
    bias_values_RB: Leaf
    picked_ids_RI: Leaf


@struct
class RowAdmission:
    """One row's new owner, or more tokens of it.

    Attributes:
        row_1: the row.
        is_first_1: 1 in the first call for an owner, which forgets the one before.
        prompt_ids_C, output_ids_C: tokens to count; V for padding. Output begins where the prompt has ended.
        bias_ids_B, bias_values_B, picked_ids_I: as in RowState; read in the first call.
    """

    row_1: jax.Array
    is_first_1: jax.Array
    prompt_ids_C: jax.Array
    output_ids_C: jax.Array
    bias_ids_B: jax.Array
    bias_values_B: jax.Array
    picked_ids_I: jax.Array


def row_state_specs() -> RowState:
    return RowState(*(PartitionSpec(),) * 4)


def row_state_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Returns what the state takes on each device [bytes]."""
    return 4 * max_num_seqs * (vocab_size + 2 * MAX_LOGIT_BIAS + MAX_LOGPROB_TOKEN_IDS)


def abstract_row_state(config: ResolvedConfig, mesh: Mesh) -> RowState:
    """Returns shapes, dtypes and shardings."""

    def replicated(width: int, dtype: type = jnp.int32) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((config.max_num_seqs, width), dtype, sharding=sharding)

    return RowState(
        counts_RV=replicated(config.vocab_size),
        bias_ids_RB=replicated(MAX_LOGIT_BIAS),
        bias_values_RB=replicated(MAX_LOGIT_BIAS, jnp.float32),
        picked_ids_RI=replicated(MAX_LOGPROB_TOKEN_IDS),
    )


def admit(state: RowState, admission: RowAdmission) -> RowState:
    """Writes one row; a prompt longer than a call's room comes in several."""
    row = admission.row_1[0]
    fresh = jnp.where(admission.is_first_1[0] > 0, row, state.counts_RV.shape[0])  # past the end: dropped
    counts_RV = state.counts_RV.at[fresh].set(0, mode="drop")
    counts_RV = counts_RV.at[row, admission.prompt_ids_C].max(1, mode="drop")
    counts_RV = counts_RV.at[row, admission.output_ids_C].add(2, mode="drop")
    return RowState(
        counts_RV,
        state.bias_ids_RB.at[fresh].set(admission.bias_ids_B, mode="drop"),
        state.bias_values_RB.at[fresh].set(admission.bias_values_B, mode="drop"),
        state.picked_ids_RI.at[fresh].set(admission.picked_ids_I, mode="drop"),
    )
