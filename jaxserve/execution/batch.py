"""From a `StepPlan` to what the programs take: one flat int32 buffer a program, padded to its bucket.

One buffer, because each host-to-device transfer costs about as much as a small kernel; `PackedLayout` names its parts for the
host (views that are written) and for the trace (slices that are read). Floats and unsigned words travel as their bits.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxserve.execution.buckets import BackboneBucket, Ladder
from jaxserve.execution.struct import struct
from jaxserve.plan import SequencePlan, StepPlan
from kernels_pallas.paged_attention.api import RaggedBatch
from kernels_pallas.paged_attention.work import plan_ragged_batch

FROM_DEVICE = -1
"""In place of a token id: the token that the row sampled last, which the host may not know yet."""


class Field(NamedTuple):
    shape: tuple[int, ...]
    dtype: type[np.generic] = np.int32

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class PackedLayout:
    """Where each named part of one flat int32 buffer lies."""

    fields: dict[str, Field]

    @cached_property
    def size(self) -> int:
        return sum(field.size for field in self.fields.values())

    def host_views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Returns writable views of a numpy buffer, each in its own dtype."""
        views, start = {}, 0
        for name, field in self.fields.items():
            views[name] = buffer[start : start + field.size].view(field.dtype).reshape(field.shape)
            start += field.size
        return views

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """Returns the parts of a traced buffer."""
        parts, start = {}, 0
        for name, field in self.fields.items():
            part = lax.slice(buffer, (start,), (start + field.size,)).reshape(field.shape)
            parts[name] = part if field.dtype is np.int32 else lax.bitcast_convert_type(part, field.dtype)
            start += field.size
        return parts


@struct
class StepInputs:
    """What the backbone computes in one step.

    Attributes:
        tokens_T: token ids, or FROM_DEVICE.
        rows_T: row of each token; R for padding.
        positions_T: position of each token; -1 for padding.
        prompt_lens_T: length of the prompt of each token's sequence; 0 for padding.
        page_updates_U4: (group, row, index, page id) into the block tables; row R for padding.
        sampled_tokens_S, sampled_rows_S: where in T the hidden state of a sampling sequence lies, and its row (R: padding).
        ragged: the attention work.
    """

    tokens_T: jax.Array
    rows_T: jax.Array
    positions_T: jax.Array
    prompt_lens_T: jax.Array
    page_updates_U4: jax.Array
    sampled_tokens_S: jax.Array
    sampled_rows_S: jax.Array
    ragged: RaggedBatch


def backbone_layout(ladder: Ladder, bucket: BackboneBucket, num_groups: int) -> PackedLayout:
    """Returns the parts of a backbone's input."""
    num_tokens, num_sequences = bucket.num_tokens, ladder.num_sequences(bucket)
    return PackedLayout(
        {
            "tokens_T": Field((num_tokens,)),
            "rows_T": Field((num_tokens,)),
            "positions_T": Field((num_tokens,)),
            "prompt_lens_T": Field((num_tokens,)),
            "page_updates_U4": Field((num_groups * ladder.num_page_updates(bucket), 4)),
            "sampled_tokens_S": Field((num_sequences,)),
            "sampled_rows_S": Field((num_sequences,)),
            "rows_S": Field((num_sequences,)),
            "kv_lens_S": Field((num_sequences,)),
            "cu_q_lens_S1": Field((num_sequences + 1,)),
            "num_seqs_1": Field((1,)),
            "decode_items_W4": Field((ladder.num_decode_items(bucket), 4)),
            "decode_first_D1": Field((num_sequences + 1,)),
            "prefill_tiles_W4": Field((ladder.num_prefill_tiles(bucket), 4)),
        }
    )


def unpack_step_inputs(layout: PackedLayout, buffer: jax.Array) -> StepInputs:
    parts = layout.unpack(buffer)
    fields: dict[str, Any] = {name: parts.pop(name) for name in RaggedBatch._fields}
    return StepInputs(**parts, ragged=RaggedBatch(**fields))


def pack_backbone(
    plan: StepPlan, bucket: BackboneBucket, ladder: Ladder, views: dict[str, np.ndarray]
) -> list[SequencePlan]:
    """Writes a plan into a backbone's buffer and returns the sequences that sample, in order."""
    config = ladder.config
    num_tokens, sequences = plan.num_tokens, plan.sequences
    rows = np.array([s.row for s in sequences], np.int32)
    starts = np.array([s.start for s in sequences], np.int32)
    lens = np.array([s.num_tokens for s in sequences], np.int32)

    token_ids: list[int] = []
    for s in sequences:
        token_ids.extend(s.token_ids)
        if len(s.token_ids) < s.num_tokens:
            token_ids.append(FROM_DEVICE)
    views["tokens_T"][:num_tokens] = token_ids
    views["tokens_T"][num_tokens:] = 0
    views["rows_T"][:num_tokens] = np.repeat(rows, lens)
    views["rows_T"][num_tokens:] = config.max_num_seqs
    ends = np.cumsum(lens)
    views["positions_T"][:num_tokens] = np.arange(num_tokens) - np.repeat(ends - lens - starts, lens)
    views["positions_T"][num_tokens:] = -1
    views["prompt_lens_T"][:num_tokens] = np.repeat([s.num_prompt_tokens for s in sequences], lens)
    views["prompt_lens_T"][num_tokens:] = 0

    updates = views["page_updates_U4"]
    updates[:] = (0, config.max_num_seqs, 0, 0)
    if plan.page_updates:
        updates[: len(plan.page_updates)] = plan.page_updates

    sampling = [i for i, s in enumerate(sequences) if s.samples and s.pooling is None]
    views["sampled_tokens_S"][:] = 0
    views["sampled_rows_S"][:] = config.max_num_seqs
    views["sampled_tokens_S"][: len(sampling)] = ends[sampling] - 1
    views["sampled_rows_S"][: len(sampling)] = rows[sampling]

    num_sequences = ladder.num_sequences(bucket)
    plan_ragged_batch(
        rows,
        starts + lens,
        lens,
        num_seq_slots=num_sequences,
        num_decode_slots=num_sequences,
        max_decode_items=ladder.num_decode_items(bucket),
        max_prefill_tiles=ladder.num_prefill_tiles(bucket),
        split_size=config.split_size,
        query_tile=config.query_tile,
        out=RaggedBatch(**{name: views[name] for name in RaggedBatch._fields}),
    )
    return [sequences[i] for i in sampling]
