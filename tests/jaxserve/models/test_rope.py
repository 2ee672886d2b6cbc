"""Rotary frequencies and angles of every scaling against transformers, and how long a context each is made for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.rope import Rope
from jaxserve.testing.tiny_checkpoint import TinyModel

ANGLE_TOLERANCE = 1.1 * np.spacing(np.float32(8100))
"""Radians: the last bit of an angle at the last position, where frequencies may differ by a last bit of theirs."""

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS = {
    "default": (None, 2048),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 8192),
    "dynamic": ({"type": "dynamic", "factor": 4.0}, 8192),
    "llama3": (LLAMA3 | {"original_max_position_embeddings": 1024}, 2048),
    "llama3, original length of the model": (LLAMA3, 2048),
    "yarn": (YARN, 8192),
    "yarn, no ramp": (YARN | {"beta_fast": 4.0, "beta_slow": 4.0}, 8192),
    "yarn, untruncated": (YARN | {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}, 8192),
    "yarn, attention_factor": (YARN | {"attention_factor": 0.7}, 8192),
    "yarn, mscale": (YARN | {"mscale": 0.9, "mscale_all_dim": 0.4}, 8192),
    "yarn, mscale alone": (YARN | {"mscale": 0.9}, 8192),
}
"""Name -> (rope_scaling, longest context of a model whose max_position_embeddings is 2048)."""


def config_of(scaling):
    return TinyModel(rope_scaling=scaling, head_dim=64, max_position_embeddings=2048).config() | {"rope_theta": 500000.0}


def reference_of(config):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(transformers.LlamaConfig(**config))


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_amplitude_equal_transformers(name):
    config = config_of(SCALINGS[name][0])
    reference, rope = reference_of(config), Rope.from_huggingface(config, 64)
    np.testing.assert_allclose(rope.frequencies(), reference.inv_freq.numpy(), rtol=2e-6)
    assert rope.scaling.amplitude() == pytest.approx(reference.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_transformers_to_4_times_the_original_context(name):
    torch = pytest.importorskip("torch")
    config = config_of(SCALINGS[name][0])
    reference, rope = reference_of(config), Rope.from_huggingface(config, 64)
    tolerance = ANGLE_TOLERANCE * rope.scaling.amplitude()
    # A prompt, then two forwards of one token each, as a request goes.
    for positions, prompt_len in ((np.arange(8000), 8000), (np.array([8000]), 8000), (np.array([8100]), 8000)):
        expected = reference(torch.zeros(1), torch.tensor(positions)[None])
        actual = rope.angles(jnp.asarray(positions, jnp.int32), jnp.full(len(positions), prompt_len, jnp.int32))
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours[:, 0], theirs[0, :, :32].numpy(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_longest_context(name):
    scaling, max_len = SCALINGS[name]
    assert Rope.from_huggingface(config_of(scaling), 64).max_len(2048) == max_len


@pytest.mark.parametrize("name", SCALINGS)
def test_only_dynamic_scaling_reads_the_prompts_length(name):
    rope = Rope.from_huggingface(TinyModel(rope_scaling=SCALINGS[name][0], max_position_embeddings=2048).config(), 16)
    positions, one, other = jnp.asarray([7, 3000]), jnp.asarray([8, 3001]), jnp.asarray([4000, 4000])
    depends = any((a != b).any() for a, b in zip(rope.angles(positions, one), rope.angles(positions, other), strict=True))
    assert rope.scaling.reads_prompt_len == depends == (name == "dynamic")


def test_dynamic_angles_do_not_depend_on_how_a_prompt_is_chunked():
    rope = Rope.from_huggingface(config_of({"type": "dynamic", "factor": 4.0}), 64)
    positions = jnp.arange(3000, dtype=jnp.int32)
    whole = rope.angles(positions, jnp.full(3000, 3000, jnp.int32))
    chunk = rope.angles(positions[512:1024], jnp.full(512, 3000, jnp.int32))
    np.testing.assert_array_equal(whole[0][512:1024], chunk[0])
    shorter = rope.angles(positions[512:1024], jnp.full(512, 1024, jnp.int32))
    assert np.abs(np.asarray(shorter[0] - chunk[0])).max() > 0.1, "the prompt's length has no effect"
