"""Checkpoints with random weights, as Hugging Face would write them: the same bits for the same name.

Matrices have deviation 1 / sqrt(fan in) and embeddings a small one, so that logits are spread and greedy tokens do not
collapse to one. numpy and safetensors alone.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Shape:
    """A Llama; parameters counted with `is_tied`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool


SHAPES = {
    "14M": Shape(256, 6, 8, 4, 1024, 32000, True),
    "125M": Shape(768, 12, 12, 4, 2048, 32000, False),
}


def _tensors(s: Shape) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Yields (name, shape, deviation, mean)."""
    head_dim = s.hidden_size // s.num_heads

    def matrix(name: str, num_out: int, num_in: int) -> tuple[str, tuple[int, ...], float, float]:
        return name, (num_out, num_in), num_in**-0.5, 0.0

    yield "model.embed_tokens.weight", (s.vocab_size, s.hidden_size), 1.6 * s.hidden_size**-0.5, 0.0
    for index in range(s.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (s.hidden_size,), 0.05, 1.0
        yield matrix(f"{layer}.self_attn.q_proj.weight", s.num_heads * head_dim, s.hidden_size)
        yield matrix(f"{layer}.self_attn.k_proj.weight", s.num_kv_heads * head_dim, s.hidden_size)
        yield matrix(f"{layer}.self_attn.v_proj.weight", s.num_kv_heads * head_dim, s.hidden_size)
        yield matrix(f"{layer}.self_attn.o_proj.weight", s.hidden_size, s.num_heads * head_dim)
        yield f"{layer}.post_attention_layernorm.weight", (s.hidden_size,), 0.05, 1.0
        yield matrix(f"{layer}.mlp.gate_proj.weight", s.intermediate_size, s.hidden_size)
        yield matrix(f"{layer}.mlp.up_proj.weight", s.intermediate_size, s.hidden_size)
        yield matrix(f"{layer}.mlp.down_proj.weight", s.hidden_size, s.intermediate_size)
    yield "model.norm.weight", (s.hidden_size,), 0.05, 1.0
    if not s.is_tied:
        yield "lm_head.weight", (s.vocab_size, s.hidden_size), 1.6 * s.hidden_size**-0.5, 0.0


def write(name: str, directory: Path) -> Path:
    """Writes the model of this name below `directory` unless it is there, and returns its path."""
    shape, root = SHAPES[name], directory / name
    if (root / "config.json").exists():
        return root
    root.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for tensor, size, deviation, mean in _tensors(shape):
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{name}/{tensor}".encode())))
        values = generator.standard_normal(size, dtype=np.float32)
        tensors[tensor] = values * np.float32(deviation) + np.float32(mean)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden_size // shape.num_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.is_tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    (root / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # last: it says that all is there
    return root
