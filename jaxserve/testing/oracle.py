"""The oracle: a Llama computed the naive way, in numpy and float64, from the canonical tree.

No pages, no cache, no batch, no jax: the whole context is computed again for every token. Slow, obvious, and shares no
code with what it checks. Itself checked against transformers where that is installed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Continuation:
    """What greedy decoding gives.

    Attributes:
        token_ids: the tokens.
        logprobs: of each token.
        margins: how far the best logit lies above the second; small ones are ties that another order of sums may turn.
    """

    token_ids: list[int]
    logprobs: list[float]
    margins: list[float]


def _rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def _inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> np.ndarray:
    inverse = 1.0 / config.get("rope_theta", 10000.0) ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = config.get("rope_scaling")
    if not scaling:
        return inverse
    original = scaling["original_max_position_embeddings"]
    result = []
    for f in inverse:
        wavelength = 2 * np.pi / f
        if wavelength < original / scaling["high_freq_factor"]:
            result.append(f)
        elif wavelength > original / scaling["low_freq_factor"]:
            result.append(f / scaling["factor"])
        else:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = (original / wavelength - low) / (high - low)
            result.append((1 - smooth) * f / scaling["factor"] + smooth * f)
    return np.array(result)


def _rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def logits(leaves: Mapping[str, np.ndarray], config: Mapping[str, Any], token_ids: Sequence[int]) -> np.ndarray:
    """Returns float64 logits [T, V] of every position of one sequence."""
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    p = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
    num_tokens = len(token_ids)
    angles = np.arange(num_tokens)[:, None] * _inverse_frequencies(config, head_dim)[None, :]
    future = np.triu(np.full((num_tokens, num_tokens), -np.inf), k=1)
    x = p["embed_tokens/embedding"][list(token_ids)]
    for index in range(config["num_hidden_layers"]):
        layer = f"layers/{index}"
        h = _rms_norm(x, p[f"{layer}/input_layernorm/scale"], config["rms_norm_eps"])
        q, k, v = (
            (h @ p[f"{layer}/self_attn/{name}_proj/kernel"]).reshape(num_tokens, -1, head_dim) for name in ("q", "k", "v")
        )
        q, k = _rotate(q, angles), _rotate(k, angles)
        k, v = (np.repeat(part, num_heads // num_kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(head_dim) + future
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("nqk,knh->qnh", weights, v).reshape(num_tokens, -1)
        x = x + attended @ p[f"{layer}/self_attn/o_proj/kernel"]
        h = _rms_norm(x, p[f"{layer}/post_attention_layernorm/scale"], config["rms_norm_eps"])
        gate, up = h @ p[f"{layer}/mlp/gate_proj/kernel"], h @ p[f"{layer}/mlp/up_proj/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p[f"{layer}/mlp/down_proj/kernel"]
    x = _rms_norm(x, p["norm/scale"], config["rms_norm_eps"])
    return x @ (p["lm_head/kernel"] if "lm_head/kernel" in p else p["embed_tokens/embedding"].T)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Returns x - log(sum(exp(x))) over the last axis."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def greedy(
    leaves: Mapping[str, np.ndarray], config: Mapping[str, Any], prompt: Sequence[int], num_tokens: int
) -> Continuation:
    """Returns the most likely token after the prompt, `num_tokens` times."""
    context = list(prompt)
    result = Continuation([], [], [])
    for _ in range(num_tokens):
        last = logits(leaves, config, context)[-1]
        second, first = np.sort(last)[-2:]
        token = int(np.argmax(last))
        result.token_ids.append(token)
        result.logprobs.append(float(log_softmax(last)[token]))
        result.margins.append(float(first - second))
        context.append(token)
    return result
