"""How much memory of the host one request's results can take at most: the documented formula, known before it starts."""

from jaxserve.request import ALL_LOGPROBS, SamplingParams

TOKEN_BYTES = 512
"""A generated token's id and text, as a result and on their way there."""

ENTRY_BYTES = 320
"""One token's log-probability at one place: id, number, rank, text, and its share of the dict."""

PLACE_BYTES = 512
"""What a place has besides its entries: the dict itself, the arrays that came from the device."""


def peak_host_bytes(num_prompt_tokens: int, num_output_tokens: int, sampling: SamplingParams, vocab_size: int) -> int:
    """Returns the most bytes that one completion's results take until their reader has let go of them.

        prompt + output, where
        output = num_output_tokens * (512 + scores(logprobs))
        prompt = num_prompt_tokens * scores(prompt_logprobs)
        scores(None) = 0, scores(-1) = 4 * vocab_size + 512, scores(k) = 320 * (k + 1) + 512

    The second term of the whole vocabulary's case is an array of float32; texts of tokens are made when they are read.

    Args:
        num_output_tokens: most that can be generated.
    """
    num_picked = None if sampling.logprob_token_ids is None else len(sampling.logprob_token_ids)
    width = sampling.logprobs if num_picked is None else num_picked
    output_bytes = num_output_tokens * (TOKEN_BYTES + _score_bytes(width, vocab_size))
    return output_bytes + num_prompt_tokens * _score_bytes(sampling.prompt_logprobs, vocab_size)


def _score_bytes(num_logprobs: int | None, vocab_size: int) -> int:
    if num_logprobs is None:
        return 0
    if num_logprobs == ALL_LOGPROBS:
        return 4 * vocab_size + PLACE_BYTES
    return ENTRY_BYTES * (num_logprobs + 1) + PLACE_BYTES
