"""Streams: whatever the ids and however they are cut, the deltas are the definition's text.

The property tests draw ids over the whole vocabulary and beyond, so that byte tokens, broken UTF-8, special and unknown
tokens are met in any order; prompts are drawn in the same way and therefore often end inside a character.
"""

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.tokenization.detokenizer import TextStream
from jaxserve.tokenization.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# The tokenizer fixtures live for the whole session and hold no state, so sharing them between examples is safe.
PROPERTY = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MULTI_BYTE_TEXT = "Zürich 中文 URGENCY🌶️ မြန်မာ 👩‍👩‍👧 é"


@cache
def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids whose bytes are not characters of their own, where the vocabulary has such."""
    return [i for i in range(tokenizer.vocab_size) if REPLACEMENT in tokenizer.token_text(i)]


@cache
def space_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that a text's start may lose something of."""
    return [i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i).startswith(" ")]


def draw_ids(data: st.DataObject, tokenizer: Tokenizer, max_size: int = 12) -> list[int]:
    """Any ids; where there are byte tokens, half of them; now and then one outside of the vocabulary."""
    kinds = [st.integers(0, tokenizer.vocab_size + 3), st.sampled_from(sorted(tokenizer.special_token_ids))]
    if spaces := space_ids(tokenizer):
        kinds.append(st.sampled_from(spaces))
    if broken := byte_ids(tokenizer):
        kinds += [st.sampled_from(broken)] * 2
    return data.draw(st.lists(st.one_of(kinds), max_size=max_size))


