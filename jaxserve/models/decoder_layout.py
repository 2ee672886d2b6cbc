"""The two shapes of a decoder's parameters: the canonical tree, and the served layout made from it.

Served: q, k and v in one matrix and gate and up in another, one block of columns a device; biases follow their columns; the
vocabulary is padded so that it divides. Knows which heads a device has.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.decoder_config import DecoderConfig
from jaxserve.models.layers import pad_rows, padded_vocab
from jaxserve.models.weights import Parameter
from sharding import axes
from sharding.mesh import TensorParallelism

Declared = tuple[tuple[int, ...], tuple[str | None, ...]]


def decoder_parameters(config: DecoderConfig) -> tuple[Parameter, ...]:
    """Returns every tensor of the canonical tree, in order."""
    c, vocab_embed = config, (config.vocab_size, config.hidden_size)
    result = [Parameter("embed_tokens/embedding", vocab_embed, (None, axes.EMBED))]
    layer = _layer_parameters(c)
    for index in range(c.num_layers):
        result += [Parameter(f"layers/{index}/{path}", *declared) for path, declared in layer.items()]
    result.append(Parameter("norm/scale", (c.hidden_size,), (None,)))
    if not c.is_tied:
        result.append(Parameter("lm_head/kernel", vocab_embed[::-1], (axes.EMBED, None)))
    return tuple(result)


def _layer_parameters(c: DecoderConfig) -> dict[str, Declared]:
    result: dict[str, Declared] = {}
    embed = (c.hidden_size, axes.EMBED)
    heads, kv_heads = (c.num_heads * c.head_dim, axes.HEADS), (c.num_kv_heads * c.head_dim, axes.KV_HEADS)
    mlp = (c.intermediate_size, axes.MLP)

    def norm(path: str, size: int = c.hidden_size) -> None:
        result[f"{path}/scale"] = ((size,), (None,))

    def projection(path: str, into: Any, out: Any, has_bias: bool) -> None:
        result[f"{path}/kernel"] = ((into[0], out[0]), (into[1], out[1]))
        if has_bias:
            result[f"{path}/bias"] = ((out[0],), (out[1],))

    norm("input_layernorm")
    projection("self_attn/q_proj", embed, heads, c.has_qkv_bias)
    projection("self_attn/k_proj", embed, kv_heads, c.has_qkv_bias)
    projection("self_attn/v_proj", embed, kv_heads, c.has_qkv_bias)
    if c.has_qk_norm:
        norm("self_attn/q_norm", c.head_dim)
        norm("self_attn/k_norm", c.head_dim)
    projection("self_attn/o_proj", heads, embed, c.has_o_bias)
    norm("post_attention_layernorm")
    if c.has_post_norms:
        norm("pre_feedforward_layernorm")
        norm("post_feedforward_layernorm")
    projection("mlp/gate_proj", embed, mlp, c.has_mlp_bias)
    projection("mlp/up_proj", embed, mlp, c.has_mlp_bias)
    projection("mlp/down_proj", mlp, embed, c.has_mlp_bias)
    return result


def serve_decoder(
    config: DecoderConfig, parallel: TensorParallelism, leaves: Mapping[str, jax.Array], *, is_table_wide: bool
) -> dict[str, Any]:
    """Returns the pure dict of `decoder.DecoderModule`, from canonical leaves {path: array}."""
    rows = padded_vocab(config.vocab_size, parallel.size)
    table = pad_rows(leaves["embed_tokens/embedding"], rows)
    served: dict[str, Any] = {
        "embedding": table.T if is_table_wide else table,
        "norm": {"scale": leaves["norm/scale"]},
    }
    if not config.is_tied:
        served["lm_head"] = pad_rows(leaves["lm_head/kernel"].T, rows).T
    split: dict[int, dict[str, jax.Array]] = {index: {} for index in range(config.num_layers)}
    for path, leaf in leaves.items():
        if path.startswith("layers/"):
            _, index, rest = path.split("/", 2)
            split[int(index)][rest] = leaf
    served["layers"] = {index: _serve_layer(config, parallel, layer) for index, layer in split.items()}
    return served


def _serve_layer(config: DecoderConfig, parallel: TensorParallelism, layer: Mapping[str, jax.Array]) -> dict[str, Any]:
    def norm(path: str) -> dict[str, jax.Array]:
        return {"scale": layer[f"{path}/scale"]}

    def fused_qkv(leaf: str) -> jax.Array:
        q, k, v = (layer[f"self_attn/{name}_proj/{leaf}"] for name in "qkv")
        blocks = [_blocks_of_heads(config, parallel, q), *(_blocks_of_kv_heads(parallel, x) for x in (k, v))]
        return jnp.concatenate(blocks, axis=-1).reshape(*q.shape[:-1], -1)

    def fused_gate_up(leaf: str) -> jax.Array:
        gate, up = (layer[f"mlp/{name}_proj/{leaf}"] for name in ("gate", "up"))
        blocks = [x.reshape(*x.shape[:-1], parallel.size, -1) for x in (gate, up)]
        return jnp.concatenate(blocks, axis=-1).reshape(*gate.shape[:-1], -1)

    o_kernel = layer["self_attn/o_proj/kernel"].T
    served: dict[str, Any] = {
        "input_norm": norm("input_layernorm"),
        "post_attention_norm": norm("post_attention_layernorm"),
        "qkv": fused_qkv("kernel"),
        "o": _blocks_of_heads(config, parallel, o_kernel).reshape(config.hidden_size, -1).T,
        "gate_up": fused_gate_up("kernel"),
        "down": layer["mlp/down_proj/kernel"],
    }
    if config.has_qkv_bias:
        served["qkv_bias"] = fused_qkv("bias")
    if config.has_o_bias:
        served["o_bias"] = layer["self_attn/o_proj/bias"]
    if config.has_mlp_bias:
        served |= {"gate_up_bias": fused_gate_up("bias"), "down_bias": layer["mlp/down_proj/bias"]}
    if config.has_qk_norm:
        served |= {"q_norm": norm("self_attn/q_norm"), "k_norm": norm("self_attn/k_norm")}
    if config.has_post_norms:
        served["pre_feedforward_norm"] = norm("pre_feedforward_layernorm")
        served["post_feedforward_norm"] = norm("post_feedforward_layernorm")
    return served


def _blocks_of_heads(config: DecoderConfig, parallel: TensorParallelism, x: jax.Array) -> jax.Array:
    """Returns [..., devices, query heads of one device * H] of [..., N * H].

    Device (a, b) of kv x group has KV heads of block a and, of each one's queries, block b: heads [K, N/K] are cut on both
    axes and put in device order.
    """
    c, p, lead = config, parallel, x.shape[:-1]
    cut = (p.kv, c.num_kv_heads // p.kv, p.group, c.num_heads // c.num_kv_heads // p.group, c.head_dim)
    return jnp.swapaxes(x.reshape(*lead, *cut), -4, -3).reshape(*lead, p.size, -1)


def _blocks_of_kv_heads(parallel: TensorParallelism, x: jax.Array) -> jax.Array:
    """Returns [..., devices, KV heads of one device * H] of [..., K * H]; devices of one group hold the same heads."""
    return jnp.repeat(x.reshape(*x.shape[:-1], parallel.kv, -1), parallel.group, axis=-2)
