"""Stop strings over messages of a real stream: the engine and its thread are real, the model says a given text."""

import threading
from itertools import accumulate

import grpc
import pytest

from jaxserve.engine import Engine
from jaxserve.engine_thread import EngineThread
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, toy_config
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb

PROMPT = "Say EN"
TEXT = "D or EN, then ENDING is the END of aaab."
CASES = [
    (["ENDING is"], 23, "ENDING is"),
    (["END o", "ENDS", "ENDING isn't"], 33, "END o"),
    (["ENDING", "END"], 17, "END"),  # what ends first, though the longer one begins at the same place
    (["aab"], 39, "aab"),  # after a false start
    (["D"], 1, "D"),  # the first token
    (["ENDX", "absent"], None, None),
]
"""Stop strings, where the text up to the first match ends, and that match."""


@pytest.fixture
def client():
    config = toy_config(max_model_len=128)
    runner = FakeRunner(config, next_token=lambda context: ord((TEXT + "~" * 128)[len(context) - len(PROMPT)]))
    thread = EngineThread(Engine(Scheduler(config), runner, AsciiTokenizer()))
    yield thread
    thread.close()


@pytest.mark.parametrize("is_crowded", [False, True], ids=["a message a token", "messages of several tokens"])
def test_a_stop_string_over_messages(with_service, is_crowded):
    """The prompt ends with the beginning of a stop string, which the answer's first character must not complete."""

    async def ask(served, stop, include):
        sampling = pb.SamplingParams(max_tokens=len(TEXT), temperature=0, stop=stop, include_stop_str_in_output=include)
        call = served.stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling))
        messages = []
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
            if is_crowded:
                threading.Event().wait(0.01)  # the loop does not run meanwhile, and deltas pile up
        return messages

    async def body(served):
        return [(case, include, await ask(served, case[0], include)) for case in CASES for include in (False, True)]

    answers = with_service(body)
    for (_, end, found), include, messages in answers:
        expected = TEXT[:end]
        if found is not None and not include:
            expected = expected.removesuffix(found)
        assert all(expected.startswith(sent) for sent in accumulate(m.text for m in messages))
        assert "".join(m.text for m in messages) == expected
        assert "".join(chr(i) for m in messages for i in m.token_ids) == TEXT[:end], "the tokens of a stop string stay"
        assert messages[-1].stop_string == (found or "")
        reason = pb.FINISH_REASON_LENGTH if found is None else pb.FINISH_REASON_STOP
        assert messages[-1].finish_reason == reason
    longest = max(len(message.token_ids) for _, _, messages in answers for message in messages)
    assert longest > 5 or not is_crowded
