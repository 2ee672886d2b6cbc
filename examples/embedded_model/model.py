"""A Llama decoder in Flax NNX, whose parameter names are the ones that the engine serves.

Dimension letters: B batch, T tokens, N query heads, K KV heads, G query heads per KV head, H head dim, D model.
Source: Touvron et al. 2023 (Llama 2), section 2.2; rotary halves as Hugging Face `rotate_half` lays them out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes of the model; the field names are those of a Hugging Face `LlamaConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


# Queries attend in blocks, each to the keys up to its own end: half of a full 1024 × 1024 square would be waste. Blocks of
# 128 take a quarter less processor time than blocks of 256.
QUERY_BLOCK = 128


def _linear(num_in: int, num_out: int, rngs: nnx.Rngs, gain: float = 1.0) -> nnx.Linear:
    init = nnx.initializers.normal(gain * num_in**-0.5)
    return nnx.Linear(num_in, num_out, use_bias=False, kernel_init=init, rngs=rngs)


def rotate(x_BTNH: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of positions 0 … T-1: component i turns together with component i + H/2."""
    half = x_BTNH.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x_BTNH.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.q_proj = _linear(c.hidden_size, c.num_attention_heads * c.head_dim, rngs)
        self.k_proj = _linear(c.hidden_size, c.num_key_value_heads * c.head_dim, rngs)
        self.v_proj = _linear(c.hidden_size, c.num_key_value_heads * c.head_dim, rngs)
        residual_gain = (2 * c.num_hidden_layers) ** -0.5
        self.o_proj = _linear(c.num_attention_heads * c.head_dim, c.hidden_size, rngs, residual_gain)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, (batch, length, _) = self.config, x_BTD.shape
        q = rotate(self.q_proj(x_BTD).reshape(batch, length, c.num_attention_heads, c.head_dim), c.rope_theta)
        k = rotate(self.k_proj(x_BTD).reshape(batch, length, c.num_key_value_heads, c.head_dim), c.rope_theta)
        v = self.v_proj(x_BTD).reshape(batch, length, c.num_key_value_heads, c.head_dim)
        q = q.reshape(batch, length, c.num_key_value_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4) * c.head_dim**-0.5
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        spans = [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]
        blocks = [attend(q[..., start:end, :], k[:, :, :end], v[:, :, :end]) for start, end in spans]
        mixed_BKGTH = jnp.concatenate(blocks, axis=3)
        return self.o_proj(mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1))


def attend(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """Softmax attention of the last T positions of S: query t sees the keys up to S - T + t.

    The G query heads of a KV head are rows of one matrix product: XLA on a CPU is a third faster so than by einsum.
    """
    batch, kv_heads, groups, num_queries, head_dim = q_BKGTH.shape
    num_keys = k_BKSH.shape[2]
    rows = q_BKGTH.reshape(batch, kv_heads, groups * num_queries, head_dim)
    scores = (rows @ k_BKSH.swapaxes(2, 3)).reshape(batch, kv_heads, groups, num_queries, num_keys)
    visible = jnp.tril(jnp.ones((num_queries, num_keys), bool), num_keys - num_queries)
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    mixed = weights.reshape(batch, kv_heads, groups * num_queries, num_keys) @ v_BKSH
    return mixed.reshape(q_BKGTH.shape)


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        c = config
        self.gate_proj = _linear(c.hidden_size, c.intermediate_size, rngs)
        self.up_proj = _linear(c.hidden_size, c.intermediate_size, rngs)
        self.down_proj = _linear(c.intermediate_size, c.hidden_size, rngs, (2 * c.num_hidden_layers) ** -0.5)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nnx.Module):
    """Tokens in, logits out; the output head is the embedding table."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.embed_tokens.attend(self.norm(x_BTD))


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p of each target [nats]."""
    chosen = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen
