"""Released shapes by eval_shape, the served layout as a permutation, and rotary frequencies against transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.registry import family_of, make_model
from jaxserve.models.rope import Rope
from jaxserve.testing.tiny_checkpoint import TinyLlama

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def released(hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    } | more


RELEASED = {
    "Llama-2-7B": (
        released(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, rope_theta=10000.0),
        6_738_415_616,
    ),
    "Llama-3.1-8B": (released(4096, 14336, 32, 32, 8, 128256, rope_scaling=LLAMA3_SCALING), 8_030_261_248),
    "Llama-3.1-70B": (released(8192, 28672, 80, 64, 8, 128256, rope_scaling=LLAMA3_SCALING), 70_553_706_496),
    "Llama-3.2-1B": (
        released(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, head_dim=64, rope_scaling=LLAMA3_SCALING),
        1_235_814_400,
    ),
}
"""Name -> (config.json, number of parameters as published)."""


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("size", [1, 8])
def test_released_models_have_their_published_size(name, size):
    config, num_parameters = RELEASED[name]
    model = make_model(config, tensor_parallel_size=size, dtype=jnp.bfloat16)
    assert sum(math.prod(p.shape) for p in model.parameters()) == num_parameters
    leaves = {p.path: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16) for p in model.parameters()}
    served = jax.eval_shape(model.served_layout, leaves)
    specs = model.served_specs()
    assert len(served) == len(specs)
    for array, spec in zip(served, specs, strict=True):
        for length, axes in zip(array.shape, spec, strict=False):
            assert not axes or length % size == 0
    num_served = sum(math.prod(a.shape) for a in served)
    assert num_parameters <= num_served <= num_parameters * 1.02


def test_sizes_that_work():
    config, _ = RELEASED["Llama-3.1-8B"]
    assert family_of(config).sizes_for(config, 64) == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(("num_kv_heads", "size"), [(8, 1), (8, 4), (2, 4), (1, 8), (4, 2)])
def test_the_served_layout_gives_each_device_its_own_heads(num_kv_heads, size):
    """A kernel whose columns say which head they belong to: a device's queries must lie with their own KV heads."""
    shape = TinyLlama(num_heads=8, num_kv_heads=num_kv_heads, head_dim=4, hidden_size=8, num_layers=1)
    model = make_model(shape.config(), tensor_parallel_size=size)
    leaves = {p.path: np.zeros(p.shape, np.float32) for p in model.parameters()}
    attention = "layers/0/self_attn"
    leaves[f"{attention}/q_proj/kernel"][:] = np.repeat(np.arange(8), 4)[None, :]
    leaves[f"{attention}/k_proj/kernel"][:] = np.repeat(np.arange(num_kv_heads) + 100, 4)[None, :]
    leaves[f"{attention}/v_proj/kernel"][:] = np.repeat(np.arange(num_kv_heads) + 200, 4)[None, :]
    leaves[f"{attention}/o_proj/kernel"][:] = np.repeat(np.arange(8), 4)[:, None]
    served = model.served_layout({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    module = model._module(served)
    qkv = np.asarray(module.layers[0].qkv.get_value())[0].reshape(size, -1, 4)[:, :, 0]
    o = np.asarray(module.layers[0].o.get_value())[:, 0].reshape(size, -1, 4)[:, :, 0]
    num_q, num_kv = 8 // size, max(1, num_kv_heads // size)
    seen = []
    for device in range(size):
        queries, keys, values = np.split(qkv[device], [num_q, num_q + num_kv])
        np.testing.assert_array_equal(keys - 100, values - 200)
        own = [int(q) // (8 // num_kv_heads) for q in queries]
        local = [int(keys[i // (num_q // num_kv)]) - 100 for i in range(num_q)]
        assert own == local, "query i of a device reads its local KV head i // (N / K)"
        np.testing.assert_array_equal(queries, o[device])
        seen += queries.astype(int).tolist()
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING])
def test_rotary_frequencies_equal_transformers(scaling):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {**RELEASED["Llama-3.1-8B"][0], "rope_scaling": scaling}
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**config)).inv_freq.numpy()
    np.testing.assert_allclose(Rope.from_huggingface(config, 128).frequencies(), reference, rtol=2e-6)
