"""The formula bounds what results really take, by Python's own books."""

import gc
import tracemalloc

import numpy as np
import pytest

from jaxserve.host_bytes import peak_host_bytes
from jaxserve.outputs import TokenDelta, TokenScores, token_logprobs
from jaxserve.request import SamplingParams

VOCAB_SIZE = 5_000
NUM_TOKENS = 200


def scores(num_logprobs):
    if num_logprobs == -1:
        return TokenScores(-1.5, 7, all_logprobs=np.zeros(VOCAB_SIZE, np.float32))
    ids = tuple(range(1000, 1000 + num_logprobs))
    return TokenScores(-1.5, 700, ids, tuple(-0.5 - i for i in ids))


@pytest.mark.parametrize("num_logprobs", [0, 20, -1, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 128))])
def test_results_stay_below_the_peak(num_logprobs):
    """Deltas as the engine makes them, each with texts of its own; what the device's arrays take is in there too."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = []
    for token_id in range(NUM_TOKENS):
        of_device = scores(num_logprobs)
        entry = token_logprobs(token_id + 500, of_device, lambda i: f"token {i} é")
        kept.append((of_device, TokenDelta("id", f"text {token_id}", [token_id + 500], [entry], made_s=float(token_id))))
    taken = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    params = SamplingParams(logprobs=num_logprobs)
    peak = peak_host_bytes(0, NUM_TOKENS, params, VOCAB_SIZE)
    assert taken <= peak
    assert taken > peak / 3, "a bound that is far too high would refuse what fits"
