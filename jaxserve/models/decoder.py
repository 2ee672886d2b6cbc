"""The decoder that most families are: grouped-query attention with rotary positions, a gated feed-forward, RMS norms.

Knows the forward pass over local shards, for every switch of `DecoderConfig`; which family sets which switch is the family's
file. Numerics as in Hugging Face's models.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.attention import PagedCache
from jaxserve.models.decoder_config import DecoderConfig
from jaxserve.models.decoder_layout import decoder_parameters, serve_decoder
from jaxserve.models.layers import ACTIVATIONS, RMSNorm, embed, padded_vocab, parameter, unembed
from jaxserve.models.linear import added, linear, rounded
from jaxserve.models.model import ModelContext, ServedParams
from jaxserve.models.rope import Rope, rotate
from jaxserve.models.sums import whole_rows
from jaxserve.models.weights import Parameter
from jaxserve.plan import KVSpec
from sharding import axes
from sharding.mesh import TensorParallelism, divides
from sharding.rules import spec_for

Angles = Mapping[Rope, tuple[jax.Array, jax.Array]]


class DecoderLayer(nnx.Module):
    """One layer in the served layout: q, k, v in one matrix, gate and up in another, all [out, in], a block of rows a device."""

    def __init__(self, config: DecoderConfig, index: int, parallel: TensorParallelism, dtype: Any):
        c, t = config, parallel.size
        self.index = index
        self.config = c
        self.num_heads = c.num_heads // t
        self.num_kv_heads = c.num_kv_heads // parallel.kv
        qkv_width = t * (self.num_heads + 2 * self.num_kv_heads) * c.head_dim

        def norm(size: int = c.hidden_size) -> RMSNorm:
            return RMSNorm(size, c.rms_norm_eps, dtype, c.norm_offset)

        def bias(size: int, axis: str, *, exists: bool) -> nnx.Param | None:
            return parameter((size,), (axis,), dtype) if exists else None

        self.input_norm = norm()
        self.qkv = parameter((qkv_width, c.hidden_size), (axes.FUSED, axes.EMBED), dtype)
        self.qkv_bias = bias(qkv_width, axes.FUSED, exists=c.has_qkv_bias)
        self.q_norm = norm(c.head_dim) if c.has_qk_norm else None
        self.k_norm = norm(c.head_dim) if c.has_qk_norm else None
        self.o = parameter((c.hidden_size, c.num_heads * c.head_dim), (axes.EMBED, axes.HEADS), dtype)
        self.o_bias = bias(c.hidden_size, axes.EMBED, exists=c.has_o_bias)
        self.post_attention_norm = norm()
        self.pre_feedforward_norm = norm() if c.has_post_norms else None
        self.gate_up = parameter((2 * c.intermediate_size, c.hidden_size), (axes.FUSED, axes.EMBED), dtype)
        self.gate_up_bias = bias(2 * c.intermediate_size, axes.FUSED, exists=c.has_mlp_bias)
        self.down = parameter((c.hidden_size, c.intermediate_size), (axes.EMBED, axes.MLP), dtype)
        self.down_bias = bias(c.hidden_size, axes.EMBED, exists=c.has_mlp_bias)
        self.post_feedforward_norm = norm() if c.has_post_norms else None

    def __call__(self, x_TD: jax.Array, angles: Angles, cache: PagedCache, ctx: ModelContext) -> jax.Array:
        attended_TD = self.attend(self.input_norm(x_TD, ctx), angles, cache, ctx)
        if self.pre_feedforward_norm is None or self.post_feedforward_norm is None:
            x_TD = added(x_TD, attended_TD, ctx.linear)
            return added(x_TD, self.feed_forward(self.post_attention_norm(x_TD, ctx), ctx), ctx.linear)
        x_TD = added(x_TD, self.post_attention_norm(attended_TD, ctx), ctx.linear)
        fed_TD = self.feed_forward(self.pre_feedforward_norm(x_TD, ctx), ctx)
        return added(x_TD, self.post_feedforward_norm(fed_TD, ctx), ctx.linear)

    def attend(self, x_TD: jax.Array, angles: Angles, cache: PagedCache, ctx: ModelContext) -> jax.Array:
        c, num_tokens, (n, k) = self.config, x_TD.shape[0], (self.num_heads, self.num_kv_heads)
        qkv = linear(x_TD, self.qkv.get_value(), ctx.linear, bias_F=_value(self.qkv_bias))
        q_TNH, k_TKH, v_TKH = jnp.split(qkv.reshape(num_tokens, n + 2 * k, c.head_dim), [n, n + k], axis=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH, ctx), self.k_norm(k_TKH, ctx)
        turn = partial(rotate, ctx=ctx.linear)
        cos_sin = angles[c.ropes[self.index]]
        cache.write(self.index, turn(k_TKH, *cos_sin), v_TKH)
        out_TNH = cache.attend(self.index, turn(q_TNH, *cos_sin), scale=c.query_scale, soft_cap=c.attention_soft_cap)
        return _sum_with_bias(out_TNH.reshape(num_tokens, n * c.head_dim), self.o, self.o_bias, ctx)

    def feed_forward(self, x_TD: jax.Array, ctx: ModelContext) -> jax.Array:
        gate_up = linear(x_TD, self.gate_up.get_value(), ctx.linear, bias_F=_value(self.gate_up_bias))
        gate_TF, up_TF = jnp.split(gate_up, 2, axis=-1)
        activation = ACTIVATIONS[self.config.activation]
        gate_TF = whole_rows(activation, gate_TF) if ctx.linear.is_deterministic else activation(gate_TF)
        return _sum_with_bias(gate_TF * up_TF, self.down, self.down_bias, ctx)


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param.get_value()


def _sum_with_bias(x: jax.Array, weight: nnx.Param, bias: nnx.Param | None, ctx: ModelContext) -> jax.Array:
    """Returns x @ weight.T + bias, where each device has some columns of the weight; the bias is added once, to the sum."""
    sums = ctx.sum_over_devices(linear(x, weight.get_value(), ctx.linear))
    return sums if bias is None else added(sums, bias.get_value()[None, :], ctx.linear)


class DecoderModule(nnx.Module):
    """All layers in the served layout."""

    def __init__(self, config: DecoderConfig, parallel: TensorParallelism, dtype: Any):
        rows = padded_vocab(config.vocab_size, parallel.size)
        self.embedding = parameter((rows, config.hidden_size), (axes.VOCAB, axes.EMBED), dtype)
        self.layers = nnx.List([DecoderLayer(config, index, parallel, dtype) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, config.norm_offset)
        if not config.is_tied:
            self.lm_head = parameter((rows, config.hidden_size), (axes.VOCAB, axes.EMBED), dtype)


class Decoder:
    """A decoder of one configuration, cut over `parallel`; implements `jaxserve.models.model.Model`."""

    is_float32_only = False

    def __init__(self, config: DecoderConfig, parallel: TensorParallelism, dtype: Any):
        self.config = config
        self.parallel = parallel
        self.dtype = dtype
        abstract = nnx.eval_shape(lambda: DecoderModule(config, parallel, dtype))
        self._graphdef, self._abstract_state = nnx.split(abstract)

    @property
    def reads_prompt_len(self) -> bool:
        return any(rope.scaling.reads_prompt_len for rope in self.config.ropes)

    @property
    def trace_key(self) -> Any:
        return self.config, self.parallel, self.dtype

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len

    def kv_specs(self) -> tuple[KVSpec, ...]:
        c = self.config
        return tuple(
            KVSpec("full" if window is None else "window", c.num_kv_heads, c.head_dim, window) for window in c.windows
        )

    @cached_property
    def _parameters(self) -> tuple[Parameter, ...]:
        return decoder_parameters(self.config)

    def parameters(self) -> tuple[Parameter, ...]:
        return self._parameters

    def served_layout(self, leaves: Mapping[str, jax.Array]) -> ServedParams:
        state = jax.tree.map(lambda x: x, self._abstract_state)
        nnx.replace_by_pure_dict(state, serve_decoder(self.config, self.parallel, leaves))
        return tuple(jax.tree.leaves(state))

    def served_specs(self) -> Any:
        params = jax.tree.leaves(self._abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return tuple(spec_for(variable.get_metadata("logical_axes")) for variable in params)

    def _module(self, params: ServedParams) -> DecoderModule:
        return nnx.merge(self._graphdef, jax.tree.unflatten(jax.tree.structure(self._abstract_state), params))

    def backbone(
        self, params: ServedParams, tokens_T: jax.Array, positions_T: jax.Array, cache: PagedCache, ctx: ModelContext
    ) -> jax.Array:
        c, module = self.config, self._module(params)
        x_TD = embed(module.embedding.get_value(), tokens_T, ctx)
        if c.embedding_scale != 1:
            scale = jnp.asarray(c.embedding_scale, x_TD.dtype).astype(jnp.float32)
            x_TD = rounded(x_TD.astype(jnp.float32) * scale, x_TD.dtype, ctx.linear)
        positions_T = jnp.maximum(positions_T, 0)
        angles = {rope: rope.angles(positions_T, cache.prompt_lens_T) for rope in dict.fromkeys(c.ropes)}
        for layer in module.layers:
            x_TD = layer(x_TD, angles, cache, ctx)
        return x_TD

    def final_norm(self, params: ServedParams, hidden_TD: jax.Array, ctx: ModelContext) -> jax.Array:
        return self._module(params).norm(hidden_TD, ctx)

    def logits(self, params: ServedParams, hidden_SD: jax.Array, ctx: ModelContext) -> jax.Array:
        c, module = self.config, self._module(params)
        weight = module.embedding if c.is_tied else module.lm_head
        hidden_SD = module.norm(hidden_SD, ctx)
        return unembed(weight.get_value(), hidden_SD, c.vocab_size, ctx, soft_cap=c.logit_soft_cap)


def sizes_for(config: DecoderConfig, limit: int) -> tuple[int, ...]:
    """Returns the tensor parallel sizes up to `limit` over which such a decoder can be cut."""
    c = config
    shape = {"num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads, "intermediate_size": c.intermediate_size}
    return tuple(size for size in range(1, limit + 1) if divides(size, **shape))


ReadConfig = Callable[[Mapping[str, Any]], DecoderConfig]
"""What a family is: from a config.json to the switches."""