def expected_text(tokenizer: Tokenizer, prompt: list[int], generated: list[int], skip: bool) -> str:
    """The definition, by whole decodes: D(P + G) less D(P)."""
    whole = tokenizer.decode(prompt + generated, skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    # Unless the prompt ended inside a character, which the generated tokens completed (or broke in another way).
    settled = next(n for n in range(len(before), len(before) - 4, -1) if whole.startswith(before[:n]))
    assert before[settled:].strip(REPLACEMENT) == ""
    return whole[settled:]


@PROPERTY
@given(data=st.data(), skip=st.booleans())
def test_deltas_are_the_text_of_the_definition(tokenizer: Tokenizer, data: st.DataObject, skip: bool):
    prompt, generated = draw_ids(data, tokenizer), draw_ids(data, tokenizer)
    stream = tokenizer.new_stream(prompt, skip_special_tokens=skip)
    one_by_one = "".join([stream.push_one(i) for i in generated]) + stream.flush()
    assert one_by_one == expected_text(tokenizer, prompt, generated, skip)

    cut = data.draw(st.integers(0, len(generated)))
    stream = tokenizer.new_stream(prompt, skip_special_tokens=skip)
    assert stream.push(generated[:cut]) + stream.push(generated[cut:]) + stream.flush() == one_by_one


@PROPERTY
@given(data=st.data())
def test_what_was_sent_is_a_prefix_of_every_continuation(tokenizer: Tokenizer, data: st.DataObject):
    prompt, generated, more = (draw_ids(data, tokenizer, 6) for _ in range(3))
    stream = tokenizer.new_stream(prompt)
    sent = stream.push(generated)
    assert expected_text(tokenizer, prompt, generated + more, skip=True).startswith(sent)


@PROPERTY
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\ufffd"), max_size=12))
def test_text_is_streamed_whole_and_never_by_half_characters(tokenizers_by_flavour: dict[str, Tokenizer], text: str):
    for name in ("llama_sp", "bare_sp", "byte_level", "llama_json"):
        tokenizer = tokenizers_by_flavour[name]
        stream = tokenizer.new_stream()
        deltas = [stream.push_one(i) for i in tokenizer.encode(text)]
        assert stream.flush() == ""
        assert "".join(deltas) == text
        assert REPLACEMENT not in "".join(deltas)


@pytest.mark.parametrize("name", ["llama_sp", "bare_sp", "byte_level", "llama_json"])
def test_many_scripts_after_a_prompt(tokenizers_by_flavour: dict[str, Tokenizer], name: str):
    tokenizer = tokenizers_by_flavour[name]
    prompt = tokenizer.encode("The answer is")
    generated = tokenizer.encode(MULTI_BYTE_TEXT, add_special_tokens=False)
    stream = TextStream(tokenizer, prompt)
    text = "".join([stream.push(i) for i in generated]) + stream.finish()
    assert text.lstrip(" ") == MULTI_BYTE_TEXT


def test_a_leading_space_depends_on_whether_text_stands_before(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["llama_sp"]
    word = tokenizer.encode("Hello", add_special_tokens=False)
    for prompt, text in (([], "Hello"), ([tokenizer.bos_token_id], "Hello"), (tokenizer.encode("Say:"), " Hello")):
        stream = tokenizer.new_stream(prompt)
        assert stream.push(word) + stream.flush() == text
    # Where special tokens are shown, bos is text too.
    assert tokenizer.new_stream([tokenizer.bos_token_id], skip_special_tokens=False).push(word) == " Hello"


def test_a_character_split_between_prompt_and_answer(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["llama_sp"]
    by_byte = {tokenizer.token_bytes(i): i for i in byte_ids(tokenizer)}
    e4, b8, ad = (by_byte[bytes([b])] for b in "中".encode())
    letter = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == "x")

    completed = tokenizer.new_stream([e4, b8])
    assert completed.push([ad, letter]) + completed.flush() == "中x"
    broken = tokenizer.new_stream([e4, b8])
    assert broken.push([letter]) + broken.flush() == "x"
    ended = tokenizer.new_stream([e4])
    assert ended.push([b8]) + ended.flush() == REPLACEMENT  # the prompt's own byte has its U+FFFD in the prompt
    f0, *rest, last = (by_byte[bytes([b])] for b in "🎉".encode())
    assert tokenizer.new_stream([letter, f0, *rest]).push([last]) == "🎉"
    surrogate = tokenizer.new_stream([by_byte[b"\xed"], by_byte[b"\xa0"]])  # U+FFFD twice in the prompt's own text
    assert surrogate.push([letter]) + surrogate.flush() == "x"
    # A break of the answer's own is the answer's.
    own = tokenizer.new_stream([letter])
    assert own.push([e4, b8, letter]) + own.flush() == REPLACEMENT * 2 + "x"


def test_only_the_start_of_a_text_loses_spaces(tokenizers_by_flavour: dict[str, Tokenizer]):
    one, every = tokenizers_by_flavour["llama_sp"], tokenizers_by_flavour["squeezing_sp"]
    for tokenizer, prompt_spaces, text in ((one, 0, "  "), (one, 1, "   "), (every, 0, ""), (every, 2, "")):
        byte, space = (i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == " ")
        stream = tokenizer.new_stream([tokenizer.bos_token_id, *[space] * prompt_spaces])
        assert "".join([stream.push_one(space) for _ in range(3)]) == text
        assert tokenizer.new_stream().push([byte, space]) == "  ", "the byte is no mark of a word"


def test_unfinished_characters_wait_and_come_out_at_the_end(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["byte_level"]
    by_byte = {tokenizer.token_bytes(i): i for i in byte_ids(tokenizer)}
    stream = TextStream(tokenizer, [])
    assert [stream.push(by_byte[bytes([b])]) for b in "🎉".encode()[:3]] == ["", "", ""]
    assert stream.finish() == REPLACEMENT


def test_an_invalid_prefix_recovers_with_the_exact_text(tokenizers_by_flavour: dict[str, Tokenizer]):
    """Broken bytes between whole characters: HF's DecodeStream raises here or retracts (vLLM #17448)."""
    tokenizer = tokenizers_by_flavour["llama_json"]
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    sequence = [ids[bytes([b])] for b in [*"é".encode(), 0xFF, *"中".encode(), 0x80, *"é".encode()]]
    stream = tokenizer.new_stream(tokenizer.encode("a"))
    assert "".join([stream.push_one(i) for i in sequence]) + stream.flush() == f"é{REPLACEMENT}中{REPLACEMENT}é"


def test_special_tokens_are_skipped_or_shown(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["byte_level"]
    ids = [*tokenizer.encode("a", add_special_tokens=False), tokenizer.special_tokens["<|eot_id|>"]]
    for spaces in (True, False):
        shown = TextStream(tokenizer, [], skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert "".join([shown.push(i) for i in ids]) == "a<|eot_id|>"
    skipped = TextStream(tokenizer, [])
    assert "".join([skipped.push(i) for i in ids]) == "a"


def test_without_detokenization_there_is_no_text(tokenizers_by_flavour: dict[str, Tokenizer]):
    stream = TextStream(tokenizers_by_flavour["ascii"], [65], detokenize=False)
    assert stream.push(66) + stream.finish() == ""
    assert stream.stopped_by is None


def run_ascii(tokenizer: Tokenizer, text: str, **options) -> tuple[list[str], str | None, str]:
    """The deltas of an ASCII answer, what stopped it, and what `finish` gave."""
    unchecked = options.pop("unchecked", 0)
    stream = TextStream(tokenizer, tokenizer.encode("Q:"), **options)
    deltas = [stream.push(ord(c), check_stop=n >= unchecked) for n, c in enumerate(text)]
    return deltas, stream.stopped_by, stream.finish()


def test_a_stop_string_ends_the_text(tokenizers_by_flavour: dict[str, Tokenizer]):
    deltas, stopped_by, rest = run_ascii(tokenizers_by_flavour["ascii"], "one END two", stop=["END"])
    assert ("".join(deltas), stopped_by, rest) == ("one ", "END", "")


def test_an_included_stop_string_ends_the_text_behind_it(tokenizers_by_flavour: dict[str, Tokenizer]):
    options = {"stop": ["END"], "include_stop_str_in_output": True}
    deltas, stopped_by, rest = run_ascii(tokenizers_by_flavour["ascii"], "one END two", **options)
    assert ("".join(deltas), stopped_by, rest) == ("one END", "END", "")
    assert deltas[:6] == list("one EN")  # nothing waits: all of it is part of the text


def test_held_back_text_is_released_at_the_end(tokenizers_by_flavour: dict[str, Tokenizer]):
    deltas, stopped_by, rest = run_ascii(tokenizers_by_flavour["ascii"], "one EN", stop=["END"])
    assert (deltas[-2:], stopped_by, rest) == (["", ""], None, "EN")


def test_the_prompt_holds_no_stop_string(tokenizers_by_flavour: dict[str, Tokenizer]):
    deltas, stopped_by, rest = run_ascii(tokenizers_by_flavour["ascii"], "Q:a", stop=["Q:Q"])
    assert ("".join(deltas) + rest, stopped_by) == ("Q:a", None)


@pytest.mark.parametrize(("unchecked", "text"), [(0, "a "), (4, "a "), (5, "a ENDb "), (99, "a ENDb END")])
def test_before_min_tokens_no_stop_string_may_end(tokenizers_by_flavour, unchecked: int, text: str):
    """The first END ends in token 4: with four tokens unchecked it straddles and counts, with five it is too early."""
    deltas, _, rest = run_ascii(tokenizers_by_flavour["ascii"], "a ENDb END", stop=["END"], unchecked=unchecked)
    assert "".join(deltas) + rest == text


def test_a_stop_string_in_the_bytes_of_a_split_character(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["byte_level"]
    stream = TextStream(tokenizer, [], stop=["🎉!"])
    ids = tokenizer.encode("party 🎉! more", add_special_tokens=False)
    assert "".join([stream.push(i) for i in ids]) + stream.finish() == "party "
    assert stream.stopped_by == "🎉!"
