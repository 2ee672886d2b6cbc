from random import Random

import pytest

from jaxserve.request import SAMPLING_FIELDS, SamplingParams
from jaxserve.testing import random_params
from jaxserve.testing.random_params import random_sampling_params
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer


def test_every_field_has_a_generator_and_takes_several_values():
    rng = Random(0)
    drawn = [random_sampling_params(rng, 128, AsciiTokenizer()) for _ in range(300)]
    for name in SAMPLING_FIELDS:
        values = {repr(getattr(params, name)) for params in drawn}
        assert len(values) > 1 or name == "n", f"{name} is always {values}"


def test_a_field_without_a_generator_is_named(monkeypatch):
    monkeypatch.delitem(random_params.GENERATORS, "min_p")
    with pytest.raises(NotImplementedError, match=r"SamplingParams\.min_p needs a generator"):
        random_sampling_params(Random(0), 128)


def test_a_seed_repeats_them_and_no_tokenizer_means_no_stop_strings():
    one, same = (random_sampling_params(Random(7), 128) for _ in range(2))
    assert isinstance(one, SamplingParams)
    assert one == same
    rng = Random(1)
    assert all(not random_sampling_params(rng, 128).stop for _ in range(50))
