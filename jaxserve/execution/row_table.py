"""How each row samples, on the host: written at admission, gathered each step into what the head takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.config import ResolvedConfig
from jaxserve.execution.batch import Field, PackedLayout, plan_columns
from jaxserve.execution.logits import PROCESSED, RAW, SamplingInputs
from jaxserve.execution.row_state import ADMISSION_TOKENS, RowAdmission
from jaxserve.plan import Admission, RowSampling, SequencePlan
from jaxserve.request import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS

NumParams = Mapping[str, int]
"""Registered logits processors, in order: how many numbers each takes."""


def head_layout(num_sequences: int, processors: NumParams) -> PackedLayout:
    """Returns the parts of a head's input."""
    columns = {name: Field((num_sequences, *column.shape[1:]), column.dtype.type) for name, column in _columns(0).items()}
    for name, num_params in processors.items():
        columns |= {_params(name): Field((num_sequences, num_params), np.float32), _is_on(name): Field((num_sequences,))}
    return PackedLayout(
        {
            "rows_S": Field((num_sequences,)),
            "positions_S": Field((num_sequences,)),
            "is_masked_S": Field((num_sequences,)),
            "logprobs_S": Field((num_sequences,)),
            **columns,
        }
    )


def admission_layout() -> PackedLayout:
    """Returns the parts of the input of `row_state.admit`."""
    return PackedLayout(
        {
            "row_1": Field((1,)),
            "is_first_1": Field((1,)),
            "prompt_ids_C": Field((ADMISSION_TOKENS,)),
            "output_ids_C": Field((ADMISSION_TOKENS,)),
            "bias_ids_B": Field((MAX_LOGIT_BIAS,)),
            "bias_values_B": Field((MAX_LOGIT_BIAS,), np.float32),
            "picked_ids_I": Field((MAX_LOGPROB_TOKEN_IDS,)),
        }
    )


def unpack_sampling_inputs(
    layout: PackedLayout, buffer: jax.Array, processors: NumParams
) -> tuple[jax.Array, SamplingInputs]:
    """Returns (rows_S, the rest)."""
    parts: dict[str, Any] = layout.unpack(buffer)
    rows_S = parts.pop("rows_S")
    registered = tuple((parts.pop(_params(name)), parts.pop(_is_on(name))) for name in processors)
    return rows_S, SamplingInputs(**parts, processors=registered)


def unpack_admission(layout: PackedLayout, buffer: jax.Array) -> RowAdmission:
    return RowAdmission(**layout.unpack(buffer))


