"""Telling the formats apart, and one entrance for both."""

import json

import numpy as np
import pytest

from jaxserve.checkpoints.load import detect, load_parameters, read_config
from jaxserve.errors import CheckpointError


def test_both_formats_load_through_one_entrance(make_llama, shared_orbax, parameters_of, abstract_of):
    source = make_llama(dtype="bfloat16", tokenizer="bytes")
    assert detect(source) == "huggingface"
    assert detect(shared_orbax) == "orbax"
    assert read_config(source) == read_config(shared_orbax)
    one = load_parameters(source, parameters_of(source), abstract_of(source))
    other = load_parameters(shared_orbax, parameters_of(source), abstract_of(source))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in one)


def test_verification_can_be_left_out(orbax_copy, parameters_of, abstract_of):
    config = json.loads((orbax_copy / "config.json").read_text())
    (orbax_copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(CheckpointError, match=r"config.json.*convert the checkpoint again"):
        load_parameters(orbax_copy, parameters_of(orbax_copy), abstract_of(orbax_copy))
    load_parameters(orbax_copy, parameters_of(orbax_copy), abstract_of(orbax_copy), verify=False)


def test_a_configuration_of_another_size_is_refused(shared_orbax, make_llama, parameters_of, abstract_of):
    wider = make_llama(intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"mlp.*has shape .*48.*the configuration says .*64"):
        load_parameters(shared_orbax, parameters_of(wider), abstract_of(wider))


def test_a_manifest_of_something_else_does_not_make_it_ours(make_llama, tmp_path):
    for path in make_llama().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "manifest.json").write_text("{}")
    assert detect(tmp_path) == "huggingface"


def test_neither_says_what_was_looked_for(orbax_copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither manifest.json .* nor model.safetensors"):
        detect(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is not a directory"):
        detect(tmp_path / "nowhere")
    (orbax_copy / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has params/ but no manifest.json"):
        detect(orbax_copy)
