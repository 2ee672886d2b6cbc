"""Llama 2 and 3: grouped-query attention with rotary positions, a gated feed-forward, RMS norms before each.

Declares the canonical parameters, the served layout made from them, and the forward pass over local shards.
Source: Touvron et al. 2023; Grattafiori et al. 2024; numerics as in Hugging Face `modeling_llama`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import ConfigError
from jaxserve.models.attention import PagedCache
from jaxserve.models.config_fields import count, positive
from jaxserve.models.layers import RMSNorm, Rope, embed, pad_rows, padded_vocab, parameter, rotate, unembed
from jaxserve.models.linear import linear
from jaxserve.models.model import ModelContext, ServedParams
from jaxserve.models.weights import Parameter
from jaxserve.plan import KVSpec
from sharding import axes
from sharding.mesh import TensorParallelism, divides
from sharding.rules import spec_for


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of one Llama; D, F, N, K, H, V, L in order of STYLE's letters."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_layers: int
    rms_norm_eps: float
    rope: Rope
    is_tied: bool
    max_position_embeddings: int

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a config.json; raises ConfigError for a field that is missing, wrong, or not implemented here."""
        _refuse_what_is_not_implemented(config)
        hidden_size, num_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
        head_dim = count(config, "head_dim", hidden_size // num_heads)
        result = cls(
            hidden_size=hidden_size,
            intermediate_size=count(config, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=count(config, "num_key_value_heads", num_heads),
            head_dim=head_dim,
            vocab_size=count(config, "vocab_size"),
            num_layers=count(config, "num_hidden_layers"),
            rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
            rope=Rope.from_huggingface(config, head_dim),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=count(config, "max_position_embeddings", 2048),
        )
        if result.num_heads % result.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({result.num_heads}) must be a multiple of "
                f"num_key_value_heads ({result.num_kv_heads})."
            )
        return result


def _refuse_what_is_not_implemented(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for what would change the numbers and is not in this file: better no tokens than wrong ones."""
    for name in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"):
        if config.get(name):
            raise ConfigError(f"config.json: {name} must be absent or false for this family, got {config[name]!r}.")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act must be 'silu', got {config['hidden_act']!r}.")


class LlamaLayer(nnx.Module):
    """One layer in the served layout: q, k and v in one matrix, gate and up in another, a block of columns a device."""

    def __init__(self, config: LlamaConfig, parallel: TensorParallelism, dtype: Any):
        c, t = config, parallel.size
        self.num_heads = c.num_heads // t
        self.num_kv_heads = c.num_kv_heads // parallel.kv
        self.head_dim = c.head_dim
        qkv_width = (self.num_heads + 2 * self.num_kv_heads) * c.head_dim
        self.input_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.qkv = parameter((c.hidden_size, t * qkv_width), (axes.EMBED, axes.FUSED), dtype)
        self.o = parameter((c.num_heads * c.head_dim, c.hidden_size), (axes.HEADS, axes.EMBED), dtype)
        self.post_attention_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.gate_up = parameter((c.hidden_size, 2 * c.intermediate_size), (axes.EMBED, axes.FUSED), dtype)
        self.down = parameter((c.intermediate_size, c.hidden_size), (axes.MLP, axes.EMBED), dtype)

    def __call__(
        self, x_TD: jax.Array, angles: tuple[jax.Array, jax.Array], index: int, cache: PagedCache, ctx: ModelContext
    ) -> jax.Array:
        x_TD = x_TD + self.attend(self.input_norm(x_TD), angles, index, cache, ctx)
        gate_up = linear(self.post_attention_norm(x_TD), self.gate_up.get_value(), ctx.linear)
        gate_TF, up_TF = jnp.split(gate_up, 2, axis=-1)
        return x_TD + ctx.sum_over_devices(linear(jax.nn.silu(gate_TF) * up_TF, self.down.get_value(), ctx.linear))

    def attend(
        self, x_TD: jax.Array, angles: tuple[jax.Array, jax.Array], index: int, cache: PagedCache, ctx: ModelContext
    ) -> jax.Array:
        num_tokens, (n, k, h) = x_TD.shape[0], (self.num_heads, self.num_kv_heads, self.head_dim)
        qkv = linear(x_TD, self.qkv.get_value(), ctx.linear).reshape(num_tokens, n + 2 * k, h)
        q_TNH, k_TKH, v_TKH = jnp.split(qkv, [n, n + k], axis=1)
        cache.write(index, rotate(k_TKH, *angles), v_TKH)
        out_TNH = cache.attend(index, rotate(q_TNH, *angles), scale=h**-0.5)
        return ctx.sum_over_devices(linear(out_TNH.reshape(num_tokens, n * h), self.o.get_value(), ctx.linear))


class LlamaModule(nnx.Module):
    """All layers in the served layout."""

    def __init__(self, config: LlamaConfig, parallel: TensorParallelism, dtype: Any):
        rows = padded_vocab(config.vocab_size, parallel.size)
        self.embedding = parameter((rows, config.hidden_size), (axes.VOCAB, axes.EMBED), dtype)
        self.layers = nnx.List([LlamaLayer(config, parallel, dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.is_tied:
            self.lm_head = parameter((config.hidden_size, rows), (axes.EMBED, axes.VOCAB), dtype)


class Llama:
    """A Llama of one configuration, cut over `parallel`; implements `jaxserve.models.model.Model`."""

    is_float32_only = False

    def __init__(self, config: LlamaConfig, parallel: TensorParallelism, dtype: Any):
        self.config = config
        self.parallel = parallel
        self.dtype = dtype
        abstract = nnx.eval_shape(lambda: LlamaModule(config, parallel, dtype))
        self._graphdef, self._abstract_state = nnx.split(abstract)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], size: int, dtype: Any) -> "Llama":
        parsed = LlamaConfig.from_huggingface(config)
        return cls(parsed, TensorParallelism.of(size, parsed.num_kv_heads), dtype)

    @staticmethod
    def sizes_for(config: Mapping[str, Any], limit: int) -> tuple[int, ...]:
        c = LlamaConfig.from_huggingface(config)
        shape = {"num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads, "intermediate_size": c.intermediate_size}
        return tuple(size for size in range(1, limit + 1) if divides(size, **shape))

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
        return self.config.max_position_embeddings

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return (KVSpec("full", self.config.num_kv_heads, self.config.head_dim),) * self.config.num_layers

    @cached_property
    def _parameters(self) -> tuple[Parameter, ...]:
        c, embed_axis = self.config, axes.EMBED
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        layer = {
            "input_layernorm/scale": ((c.hidden_size,), (None,)),
            "self_attn/q_proj/kernel": ((c.hidden_size, q_width), (embed_axis, axes.HEADS)),
            "self_attn/k_proj/kernel": ((c.hidden_size, kv_width), (embed_axis, axes.KV_HEADS)),
            "self_attn/v_proj/kernel": ((c.hidden_size, kv_width), (embed_axis, axes.KV_HEADS)),
            "self_attn/o_proj/kernel": ((q_width, c.hidden_size), (axes.HEADS, embed_axis)),
            "post_attention_layernorm/scale": ((c.hidden_size,), (None,)),
            "mlp/gate_proj/kernel": ((c.hidden_size, c.intermediate_size), (embed_axis, axes.MLP)),
            "mlp/up_proj/kernel": ((c.hidden_size, c.intermediate_size), (embed_axis, axes.MLP)),
            "mlp/down_proj/kernel": ((c.intermediate_size, c.hidden_size), (axes.MLP, embed_axis)),
        }
        result = [Parameter("embed_tokens/embedding", (c.vocab_size, c.hidden_size), (None, embed_axis))]
        for index in range(c.num_layers):
            result += [Parameter(f"layers/{index}/{path}", *declared) for path, declared in layer.items()]
        result.append(Parameter("norm/scale", (c.hidden_size,), (None,)))
        if not c.is_tied:
            result.append(Parameter("lm_head/kernel", (c.hidden_size, c.vocab_size), (embed_axis, None)))
        return tuple(result)

    def parameters(self) -> tuple[Parameter, ...]:
        return self._parameters

    def served_layout(self, leaves: Mapping[str, jax.Array]) -> ServedParams:
        c = self.config
        rows = padded_vocab(c.vocab_size, self.parallel.size)
        served: dict[str, Any] = {
            "embedding": pad_rows(leaves["embed_tokens/embedding"], rows),
            "norm": {"scale": leaves["norm/scale"]},
            "layers": {index: self._served_layer(leaves, f"layers/{index}") for index in range(c.num_layers)},
        }
        if not c.is_tied:
            served["lm_head"] = pad_rows(leaves["lm_head/kernel"].T, rows).T
        state = jax.tree.map(lambda x: x, self._abstract_state)
        nnx.replace_by_pure_dict(state, served)
        return tuple(jax.tree.leaves(state))

    def _served_layer(self, leaves: Mapping[str, jax.Array], prefix: str) -> dict[str, Any]:
        c = self.config

        def blocks(path: str, inner: int) -> jax.Array:
            """Returns [D, devices, columns of one device]."""
            return leaves[f"{prefix}/{path}"].reshape(c.hidden_size, self.parallel.size, inner)

        attention = f"{prefix}/self_attn"
        q_blocks = self._blocks_of_heads(leaves[f"{attention}/q_proj/kernel"])
        kv_blocks = [self._blocks_of_kv_heads(leaves[f"{attention}/{name}_proj/kernel"]) for name in "kv"]
        qkv = jnp.concatenate([q_blocks, *kv_blocks], axis=2).reshape(c.hidden_size, -1)
        mlp_width = c.intermediate_size // self.parallel.size
        gate_up = jnp.concatenate(
            [blocks("mlp/gate_proj/kernel", mlp_width), blocks("mlp/up_proj/kernel", mlp_width)], axis=2
        )
        o_rows = self._blocks_of_heads(leaves[f"{attention}/o_proj/kernel"].T)
        return {
            "input_norm": {"scale": leaves[f"{prefix}/input_layernorm/scale"]},
            "qkv": qkv,
            "o": o_rows.reshape(c.hidden_size, -1).T,
            "post_attention_norm": {"scale": leaves[f"{prefix}/post_attention_layernorm/scale"]},
            "gate_up": gate_up.reshape(c.hidden_size, -1),
            "down": leaves[f"{prefix}/mlp/down_proj/kernel"],
        }

    def _blocks_of_heads(self, kernel: jax.Array) -> jax.Array:
        """Returns [D, devices, query heads of one device * H].

        Device (a, b) of kv x group has KV heads of block a and, of each one's queries, block b: heads [K, N/K] are cut on both
        axes and put in device order.
        """
        c, p = self.config, self.parallel
        shape = (c.hidden_size, p.kv, c.num_kv_heads // p.kv, p.group, c.num_heads // c.num_kv_heads // p.group, c.head_dim)
        return kernel.reshape(shape).transpose(0, 1, 3, 2, 4, 5).reshape(c.hidden_size, p.size, -1)

    def _blocks_of_kv_heads(self, kernel: jax.Array) -> jax.Array:
        """Returns [D, devices, KV heads of one device * H]; devices of one group hold the same heads."""
        c, p = self.config, self.parallel
        return jnp.repeat(kernel.reshape(c.hidden_size, p.kv, -1), p.group, axis=1)

    def served_specs(self) -> Any:
        params = jax.tree.leaves(self._abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return tuple(spec_for(variable.get_metadata("logical_axes")) for variable in params)

    def _module(self, params: ServedParams) -> LlamaModule:
        return nnx.merge(self._graphdef, jax.tree.unflatten(jax.tree.structure(self._abstract_state), params))

    def backbone(
        self, params: ServedParams, tokens_T: jax.Array, positions_T: jax.Array, cache: PagedCache, ctx: ModelContext
    ) -> jax.Array:
        module = self._module(params)
        x_TD = embed(module.embedding.get_value(), tokens_T, ctx)
        angles = self.config.rope.angles(jnp.maximum(positions_T, 0))
        for index, layer in enumerate(module.layers):
            x_TD = layer(x_TD, angles, index, cache, ctx)
        return x_TD

    def logits(self, params: ServedParams, hidden_SD: jax.Array, ctx: ModelContext) -> jax.Array:
        module = self._module(params)
        weight = module.embedding if self.config.is_tied else module.lm_head
        hidden_SD = module.norm(hidden_SD)
        return unembed(weight.get_value(), hidden_SD, self.vocab_size, ctx, transposed=self.config.is_tied)
