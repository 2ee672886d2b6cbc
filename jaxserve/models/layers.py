"""Layers that families share: norm, rotary positions, embedding and unembedding over a sharded vocabulary.

Flax NNX modules hold parameters in the served layout; their metadata names logical axes. Called per device, on local shards.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.errors import ConfigError
from jaxserve.models.config_fields import count, positive
from jaxserve.models.linear import linear_f32
from jaxserve.models.model import ModelContext


def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any) -> nnx.Param:
    """Returns an NNX parameter that declares its logical axes; its value is only ever abstract here."""
    return nnx.Param(jnp.zeros(shape, dtype), logical_axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 inside. Source: Zhang and Sennrich 2019."""

    def __init__(self, size: int, epsilon: float, dtype: Any):
        self.scale = parameter((size,), (None,), dtype)
        self.epsilon = epsilon

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        x = x_TD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x.astype(x_TD.dtype) * self.scale.get_value()[None, :]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """RoPE scaling "llama3": low frequencies are divided by `factor`, high ones kept, those between interpolated.

    Source: Hugging Face transformers, modeling_rope_utils, `_compute_llama3_parameters`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding in the half-split form of Hugging Face.

    Source: Su et al. 2021.
    """

    head_dim: int
    theta: float
    scaling: Llama3Scaling | None = None

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"config.json: rope_scaling must be an object, got {parameters!r}.")
        theta = positive(parameters, "rope_theta", positive(config, "rope_theta", 10000.0))
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return cls(head_dim, theta)
        if kind != "llama3":
            raise ConfigError(f"config.json: rope_scaling type must be one of default, llama3, got {kind!r}.")
        scaling = Llama3Scaling(
            positive(parameters, "factor"),
            positive(parameters, "low_freq_factor"),
            positive(parameters, "high_freq_factor"),
            count(parameters, "original_max_position_embeddings"),
        )
        return cls(head_dim, theta, scaling)

    def frequencies(self) -> np.ndarray:
        """Returns radians a position, float32 [H / 2]."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(self.head_dim)
        frequencies = (1.0 / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        s = self.scaling
        if s is None:
            return frequencies
        wavelengths = 2 * math.pi / frequencies
        low_wavelength = s.original_max_position_embeddings / s.low_freq_factor
        high_wavelength = s.original_max_position_embeddings / s.high_freq_factor
        smooth = (s.original_max_position_embeddings / wavelengths - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        between = (1 - smooth) * frequencies / s.factor + smooth * frequencies
        scaled = np.where(wavelengths > low_wavelength, frequencies / s.factor, frequencies)
        is_between = (wavelengths >= high_wavelength) & (wavelengths <= low_wavelength)
        return np.where(is_between, between, scaled).astype(np.float32)

    def angles(self, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cos and sin, float32 [T, 1, H / 2], once a step for all layers."""
        angles_TH = positions_T.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies())[None, :]
        return jnp.cos(angles_TH)[:, None, :], jnp.sin(angles_TH)[:, None, :]


def rotate(x_TNH: jax.Array, cos_T1H: jax.Array, sin_T1H: jax.Array) -> jax.Array:
    """Returns x with each pair (i, i + H/2) turned by its position's angle."""
    a, b = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos_T1H - b * sin_T1H, b * cos_T1H + a * sin_T1H], axis=-1).astype(x_TNH.dtype)


def embed(table_VD: jax.Array, tokens_T: jax.Array, ctx: ModelContext) -> jax.Array:
    """Returns rows of a table whose vocabulary is cut over the devices: each looks up its own, the sum has all."""
    if ctx.parallel.size == 1:
        return table_VD[tokens_T]
    local = tokens_T - ctx.device_index() * table_VD.shape[0]
    is_mine = (local >= 0) & (local < table_VD.shape[0])
    rows_TD = jnp.where(is_mine[:, None], table_VD[jnp.where(is_mine, local, 0)], jnp.zeros((), table_VD.dtype))
    return ctx.sum_over_devices(rows_TD)


def unembed(weight: jax.Array, hidden_SD: jax.Array, vocab_size: int, ctx: ModelContext, *, transposed: bool) -> jax.Array:
    """Returns this device's logits in float32; columns past the vocabulary, which pad it to divide, are -inf."""
    logits = linear_f32(hidden_SD, weight, ctx.linear, transposed=transposed)
    width = logits.shape[-1]
    if width * ctx.parallel.size == vocab_size:
        return logits
    columns = jnp.arange(width) + ctx.device_index() * width
    return jnp.where((columns < vocab_size)[None, :], logits, -jnp.inf)


def padded_vocab(vocab_size: int, devices: int) -> int:
    """Returns the vocabulary rounded up so that it divides among the devices."""
    return -(-vocab_size // devices) * devices


def pad_rows(table: jax.Array, rows: int) -> jax.Array:
    """Returns the table with zero rows appended up to `rows`."""
    return jnp.pad(table, ((0, rows - table.shape[0]),) + ((0, 0),) * (table.ndim - 1))
