"""Bad words against a reading of vLLM's rule that looks at every sequence anew."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.structured.bad_words import BadWords
from jaxserve.structured.vocabulary import words_of

VOCAB_SIZE = 70
ids = st.integers(0, 5)


def banned_by_vllms_rule(sequences, output):
    return {s[-1] for s in sequences if len(s) <= len(output) + 1 and list(s[:-1]) == output[len(output) - len(s) + 1 :]}


@given(st.lists(st.lists(ids, min_size=1, max_size=4), max_size=6), st.lists(ids, max_size=8), st.integers(0, 8))
def test_the_last_token_is_banned_where_the_output_ends_with_the_rest(sequences, output, num_before):
    bad_words = BadWords(tuple(tuple(s) for s in sequences))
    state = bad_words.start((1, 2, 3), output[:num_before])
    for token_id in output[num_before:]:
        state.accept(token_id)
    words = words_of(VOCAB_SIZE, range(VOCAB_SIZE))
    state.restrict(words)
    expected = words_of(VOCAB_SIZE, set(range(VOCAB_SIZE)) - banned_by_vllms_rule(sequences, output))
    np.testing.assert_array_equal(words, expected)


def test_the_prompt_does_not_count():
    state = BadWords(((1, 2),)).start((1,))
    words = words_of(VOCAB_SIZE, range(VOCAB_SIZE))
    state.restrict(words)
    np.testing.assert_array_equal(words, words_of(VOCAB_SIZE, range(VOCAB_SIZE)))


def test_tokens_beyond_the_first_word():
    words = words_of(VOCAB_SIZE, range(VOCAB_SIZE))
    BadWords(((69,), (31,), (32,))).start(()).restrict(words)
    np.testing.assert_array_equal(words, words_of(VOCAB_SIZE, set(range(VOCAB_SIZE)) - {69, 31, 32}))


def test_a_word_without_tokens_is_a_mistake():
    with pytest.raises(ValueError, match="no tokens"):
        BadWords(((),))
