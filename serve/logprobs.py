"""Which of a token's log-probabilities a client asked for."""

from jaxserve.outputs import Logprob, TokenLogprobs


def most_likely(entries: TokenLogprobs, num_logprobs: int) -> list[tuple[int, Logprob]]:
    """The num_logprobs most likely tokens by rank, the most likely one first.

    entries has the chosen token besides the most likely ones: with num_logprobs = 2 and a chosen token of rank 7 it has three.
    """
    ranked = sorted(entries.items(), key=lambda item: item[1].rank)
    return [item for item in ranked if item[1].rank <= num_logprobs][:num_logprobs]
