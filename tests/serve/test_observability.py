"""The log line of a call."""

import logging
import re

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import RequestTimings, TokenDelta
from serve.observability import CallRecord, call_record

LINE = re.compile(
    r"request_id=(\S+) x_request_id=(\S+) endpoint=(\S+) status=(\S+) finish_reason=(\S+) prompt_tokens=(\d+) "
    r"cached_tokens=(\d+) completion_tokens=(\d+) queue_ms=(\S+) first_token_ms=(\S+) total_ms=(\S+)"
)


class Calls:
    def observe_call(self, endpoint, status):
        self.seen = endpoint, status


def test_ids_cannot_break_out_of_the_line():
    record = CallRecord(request_id="a\r\nb\x1b[31m c=\u2028d\\", x_request_id="x" * 500)
    line = record.line("Generate", "OK")
    assert line.isascii() and line.isprintable()
    match = LINE.fullmatch(line)
    assert match[1] == r"a\u000d\u000ab\u001b[31m\u0020c\u003d\u2028d\u005c"
    assert match[2] == "x" * 128


def test_a_record_sums_up_its_prompts():
    record = CallRecord(num_prompt_tokens=7)
    record.add([TokenDelta("a", "t", [1, 2])])
    record.add(
        [TokenDelta("a", "t", [3], finish_reason="stop", num_cached_tokens=2, timings=RequestTimings(1.0, 1.5, 2.0, 3.0))]
    )
    record.add([TokenDelta("b", "t", [4], finish_reason="length", num_cached_tokens=1, timings=RequestTimings(1.0, 1.25))])
    match = LINE.fullmatch(record.line("E", "200"))
    assert match.groups()[2:9] == ("E", "200", "stop,length", "7", "3", "4", "500.0")
    assert match[10] != "-"


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidRequestError("a", 1, "b"), "INVALID_ARGUMENT"), (ZeroDivisionError(), "INTERNAL")]
)
def test_an_error_is_the_calls_status(caplog, error, status):
    metrics = Calls()
    caplog.set_level(logging.INFO, "serve.requests")
    with pytest.raises(type(error)), call_record("Generate", metrics):
        raise error
    assert LINE.fullmatch(caplog.messages[-1])[4] == status
    assert metrics.seen == ("Generate", status)