class RowTable:
    """What stays with a row from admission on, as numpy columns."""

    def __init__(self, config: ResolvedConfig):
        self._vocab_size = config.vocab_size
        self._padding_row = config.max_num_seqs
        self._columns = _columns(config.max_num_seqs)
        self._processors = {
            name: (np.zeros((config.max_num_seqs, num_params), np.float32), np.zeros(config.max_num_seqs, np.int32))
            for name, num_params in config.logits_processors
        }
        self._allowed_RW: dict[int, np.ndarray] = {}
        self._picked: dict[int, tuple[int, ...]] = {}

    def admit(self, admission: Admission) -> None:
        row, sampling = admission.row, admission.sampling
        values = (
            *sampling[: RowSampling._fields.index("logit_bias")],
            bool(sampling.logit_bias),
            bool(sampling.logprob_token_ids),
        )
        for column, value in zip(self._columns.values(), values, strict=True):
            column[row] = value
        given = dict(sampling.processors)
        for name, (params, is_on) in self._processors.items():
            is_on[row] = name in given
            params[row] = given.get(name, 0)
        self._picked.pop(row, None)
        if sampling.logprob_token_ids:
            self._picked[row] = sampling.logprob_token_ids
        self._allowed_RW.pop(row, None)
        if sampling.allowed_token_ids is not None:
            self._allowed_RW[row] = _words(sampling.allowed_token_ids, self._vocab_size)

    def picked_ids(self, row: int) -> tuple[int, ...]:
        """Returns the tokens whose log-probabilities a row asks for in place of the most likely ones'."""
        return self._picked.get(row, ())

    def pack_head(self, sampling: Sequence[SequencePlan], views: dict[str, np.ndarray], masked: Sequence[int] = ()) -> None:
        """Writes the rows that sample into a head's buffer; padding is greedy and wants nothing.

        Args:
            masked: indices into `sampling` of those that may not sample every token.
        """
        count = len(sampling)
        columns = plan_columns(sampling)
        rows, starts, lens = (np.array(columns[name], np.int32) for name in ("row", "start", "num_tokens"))
        views["rows_S"][:count] = rows
        views["rows_S"][count:] = self._padding_row
        views["positions_S"][:count] = starts + lens
        views["is_masked_S"][:] = 0
        if masked:
            views["is_masked_S"][masked] = 1
        views["logprobs_S"][:] = 0
        if columns["num_logprobs"].count(None) < count:
            views["logprobs_S"][:count] = [
                0 if number is None else PROCESSED if is_processed else RAW
                for number, is_processed in zip(columns["num_logprobs"], columns["is_processed"], strict=True)
            ]
        for name, column in self._columns.items():
            views[name][:count] = column[rows]
            views[name][count:] = _NEUTRAL[name]
        for name, (params, is_on) in self._processors.items():
            views[_params(name)][:count] = params[rows]
            views[_is_on(name)][:count] = is_on[rows]
            views[_is_on(name)][count:] = 0

    def pack_allowed(
        self, sampling: Sequence[SequencePlan], num_sequences: int, constrained: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[int]] | None:
        """Returns uint32 mask words [S, ceil(V / 32)] and who is masked, or None when every token of every row is allowed.

        Args:
            constrained: words of rows whose allowed tokens follow from the tokens before, by request.
        """
        masked = [
            index
            for index, s in enumerate(sampling)
            if s.forbidden or s.row in self._allowed_RW or s.request_id in constrained
        ]
        if not masked:
            return None
        words = np.full((num_sequences, -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for index in masked:
            s = sampling[index]
            if s.row in self._allowed_RW:
                words[index] &= self._allowed_RW[s.row]
            if s.request_id in constrained:
                words[index] &= constrained[s.request_id]
            if s.forbidden:
                rest = words[index] & ~_words(s.forbidden, self._vocab_size)
                if s.request_id not in constrained or rest.any():  # min_tokens yields to a form that is complete
                    words[index] = rest
        return words, masked


def admission_parts(admission: Admission, vocab_size: int) -> Iterator[dict[str, Any]]:
    """Yields what `row_state.admit` is to be told of an admission, a call each; nothing where it needs no telling."""
    sampling = admission.sampling
    if not (sampling.has_penalties or sampling.logit_bias or sampling.logprob_token_ids):
        return
    prompt, output = admission.prompt_token_ids, admission.output_token_ids
    prompts = [prompt[i : i + ADMISSION_TOKENS] for i in range(0, len(prompt), ADMISSION_TOKENS)] or [()]
    outputs = [output[i : i + ADMISSION_TOKENS] for i in range(0, len(output), ADMISSION_TOKENS)]
    calls = [(part, ()) for part in prompts] + [((), part) for part in outputs]
    bias_ids = [token_id for token_id, _ in sampling.logit_bias]
    for index, (prompt_part, output_part) in enumerate(calls):
        yield {
            "row_1": admission.row,
            "is_first_1": index == 0,
            "prompt_ids_C": _padded(prompt_part, ADMISSION_TOKENS, vocab_size),
            "output_ids_C": _padded(output_part, ADMISSION_TOKENS, vocab_size),
            "bias_ids_B": _padded(bias_ids, MAX_LOGIT_BIAS, vocab_size),
            "bias_values_B": _padded([value for _, value in sampling.logit_bias], MAX_LOGIT_BIAS, 0.0),
            "picked_ids_I": _padded(sampling.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS, vocab_size),
        }


def _columns(num_rows: int) -> dict[str, np.ndarray]:
    """Returns the columns in the order of RowSampling's fields, up to its bias, and what is left of the others."""
    return {
        "temperature_S": np.zeros(num_rows, np.float32),
        "top_k_S": np.zeros(num_rows, np.int32),
        "top_p_S": np.ones(num_rows, np.float32),
        "min_p_S": np.zeros(num_rows, np.float32),
        "keys_S2": np.zeros((num_rows, 2), np.uint32),
        "repetition_S": np.ones(num_rows, np.float32),
        "frequency_S": np.zeros(num_rows, np.float32),
        "presence_S": np.zeros(num_rows, np.float32),
        "has_bias_S": np.zeros(num_rows, np.int32),
        "picks_S": np.zeros(num_rows, np.int32),
    }


_NEUTRAL = {name: column[0] for name, column in _columns(1).items()}


def _words(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    for token_id in token_ids:
        words[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return words


def _padded(values: Sequence[Any], length: int, padding: Any) -> list[Any]:
    return [*values, *[padding] * (length - len(values))]


def _params(name: str) -> str:
    return f"{name} parameters"


def _is_on(name: str) -> str:
    return f"{name} is on"
