"""EngineConfig: what is refused names its field; what is taken is plain afterwards."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxserve.config import DTYPES, EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.testing.fake_runner import toy_config

NAN, INF = float("nan"), float("inf")
NOT_A_COUNT = ["1", [1], True, 1.0, NAN, INF, -1, np.float32(1), 2**63]
COUNTS = "max_model_len max_num_seqs max_num_batched_tokens page_size num_pages kv_cache_memory_bytes max_host_bytes"


def cases(names, values):
    return [pytest.param(n, v, id=f"{n}={v!r:.20}") for n in names.split() for v in values]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases(COUNTS, [*NOT_A_COUNT, 0]),
        *cases("tensor_parallel_size", [*NOT_A_COUNT, 0, None]),
        *cases("seed max_logprobs", [*NOT_A_COUNT, None]),
        *cases("long_prefill_token_threshold", NOT_A_COUNT),
        *cases("max_logprobs", [129]),
        *cases("page_size", [1, 4, 7, 24, 512]),
        *cases("gpu_memory_utilization", [0, 0.0, -0.5, 1.01, NAN, INF, "0.9", True, None]),
        *cases("dtype", ["", "float64", "bf16", None, 16, np.float32]),
        *cases("model tokenizer compilation_cache_dir revision", [5, b"a", ["a"], True]),
        *cases("attention_backend", [None, 5]),
        *cases("skip_tokenizer_init deterministic", [None, 0, "no"]),
    ],
)
def test_a_bad_value_names_its_field(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be "):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases(COUNTS.replace("page_size ", ""), [None, 1, 2**63 - 1]),
        *cases("page_size", [None, 8, 64, 256]),
        *cases("tensor_parallel_size", [1, 8]),
        *cases("long_prefill_token_threshold", [None, 0, 1, 2**63 - 1]),
        *cases("seed", [0, 2**63 - 1]),
        *cases("max_logprobs", [0, 128]),
        *cases("gpu_memory_utilization", [1e-6, 1, 1.0]),
        *cases("dtype", DTYPES),
        *cases("model tokenizer compilation_cache_dir revision", [None, "", "name"]),
    ],
)
def test_a_boundary_is_allowed(name, value):
    assert getattr(EngineConfig(**{name: value}), name) == value


def test_the_defaults_leave_sizes_to_the_model_and_the_platform():
    config = EngineConfig()
    assert [getattr(config, name) for name in ("model", "tokenizer", *COUNTS.split())] == [None] * 9
    assert (config.tensor_parallel_size, config.dtype, config.gpu_memory_utilization) == (1, "auto", 0.9)
    assert (config.seed, config.max_logprobs, config.attention_backend) == (0, 20, "auto")


def test_numpy_integers_and_paths_become_plain():
    config = EngineConfig(model=Path("a") / "b", max_num_seqs=np.int64(4), seed=np.uint32(7), page_size=np.int8(16))
    assert (config.model, config.max_num_seqs, config.seed, config.page_size) == (str(Path("a") / "b"), 4, 7, 16)
    assert {type(v) for v in (config.max_num_seqs, config.seed, config.page_size)} == {int}


@pytest.mark.parametrize("config", [EngineConfig(), toy_config()])
def test_frozen_and_hashable(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert hash(config) == hash(dataclasses.replace(config))
