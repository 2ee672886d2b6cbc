"""What a step's programs give back, read into plain numbers."""

from collections.abc import Sequence

import numpy as np

from jaxserve.execution.sampling import Sampled
from jaxserve.execution.scores import Scores
from jaxserve.outputs import TokenScores
from jaxserve.plan import SampledToken, SequencePlan
from jaxserve.request import ALL_LOGPROBS


def sampled_tokens(sampled: Sampled, group: Sequence[SequencePlan], picked: Sequence[tuple[int, ...]]) -> list[SampledToken]:
    """Returns the token of each sequence of a head's group, with the log-probabilities that it asks for."""
    token_ids = np.asarray(sampled.tokens_S)[: len(group)].tolist()
    wanted = [s.num_logprobs for s in group]
    return list(map(SampledToken, token_ids, read_scores(sampled.scores, wanted, picked)))


def read_scores(scores: Scores, wanted: Sequence[int | None], picked: Sequence[tuple[int, ...]]) -> list[TokenScores | None]:
    """Returns what is wanted of each row.

    Args:
        scores: of at least as many rows.
        wanted: most likely tokens a row; None for nothing, ALL_LOGPROBS for the whole vocabulary.
        picked: tokens a row that stand in place of the most likely ones; empty for those.
    """
    if all(count is None for count in wanted):
        return [None] * len(wanted)
    has_all, has_picked = ALL_LOGPROBS in wanted, any(picked)
    logprobs, ranks = np.asarray(scores.logprobs_S).tolist(), np.asarray(scores.ranks_S).tolist()
    top_ids, top_logprobs = np.asarray(scores.top_ids_SQ), np.asarray(scores.top_logprobs_SQ)
    picked_scores = (np.asarray(scores.picked_logprobs_SI), np.asarray(scores.picked_ranks_SI)) if has_picked else None
    all_SV = np.asarray(scores.all_SV) if has_all else None
    results: list[TokenScores | None] = []
    for row, (count, ids) in enumerate(zip(wanted, picked, strict=True)):
        if count is None:
            results.append(None)
        elif count == ALL_LOGPROBS:
            assert all_SV is not None
            results.append(TokenScores(logprobs[row], ranks[row], all_logprobs=all_SV[row].copy()))
        elif ids:
            assert picked_scores is not None
            values, places = (tuple(column[row, : len(ids)].tolist()) for column in picked_scores)
            results.append(TokenScores(logprobs[row], ranks[row], ids, values, places))
        else:
            top = tuple(top_ids[row, :count].tolist()), tuple(top_logprobs[row, :count].tolist())
            results.append(TokenScores(logprobs[row], ranks[row], *top))
    return results
