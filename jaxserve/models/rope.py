"""Rotary positions: frequencies, the ways to scale them for longer contexts, and the turn itself.

Semantics are those of Hugging Face transformers, `modeling_rope_utils`, in the half-split form. Sources: Su et al. 2021 (RoPE);
Chen et al. 2023 (linear); Peng et al. 2023 (dynamic NTK, YaRN); Grattafiori et al. 2024 (llama3).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.errors import ConfigError
from jaxserve.models.config_fields import MAX_COUNT, count, flag, one_of, positive, section
from jaxserve.models.linear import LinearContext, rounded
from jaxserve.models.sums import whole_rows


@dataclass(frozen=True, slots=True)
class Scaling:
    """What every scaling answers; this one changes nothing.

    Attributes:
        reads_prompt_len: whether `stretch` ever grows.
    """

    reads_prompt_len: ClassVar[bool] = False

    def frequencies(self, unscaled: np.ndarray, theta: float) -> np.ndarray:
        """Returns radians a position, float32 [H / 2]."""
        del theta
        return unscaled

    def stretch(self, lens_T: jax.Array) -> jax.Array | None:
        """Returns by how much theta^(1 - 2 / H) grows for tokens of sequences of these lengths; None if it never does."""
        del lens_T
        return None

    def amplitude(self) -> float:
        """Returns what cosine and sine are multiplied by."""
        return 1.0

    def max_len(self, max_position_embeddings: int) -> int:
        """Returns the longest context that the scaling is made for [tokens]."""
        return max_position_embeddings


@dataclass(frozen=True, slots=True)
class LinearScaling(Scaling):
    """Positions are divided by `factor`."""

    factor: float

    @classmethod
    def from_huggingface(cls, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> "LinearScaling":
        del config
        return cls(positive(parameters, "factor"))

    def frequencies(self, unscaled: np.ndarray, theta: float) -> np.ndarray:
        del theta
        return unscaled / np.float32(self.factor)

    def max_len(self, max_position_embeddings: int) -> int:
        return int(min(max_position_embeddings * self.factor, MAX_COUNT + 1))


@dataclass(frozen=True, slots=True)
class DynamicScaling(Scaling):
    """NTK-aware scaling that grows with the sequence.

    Transformers rotates by the length that the sequence has at the time of the forward: prompt tokens by the prompt's length, a
    generated token at position p by p + 1; keys in the cache stay as they were written. Up to `original_len` nothing is scaled.
    """

    reads_prompt_len: ClassVar[bool] = True

    factor: float
    original_len: int

    @classmethod
    def from_huggingface(cls, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> "DynamicScaling":
        return cls(positive(parameters, "factor"), count(config, "max_position_embeddings", 2048))

    def stretch(self, lens_T: jax.Array) -> jax.Array:
        ratio_T = jnp.maximum(lens_T, self.original_len).astype(jnp.float32) / self.original_len
        return self.factor * ratio_T - (self.factor - 1)

    def max_len(self, max_position_embeddings: int) -> int:
        return int(min(max_position_embeddings * self.factor, MAX_COUNT + 1))


@dataclass(frozen=True, slots=True)
class Llama3Scaling(Scaling):
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: int

    @classmethod
    def from_huggingface(cls, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> "Llama3Scaling":
        result = cls(
            factor=positive(parameters, "factor"),
            low_freq_factor=positive(parameters, "low_freq_factor"),
            high_freq_factor=positive(parameters, "high_freq_factor"),
            original_len=_original_len(parameters, config),
        )
        if result.high_freq_factor <= result.low_freq_factor:
            raise ConfigError(
                f"config.json: high_freq_factor of RoPE scaling llama3 must be above low_freq_factor "
                f"({result.low_freq_factor}), got {result.high_freq_factor}."
            )
        return result

    def frequencies(self, unscaled: np.ndarray, theta: float) -> np.ndarray:
        del theta
        wavelengths = 2 * math.pi / unscaled
        low_wavelength = self.original_len / self.low_freq_factor
        high_wavelength = self.original_len / self.high_freq_factor
        smooth = (self.original_len / wavelengths - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - smooth) * unscaled / self.factor + smooth * unscaled
        scaled = np.where(wavelengths > low_wavelength, unscaled / self.factor, unscaled)
        is_between = (wavelengths >= high_wavelength) & (wavelengths <= low_wavelength)
        return np.where(is_between, between, scaled).astype(np.float32)


@dataclass(frozen=True, slots=True)
class YarnScaling(Scaling):
    """Frequencies that turn often are kept, slow ones divided by `factor`, with a ramp between; attention is sharpened."""

    factor: float
    original_len: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    is_truncated: bool

    @classmethod
    def from_huggingface(cls, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> "YarnScaling":
        original_len = _original_len(parameters, config)
        implied = count(config, "max_position_embeddings", 2048) / original_len
        factor = positive(parameters, "factor", implied)

        def sharpness(weight: float = 1.0) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        if parameters.get("mscale") and parameters.get("mscale_all_dim"):
            inferred = sharpness(positive(parameters, "mscale")) / sharpness(positive(parameters, "mscale_all_dim"))
        else:
            inferred = sharpness()
        return cls(
            factor=factor,
            original_len=original_len,
            attention_factor=positive(parameters, "attention_factor", inferred),
            beta_fast=positive(parameters, "beta_fast", 32.0),
            beta_slow=positive(parameters, "beta_slow", 1.0),
            is_truncated=flag(parameters, "truncate", True),
        )

    def frequencies(self, unscaled: np.ndarray, theta: float) -> np.ndarray:
        head_dim = 2 * len(unscaled)

        def dimension_that_turns(num_turns: float) -> float:
            """Returns the dimension that turns so often over the original length."""
            return head_dim * math.log(self.original_len / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension_that_turns(self.beta_fast), dimension_that_turns(self.beta_slow)
        if self.is_truncated:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        is_slow = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
        return (unscaled / self.factor * is_slow + unscaled * (1 - is_slow)).astype(np.float32)

    def amplitude(self) -> float:
        return self.attention_factor

    def max_len(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, int(min(self.original_len * self.factor, MAX_COUNT + 1)))


_UNSCALED = Scaling()
_SCALINGS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Scaling]] = {
    "default": lambda parameters, config: _UNSCALED,
    "linear": LinearScaling.from_huggingface,
    "dynamic": DynamicScaling.from_huggingface,
    "llama3": Llama3Scaling.from_huggingface,
    "yarn": YarnScaling.from_huggingface,
}


def _original_len(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Returns the context length of pretraining; beside the RoPE parameters, among them, or else the model's own."""
    if config.get("original_max_position_embeddings") is not None:
        return count(config, "original_max_position_embeddings")
    return count(parameters, "original_max_position_embeddings", count(config, "max_position_embeddings", 2048))


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of whole heads."""

    head_dim: int
    theta: float
    scaling: Scaling = _UNSCALED

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        Raises:
            ConfigError: names the field and what is supported.
        """
        parameters = section(config, "rope_scaling") or section(config, "rope_parameters")
        return cls.from_parameters(parameters, config, head_dim, positive(config, "rope_theta", 10000.0))

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Any], config: Mapping[str, Any], head_dim: int, default_theta: float
    ) -> "Rope":
        """Reads one object of RoPE parameters of a config.json."""
        if "full_attention" in parameters or "sliding_attention" in parameters:
            raise ConfigError(
                "config.json: rope_parameters by layer type belong to another family; give one object for all layers."
            )
        for source in (parameters, config):
            if (part := positive(source, "partial_rotary_factor", 1.0)) != 1:
                raise ConfigError(f"config.json: partial_rotary_factor must be absent or 1 for this family, got {part!r}.")
        theta = positive(parameters, "rope_theta", default_theta)
        if theta <= 1:
            raise ConfigError(f"config.json: rope_theta must be above 1, got {theta!r}.")
        named = {"rope_type": parameters.get("rope_type") or parameters.get("type")}
        kind = one_of(named, "rope_type", tuple(_SCALINGS), "default")
        if kind == "default" and parameters.get("factor") not in (None, 1, 1.0):
            raise ConfigError(
                f"config.json: rope_scaling has factor {parameters['factor']!r} without a rope_type; it must be one of "
                f"{', '.join(_SCALINGS)}."
            )
        if head_dim % 2 or (kind == "dynamic" and head_dim == 2):
            raise ConfigError(
                f"config.json: head_dim must be even for rotary positions, and above 2 for RoPE scaling dynamic, got {head_dim}."
            )
        return cls(head_dim, theta, _SCALINGS[kind](parameters, config))

    def frequencies(self) -> np.ndarray:
        """Returns radians a position, float32 [H / 2]; under "dynamic" scaling those of a short sequence."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(self.head_dim)
        unscaled = (1.0 / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        return self.scaling.frequencies(unscaled, self.theta)

    def angles(self, positions_T: jax.Array, prompt_lens_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cos and sin, float32 [T, 1, H / 2], once a step for all layers that share them.

        Args:
            positions_T: of each token.
            prompt_lens_T: the prompt's length of each token's sequence; only "dynamic" scaling reads it.
        """
        frequencies_TH = jnp.asarray(self.frequencies())[None, :]
        stretch_T = self.scaling.stretch(jnp.maximum(prompt_lens_T, positions_T + 1))
        if stretch_T is not None:
            # (theta * s^(H / (H - 2)))^(-2i / H) = theta^(-2i / H) * s^(-2i / (H - 2))
            powers_H = -np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim - 2)
            frequencies_TH = frequencies_TH * jnp.exp(jnp.log(stretch_T)[:, None] * powers_H[None, :])
        angles_TH = positions_T.astype(jnp.float32)[:, None] * frequencies_TH
        amplitude = self.scaling.amplitude()
        cos_TH, sin_TH = whole_rows(jnp.cos, angles_TH), whole_rows(jnp.sin, angles_TH)
        return amplitude * cos_TH[:, None, :], amplitude * sin_TH[:, None, :]

    def max_len(self, max_position_embeddings: int) -> int:
        """Returns the longest context that the model is made for [tokens]."""
        return self.scaling.max_len(max_position_embeddings)


def rotate(x_TNH: jax.Array, cos_T1H: jax.Array, sin_T1H: jax.Array, ctx: LinearContext) -> jax.Array:
    """Returns x with each pair (i, i + H/2) turned by its position's angle."""
    a, b = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    products = (a * cos_T1H, b * sin_T1H, b * cos_T1H, a * sin_T1H)
    if ctx.is_deterministic:
        # Either product may be fused into the sum, in one rounding, and XLA chooses anew in every program.
        products = lax.optimization_barrier(products)
    a_cos, b_sin, b_cos, a_sin = products
    return rounded(jnp.concatenate([a_cos - b_sin, b_cos + a_sin], axis=-1), x_TNH.dtype, ctx)
