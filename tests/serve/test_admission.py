import asyncio

import pytest

from jaxserve.errors import OverloadedError
from serve.admission import MAX_RETRY_S, MIN_RETRY_S, Admission


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_permits_run_out_and_come_back_also_after_an_error():
    admission = Admission(2)
    with admission.permit(), pytest.raises(KeyError), admission.permit():
        with pytest.raises(OverloadedError, match="2 requests run or wait"):
            admission.permit()
        raise KeyError
    assert admission.num_requests == 0


def test_tokens_are_counted_and_given_back():
    admission = Admission(9, max_tokens=100)
    with admission.permit() as first:
        first.take_tokens(60)
        with admission.permit() as second, pytest.raises(OverloadedError, match="41 more would exceed 100"):
            second.take_tokens(41)
        with admission.permit() as third:
            third.take_tokens(40)
            assert admission.num_tokens == 100
        assert admission.num_tokens == 60
    assert admission.num_tokens == 0


def test_a_lone_request_may_exceed_the_tokens():
    with Admission(9, max_tokens=10).permit() as permit:
        permit.take_tokens(11)
        assert permit.num_tokens == 11


def test_the_retry_hint_follows_how_long_requests_take():
    clock = Clock()
    admission = Admission(4, clock=clock)
    for _ in range(100):
        with admission.permit():
            clock.now_s += 8.0
    held = [admission.permit() for _ in range(4)]
    with pytest.raises(OverloadedError) as caught:
        admission.permit()
    assert caught.value.retry_after_s == pytest.approx(8.0 / 4, rel=0.01)
    for permit in held:
        permit.__exit__(None, None, None)


@pytest.mark.parametrize(("duration_s", "hint_s"), [(0.0, MIN_RETRY_S), (1e6, MAX_RETRY_S)])
def test_the_retry_hint_is_bounded(duration_s, hint_s):
    clock = Clock()
    admission = Admission(1, clock=clock)
    for _ in range(100):
        with admission.permit():
            clock.now_s += duration_s
    assert admission.retry_after_s == hint_s


def test_idle_is_when_the_last_permit_is_back():
    async def body():
        admission = Admission(2)
        await asyncio.wait_for(admission.wait_idle(), 1)
        with admission.permit():
            waiting = asyncio.ensure_future(admission.wait_idle())
            with admission.permit():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(body())
