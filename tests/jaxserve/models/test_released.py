"""Released configurations at full size, by eval_shape: the published number of parameters, and what each device would hold."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxserve.models.registry import family_of, make_model
from jaxserve.plan import kv_groups

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LAYERS_OF_EVERY_KIND = 6
"""Gemma 3 repeats itself after so many, everybody else sooner: a layout of more would take longer and say no more."""
MAX_PADDING = 1.02
"""Of the parameters: the vocabulary is padded to divide, and KV heads are held by every device of their group."""


def released(architecture, hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    return {
        "architectures": [f"{architecture}ForCausalLM"],
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


def llama3(*shape, **more):
    return released("Llama", *shape, 128256, rope_scaling=LLAMA3, **more)


def mistral(*shape, window=None, **more):
    return released("Mistral", *shape, sliding_window=window, **more)


def qwen2(*shape, **more):
    window = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
    return released("Qwen2", *shape, rope_theta=1e6, **window, **more)


def qwen3(*shape, **more):
    window = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 36}
    return released("Qwen3", *shape, 151936, rope_theta=1e6, head_dim=128, attention_bias=False, **window, **more)


def gemma(version, *shape, head_dim=256, **more):
    return released(f"Gemma{version}", *shape, head_dim=head_dim, max_position_embeddings=8192, rope_theta=10000.0, **more)


POWERS = (1, 2, 4, 8)
RELEASED = {
    "Llama-2-7B": (
        released("Llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, rope_theta=10000.0),
        6_738_415_616,
        POWERS,
    ),
    "Llama-3.1-8B": (llama3(4096, 14336, 32, 32, 8), 8_030_261_248, POWERS),
    "Llama-3.1-70B": (llama3(8192, 28672, 80, 64, 8), 70_553_706_496, POWERS),
    "Llama-3.2-1B": (llama3(2048, 8192, 16, 32, 8, tie_word_embeddings=True, head_dim=64), 1_235_814_400, POWERS),
    "Mistral-7B-v0.1": (mistral(4096, 14336, 32, 32, 8, 32000, window=4096), 7_241_732_096, POWERS),
    "Mistral-7B-v0.3": (mistral(4096, 14336, 32, 32, 8, 32768), 7_248_023_552, POWERS),
    "Mistral-Nemo-2407": (mistral(5120, 14336, 40, 32, 8, 131072, head_dim=128), 12_247_782_400, POWERS),
    "Qwen2-0.5B": (qwen2(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 494_032_768, (1, 2)),
    "Qwen2-7B": (qwen2(3584, 18944, 28, 28, 4, 152064), 7_615_616_512, (1, 2, 4)),
    "Qwen2.5-72B": (qwen2(8192, 29568, 80, 64, 8, 152064), 72_706_203_648, POWERS),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True), 596_049_920, POWERS),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32, 8), 8_190_735_360, POWERS),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64, 8), 32_762_123_264, POWERS),
    "Gemma-2B": (gemma("", 2048, 16384, 18, 8, 1, 256000), 2_506_172_416, POWERS),
    "Gemma-7B": (gemma("", 3072, 24576, 28, 16, 16, 256000), 8_537_680_896, POWERS),
    "Gemma-2-2B": (gemma("2", 2304, 9216, 26, 8, 4, 256000), 2_614_341_888, POWERS),
    "Gemma-2-9B": (gemma("2", 3584, 14336, 42, 16, 8, 256000), 9_241_705_984, POWERS),
    "Gemma-2-27B": (
        gemma("2", 4608, 36864, 46, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144),
        27_227_128_320,
        POWERS,
    ),
    "Gemma-3-1B": (gemma("3", 1152, 6912, 26, 4, 1, 262144, sliding_window=512), 999_885_952, (1, 2, 4)),
}
"""Name -> (config.json, number of parameters as published, tensor parallel sizes up to 8)."""


@pytest.mark.parametrize("name", RELEASED)
def test_the_number_of_parameters_is_the_published_one(name):
    config, num_parameters, sizes = RELEASED[name]
    model = make_model(config, dtype=jnp.bfloat16)
    assert sum(math.prod(p.shape) for p in model.parameters()) == num_parameters
    assert family_of(config).sizes_for(config, 8) == sizes


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, (_, _, sizes) in RELEASED.items() for size in (1, 4, 8) if size in sizes]
)
def test_the_served_layout_divides(name, size):
    """Every cut dimension divides, what a layer's device holds is its heads and its part of the feed-forward."""
    config = RELEASED[name][0] | {"num_hidden_layers": LAYERS_OF_EVERY_KIND}
    model = make_model(config, tensor_parallel_size=size, dtype=jnp.bfloat16)
    num_parameters = sum(math.prod(p.shape) for p in model.parameters())
    leaves = {p.path: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16) for p in model.parameters()}
    served, specs = jax.eval_shape(model.served_layout, leaves), model.served_specs()
    mesh = {"kv": model.parallel.kv, "group": model.parallel.group}
    local = []
    for array, spec in zip(served, specs, strict=True):
        cuts = [math.prod(mesh[axis] for axis in axes or ()) for axes in spec] + [1] * (array.ndim - len(spec))
        assert all(length % cut == 0 for length, cut in zip(array.shape, cuts, strict=True))
        local.append(tuple(length // cut for length, cut in zip(array.shape, cuts, strict=True)))
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    num_layers = config["num_hidden_layers"]
    qkv_width = (heads // size + 2 * max(1, kv_heads // size)) * head_dim
    per_layer = [(qkv_width, hidden), (hidden, heads * head_dim // size)]
    per_layer += [(2 * intermediate // size, hidden), (hidden, intermediate // size)]
    for shape in per_layer:
        assert local.count(shape) >= num_layers, shape
    if config["architectures"] == ["Qwen2ForCausalLM"]:
        assert local.count((qkv_width,)) == num_layers
    held = sum(math.prod(shape) for shape in local) * size
    replicated = num_layers * 2 * (size - model.parallel.kv) * hidden * kv_heads // model.parallel.kv * head_dim
    assert num_parameters <= held <= (num_parameters + replicated) * MAX_PADDING


def test_windows_make_groups():
    windows = {name: [spec.window for spec in kv_groups(make_model(RELEASED[name][0]).kv_specs())] for name in RELEASED}
    assert windows["Mistral-7B-v0.1"] == [4096]
    assert windows["Gemma-2-2B"] == [4096, None]
    assert windows["Gemma-3-1B"] == [512, None]
    assert all(w == [None] for name, w in windows.items() if not name.startswith(("Mistral-7B-v0.1", "Gemma-2-", "Gemma-3")))


def test_gemma_3_turns_global_layers_by_their_own_base():
    model = make_model(RELEASED["Gemma-3-1B"][0] | {"rope_theta": 1e6})
    thetas = [rope.theta for rope in model.config.ropes]
    assert thetas == [1e6 if (index + 1) % 6 == 0 else 1e4 for index in range(26)]
