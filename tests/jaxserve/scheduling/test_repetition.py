"""is_repeating against the definition itself, written down naively."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.request import RepetitionDetection
from jaxserve.scheduling.repetition import is_repeating


def by_definition(output, detection):
    for size in range(max(1, detection.min_pattern_size), detection.max_pattern_size + 1):
        span = size * detection.min_count
        if span <= len(output) and output[-span:] == output[-size:] * detection.min_count:
            return True
    return False


@st.composite
def detections(draw):
    size = draw(st.integers(0, 9))
    return RepetitionDetection(
        max_pattern_size=size, min_pattern_size=draw(st.integers(0, size)), min_count=draw(st.integers(2, 4))
    )


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 1), max_size=12),
    start=st.lists(st.integers(0, 2), max_size=8),
    pattern=st.lists(st.integers(0, 2), max_size=6),
    count=st.integers(0, 6),
    cut=st.integers(0, 5),
    detection=detections(),
)
@example(prompt=[], start=[], pattern=[1], count=2, cut=0, detection=RepetitionDetection(max_pattern_size=1))
def test_equals_the_definition(prompt, start, pattern, count, cut, detection):
    """Few different tokens and a pattern that may be cut: about half of the cases repeat, by chance or not."""
    output = start + pattern * count
    output = output[: len(output) - cut] if cut else output
    expected = by_definition(output, detection)
    assert is_repeating(prompt + output, len(prompt), detection) is expected


@pytest.mark.parametrize(
    ("output", "detection", "expected"),
    [
        ([1, 2, 3, 1, 2, 3], {"max_pattern_size": 3}, True),
        ([1, 2, 3, 1, 2, 3], {"max_pattern_size": 2}, False),
        ([1, 2, 3, 1, 2, 3], {"max_pattern_size": 3, "min_count": 3}, False),
        ([7, 7, 7], {"max_pattern_size": 5, "min_count": 3}, True),
        ([7, 7, 7, 7], {"max_pattern_size": 5, "min_pattern_size": 2}, True),
        ([7, 7, 7], {"max_pattern_size": 5, "min_pattern_size": 2}, False),
        ([7, 7], {}, False),
        ([], {"max_pattern_size": 5}, False),
    ],
)
def test_by_hand(output, detection, expected):
    assert is_repeating(tuple(output), 0, RepetitionDetection(**detection)) is expected


def test_the_prompt_is_no_part_of_a_repetition():
    detection = RepetitionDetection(max_pattern_size=2, min_count=3)
    tokens = [1, 2] * 3
    assert is_repeating(tokens, 0, detection)
    assert not is_repeating(tokens, 1, detection)


class Counting(list):
    """Counts how often a token is looked at; a slice counts its length."""

    num_looks = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        Counting.num_looks += len(found) if isinstance(index, slice) else 1
        return Counting(found) if isinstance(index, slice) else found


def test_the_cost_of_a_near_miss_is_linear():
    """Every size looks like a pattern until late: comparing each by itself would take 256 * 512 looks."""
    detection = RepetitionDetection(max_pattern_size=512, min_count=4)
    tokens = Counting([7] * 3000 + [8] + [7] * 300)
    Counting.num_looks = 0
    assert not is_repeating(tokens, 0, RepetitionDetection(max_pattern_size=512, min_pattern_size=301, min_count=4))
    assert Counting.num_looks < 6 * detection.max_pattern_size * detection.min_count
