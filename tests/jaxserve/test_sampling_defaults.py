"""Sampling defaults from a generation_config.json, as vLLM takes them."""

import json

import pytest

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.model_source import ModelSource, sampling_defaults

FILE = {
    "eos_token_id": [1, 2],
    "do_sample": False,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": None,
    "repetition_penalty": 1.05,
    "max_new_tokens": 2048,
    "max_length": 20,
    "transformers_version": "5.0.0",
}
TAKEN = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_tokens": 2048}


@pytest.fixture
def write(tmp_path):
    """Writes a generation_config.json and returns a model that has it."""

    def write(content):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return ModelSource("m", {}, tmp_path, None, None)

    return write


def test_what_the_file_sets_is_taken(write):
    assert sampling_defaults(write(FILE), "auto") == TAKEN


def test_vllm_means_none(write):
    assert sampling_defaults(write(FILE), "vllm") == {}


def test_another_directory_may_have_it(write, tmp_path):
    write(FILE)
    assert sampling_defaults(ModelSource("own", {}, None, {}, None), str(tmp_path)) == TAKEN
    with pytest.raises(CheckpointError, match=r"nowhere.*cannot be read|nowhere"):
        sampling_defaults(ModelSource("own", {}, None, {}, None), str(tmp_path / "nowhere"))


def test_a_model_without_the_file_has_none(tmp_path):
    assert sampling_defaults(ModelSource("m", {}, tmp_path, None, None), "auto") == {}
    assert sampling_defaults(ModelSource("own", {}, None, {}, None), "auto") == {}


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"top_p": 0}, {"top_k": -5}, {"max_new_tokens": 1.5}])
def test_what_sampling_params_do_not_take_is_named_with_its_file(write, bad):
    field = next(iter(bad)).replace("max_new_tokens", "max_tokens")
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field} must be .*generation_config='vllm'"):
        sampling_defaults(write(bad), "auto")


@pytest.mark.parametrize("bad", ["", 5, None])
def test_the_setting_is_a_name(bad):
    from jaxserve.config import EngineConfig

    with pytest.raises(ConfigError, match="generation_config must be"):
        EngineConfig(generation_config=bad)
