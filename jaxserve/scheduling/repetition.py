"""Whether an output goes round in circles: the rule behind `SamplingParams.repetition_detection`. Owns no state."""

from collections.abc import Sequence

from jaxserve.request import RepetitionDetection


def is_repeating(token_ids: Sequence[int], num_prompt_tokens: int, detection: RepetitionDetection) -> bool:
    """Whether the output ends with one pattern min_count times in a row. The prompt is no part of a repetition.

    Costs O(max_pattern_size * min_count), and a glance at max_pattern_size tokens while no pattern could end here.

    Args:
        token_ids: prompt and output.
    """
    low, high = max(1, detection.min_pattern_size), detection.max_pattern_size
    high = min(high, (len(token_ids) - num_prompt_tokens) // detection.min_count)
    if low > high:
        return False
    last = token_ids[-1]
    sizes = [size for size in range(low, high + 1) if token_ids[-1 - size] == last]
    if not sizes:
        return False
    backwards = token_ids[: -1 - high * detection.min_count : -1]
    agreements = _agreements(backwards, sizes[-1])
    return any(agreements[size] >= size * (detection.min_count - 1) for size in sizes)


def _agreements(tokens: Sequence[int], max_shift: int) -> list[int]:
    """Returns, by shift, for how many tokens from the start the sequence agrees with itself shifted: the Z array.

    A pattern of p tokens stands c times at the start where agreements[p] >= p * (c - 1): "abababc" has agreements[2] = 4, so
    "ab" stands there 3 times.

    Source: Gusfield, Algorithms on Strings, Trees and Sequences (1997), section 1.4.
    """
    agreements = [len(tokens)] + [0] * max_shift
    left = right = 0  # of the match that reaches farthest so far
    for shift in range(1, max_shift + 1):
        length = min(right - shift, agreements[shift - left]) if shift < right else 0
        while shift + length < len(tokens) and tokens[length] == tokens[shift + length]:
            length += 1
        agreements[shift] = length
        if shift + length > right:
            left, right = shift, shift + length
    return agreements
