"""Tiny checkpoints, written once a run and copied where a test damages them."""

import shutil

import jax
import numpy as np
import pytest

from jaxserve.checkpoints import directory
from jaxserve.checkpoints.convert import convert
from jaxserve.models.registry import make_model
from jaxserve.testing.tiny_checkpoint import write_tiny_llama

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48}


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory):
    """Returns a function that writes a Hugging Face directory once for each choice of fields. Not to be changed by tests."""
    made = {}

    def make(**fields):
        key = repr(sorted(fields.items()))
        if key not in made:
            made[key] = write_tiny_llama(tmp_path_factory.mktemp("hf"), **(SHAPE | fields))
        return made[key]

    return make


@pytest.fixture(scope="session")
def shared_orbax(make_llama, tmp_path_factory):
    """An Orbax directory with a tokenizer. Not to be changed by tests."""
    path = tmp_path_factory.mktemp("orbax") / "model"
    convert(make_llama(dtype="bfloat16", tokenizer="bytes"), path, show_progress=False)
    return path


@pytest.fixture
def orbax_copy(shared_orbax, tmp_path):
    return shutil.copytree(shared_orbax, tmp_path / "orbax")


@pytest.fixture
def parameters_of():
    def parameters_of(path):
        return make_model(directory.read_json(path, directory.CONFIG)).parameters()

    return parameters_of


@pytest.fixture
def abstract_of(parameters_of):
    """Returns a function from a directory to the abstract tree {path: ShapeDtypeStruct}."""

    def abstract_of(path, dtype="float32", sharding_for=lambda parameter: None):
        return {
            p.path: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype), sharding=sharding_for(p)) for p in parameters_of(path)
        }

    return abstract_of
