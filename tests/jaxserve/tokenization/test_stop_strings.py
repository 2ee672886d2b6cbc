"""Stop strings against a brute-force search, over all ways to cut the text."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.tokenization.stop_strings import StopChecker

# Two letters, so that strings overlap themselves and each other.
LETTERS = st.text("ab", max_size=14)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
PROPERTY = settings(max_examples=150, deadline=None)


def first_match(text: str, stop: list[str], unchecked: int = 0) -> tuple[int, str] | None:
    """End and string of the match that ends first behind `unchecked` characters; the longest of several."""
    for end in range(unchecked + 1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return end, max(found, key=len)
    return None


def still_possible(text: str, stop: list[str]) -> int:
    """Length of the longest suffix that starts a stop string without being all of it."""
    starts = {s[:n] for s in stop for n in range(len(s))}
    return max(n for n in range(len(text) + 1) if text[len(text) - n :] in starts)


@PROPERTY
@given(text=LETTERS, stop=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 14), max_size=5))
def test_any_cut_gives_the_brute_force_result(text: str, stop: list[str], include: bool, cuts: list[int]):
    checker = StopChecker(stop, include_stop_str_in_output=include)
    bounds = [0, *sorted(cuts), len(text)]
    shown = "".join([checker.push(text[a:b]) for a, b in pairwise(bounds)]) + checker.flush()
    match = first_match(text, stop)
    if match is None:
        assert (shown, checker.matched) == (text, None)
    else:
        end, string = match
        assert (shown, checker.matched) == (text[:end] if include else text[: end - len(string)], string)


@PROPERTY
@given(text=LETTERS, stop=STOPS)
def test_exactly_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]):
    checker = StopChecker(stop)
    shown = ""
    for n, char in enumerate(text, 1):
        shown += checker.push(char)
        if checker.matched is not None:
            return
        assert len(shown) == n - still_possible(text[:n], stop)


@PROPERTY
@given(text=LETTERS, stop=STOPS, unchecked=st.integers(0, 14), include=st.booleans())
def test_unchecked_text_ends_no_stop_string_but_may_begin_one(text: str, stop: list[str], unchecked: int, include: bool):
    checker = StopChecker(stop, include_stop_str_in_output=include)
    shown = checker.push(text[:unchecked], check=False)
    assert checker.matched is None
    assert include or len(shown) == len(text[:unchecked]) - still_possible(text[:unchecked], stop)
    shown += checker.push(text[unchecked:]) + checker.flush()
    match = first_match(text, stop, unchecked)
    if match is None:
        assert shown == text
    else:
        end, string = match
        assert (shown, checker.matched) == (text[:end] if include else text[: end - len(string)], string)


def test_after_a_match_nothing_is_given_on():
    checker = StopChecker(["x"])
    assert checker.push("axb") == "a"
    assert checker.push("c") + checker.flush() == ""


def test_the_match_that_ends_first_wins_and_then_the_longest():
    checker = StopChecker(["abc", "b"])
    assert (checker.push("abc"), checker.matched) == ("a", "b")
    checker = StopChecker(["b", "ab"])
    assert (checker.push("cab"), checker.matched) == ("c", "ab")
