"""Text and stop strings as a client of the engine sees them: random tokens through `Engine`, several requests at a time.

The model is a fake that says given tokens; the tokenizers are real, and what is expected is a brute-force search in the decoded
whole (`test_library_equality` has that this is the library's).
"""

import random
from itertools import accumulate

import pytest

from jaxserve.engine import Engine
from jaxserve.outputs import TokenDelta
from jaxserve.request import Request
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, toy_config, toy_request
from jaxserve.tokenization.tokenizer import Tokenizer

NUM_REQUESTS = 120
MAX_ANSWER_TOKENS = 30
NUM_PADDED = 8
"""A model's vocabulary may be larger than its tokenizer's; such an id has no text."""
SNIPPETS = [
    "👩‍👩‍👧 👍🏽 🇫🇷 🎉 ",
    "中文字符 日本語 ",
    "العربية हिन्दी မြန်မာ ",
    "the quick brown fox ",
    "END of it ",
    "aaabaaab ",
    "\n\n",
]


class Case:
    """A request: what the model says, and what its text must be.

    Attributes:
        answer: the tokens that the model says.
        whole: the text of them all behind the prompt.
        ending: (end, stop string) of the first match in it, the longest of several; None where there is none.
    """

    def __init__(self, seed: int, tokenizer: Tokenizer):
        rng = random.Random(seed)
        words = [i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i).strip().isalpha()]
        prompt = (words[seed % len(words)], words[seed // len(words)])  # tells the fake model which request it is
        broken = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.token_text(i)]
        self.answer = []
        while len(self.answer) < MAX_ANSWER_TOKENS:
            kind = rng.random()
            if kind < 0.7:
                self.answer += tokenizer.encode(rng.choice(SNIPPETS), add_special_tokens=False)[rng.randint(0, 3) :]
            elif kind < 0.8:
                self.answer += rng.choices(broken, k=2)
            else:
                self.answer.append(rng.randrange(tokenizer.vocab_size + NUM_PADDED))
        del self.answer[MAX_ANSWER_TOKENS:]
        skip = rng.random() < 0.5
        before = tokenizer.decode(prompt, skip_special_tokens=skip)
        # The text after each number of tokens; at the end, an unfinished character is broken.
        sequences = [(*prompt, *self.answer[:n]) for n in range(len(self.answer) + 1)]
        self._texts = [tokenizer.decode(ids, skip_special_tokens=skip)[len(before) :] for ids in sequences]
        self.whole = self._texts[-1]
        stop = self._stop_strings(rng, before)
        ends = ((end, [s for s in stop if self.whole[:end].endswith(s)]) for end in range(len(self.whole) + 1))
        self.ending = next(((end, max(found, key=len)) for end, found in ends if found), None)
        self.includes = rng.random() < 0.3
        self.request: Request = toy_request(
            str(seed),
            prompt,
            max_tokens=len(self.answer),
            stop=stop,
            include_stop_str_in_output=self.includes,
            skip_special_tokens=skip,
        )

    def _stop_strings(self, rng: random.Random, before: str) -> list[str]:
        """Parts of the text, parts with a wrong end, and one that the prompt begins; none with a broken character."""
        at = rng.randrange(len(self.whole))
        part = self.whole[at : at + rng.randint(1, 6)]
        later = self.whole[at + 2 : at + 2 + rng.randint(1, 12)]
        candidates = [part, later, part[:2], part + "☃", part[1:] + "☃", before[-2:] + self.whole[:2]]
        chosen = rng.sample(candidates, k=rng.randint(1, 4))
        return [text for text in chosen if text and "\ufffd" not in text] or ["☃"]

    @property
    def expected_text(self) -> str:
        if self.ending is None:
            return self.whole
        end, stop = self.ending
        return self.whole[:end] if self.includes else self.whole[: end - len(stop)]

    @property
    def expected_tokens(self) -> list[int]:
        """Up to the first that completes the stop string."""
        if self.ending is None:
            return self.answer
        found = self.whole[: self.ending[0]]
        return self.answer[: next(n for n, text in enumerate(self._texts) if text.startswith(found))]


def run(cases: list[Case], tokenizer: Tokenizer) -> dict[str, list[TokenDelta]]:
    """Returns the deltas of every request."""
    answers = {case.request.prompt_token_ids: case.answer for case in cases}
    config = toy_config(vocab_size=tokenizer.vocab_size + NUM_PADDED, max_num_seqs=8, num_pages=100)
    runner = FakeRunner(config, next_token=lambda context: answers[tuple(context[:2])][len(context) - 2])
    engine = Engine(Scheduler(config), runner, tokenizer)
    for case in cases:
        engine.add(case.request)
    deltas: dict[str, list[TokenDelta]] = {case.request.request_id: [] for case in cases}
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    return deltas


@pytest.mark.parametrize("flavour", ["llama_sp", "byte_level", "llama_json"])
def test_no_delta_has_a_character_too_many_and_none_is_lost(flavour, tokenizers_by_flavour):
    tokenizer = tokenizers_by_flavour[flavour]
    cases = [Case(seed, tokenizer) for seed in range(NUM_REQUESTS)]
    deltas = run(cases, tokenizer)
    for case in cases:
        own = deltas[case.request.request_id]
        for text in accumulate(delta.text for delta in own):
            assert case.expected_text.startswith(text), (case.request, case.whole)
        assert text == case.expected_text, (case.request, case.whole)
        assert [i for delta in own for i in delta.token_ids] == case.expected_tokens
        stop = None if case.ending is None else case.ending[1]
        assert (own[-1].finish_reason, own[-1].stop_reason) == ("stop" if stop else "length", stop)
    straddling = [
        case for case in cases if case.ending and len(deltas[case.request.request_id][-1].text) < len(case.ending[1])
    ]
    assert len(straddling) > NUM_REQUESTS / 10, "many stop strings begin in one delta and end in a later one"
    assert sum(case.ending is None for case in cases) > NUM_REQUESTS / 10
