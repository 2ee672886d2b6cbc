"""The oracle: every family of decoders computed the naive way, in numpy and float64, from the canonical tree.

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


def _is_gemma(config: Mapping[str, Any]) -> bool:
    return config["model_type"].startswith("gemma")


def _norm(p: Mapping[str, np.ndarray], path: str, x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    scale = p[f"{path}/scale"] + (1 if _is_gemma(config) else 0)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * scale


def _project(p: Mapping[str, np.ndarray], path: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{path}/kernel"] + p.get(f"{path}/bias", 0)


def _soft_cap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap else x


def _rope_parameters(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """Returns the RoPE parameters of one layer, whichever spelling the config.json has."""
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    parameters = parameters.get(layer_type, parameters)
    theta = config.get("rope_theta", 10000.0)
    if config["model_type"] == "gemma3_text" and layer_type == "sliding_attention":
        parameters = parameters if "rope_theta" in parameters else {}
        theta = config.get("rope_local_base_freq", 10000.0)
    return {"rope_theta": theta} | parameters


def _angles(config: Mapping[str, Any], layer_type: str, head_dim: int, lens: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns radians [T, H/2] and what cosine and sine are multiplied by; `lens` [T] is the sequence's at each forward."""
    r = _rope_parameters(config, layer_type)
    base, kind, factor = r["rope_theta"], r.get("rope_type", r.get("type", "default")), r.get("factor", 1.0)
    exponents = np.arange(0, head_dim, 2) / head_dim
    inverse, amplitude = base**-exponents, 1.0
    original = r.get("original_max_position_embeddings", config["max_position_embeddings"])
    if kind == "linear":
        inverse = inverse / factor
    elif kind == "dynamic":
        ratio = np.maximum(lens, config["max_position_embeddings"]) / config["max_position_embeddings"]
        bases = base * (factor * ratio - (factor - 1)) ** (head_dim / (head_dim - 2))
        inverse = bases[:, None] ** -exponents[None, :]
    elif kind == "llama3":
        turns = original * inverse / (2 * np.pi)
        kept = np.clip((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"]), 0, 1)
        inverse = kept * inverse + (1 - kept) * inverse / factor
    elif kind == "yarn":
        fast, slow = (
            head_dim * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base))
            for turns in (r.get("beta_fast", 32), r.get("beta_slow", 1))
        )
        if r.get("truncate", True):
            fast, slow = np.floor(fast), np.ceil(slow)
        fast, slow = max(fast, 0), min(slow, head_dim - 1)
        kept = 1 - np.clip((np.arange(head_dim // 2) - fast) / (slow - fast), 0, 1)
        inverse = kept * inverse + (1 - kept) * inverse / factor
        above, below = r.get("mscale") or 1, r.get("mscale_all_dim") or 0
        below = below if r.get("mscale") else 0
        above = above if below else 1
        amplitude = (1 + 0.1 * above * np.log(factor)) / (1 + 0.1 * below * np.log(factor))
        amplitude = r.get("attention_factor") or amplitude
    elif kind != "default":
        raise ValueError(f"the oracle knows no RoPE scaling {kind!r}")
    return np.arange(len(lens))[:, None] * np.broadcast_to(inverse, (len(lens), head_dim // 2)), amplitude


def _rotate(x: np.ndarray, angles: np.ndarray, amplitude: float) -> np.ndarray:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = amplitude * np.cos(angles)[:, None, :], amplitude * np.sin(angles)[:, None, :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _layer_type(config: Mapping[str, Any], index: int) -> str:
    if config.get("layer_types"):
        return config["layer_types"][index]
    family = config["model_type"]
    if family == "mistral":
        is_sliding = config["sliding_window"] is not None
    elif family in ("qwen2", "qwen3"):
        is_sliding = config.get("use_sliding_window", False) and index >= config["max_window_layers"]
    elif family == "gemma2":
        is_sliding = index % 2 == 0
    elif family == "gemma3_text":
        is_sliding = (index + 1) % config["sliding_window_pattern"] != 0
    else:
        is_sliding = False
    return "sliding_attention" if is_sliding else "full_attention"


def _attend(
    p: Mapping[str, np.ndarray], config: Mapping[str, Any], index: int, x: np.ndarray, lens: np.ndarray
) -> np.ndarray:
    path, num_heads, num_tokens = f"layers/{index}/self_attn", config["num_attention_heads"], len(x)
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    q, k, v = (_project(p, f"{path}/{name}_proj", x).reshape(num_tokens, -1, head_dim) for name in "qkv")
    if f"{path}/q_norm/scale" in p:
        q, k = _norm(p, f"{path}/q_norm", q, config), _norm(p, f"{path}/k_norm", k, config)
    kind = _layer_type(config, index)
    turn = _angles(config, kind, head_dim, lens)
    q, k = _rotate(q, *turn), _rotate(k, *turn)
    k, v = (np.repeat(part, num_heads // config["num_key_value_heads"], axis=1) for part in (k, v))
    scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(config.get("query_pre_attn_scalar", head_dim))
    scores = _soft_cap(scores, config.get("attn_logit_softcapping"))
    back = np.arange(num_tokens)[:, None] - np.arange(num_tokens)[None, :]
    is_seen = back >= 0
    if kind == "sliding_attention":
        is_seen &= back < config["sliding_window"]
    scores = np.where(is_seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return _project(p, f"{path}/o_proj", np.einsum("nqk,knh->qnh", weights, v).reshape(num_tokens, -1))


def _feed_forward(p: Mapping[str, np.ndarray], config: Mapping[str, Any], index: int, x: np.ndarray) -> np.ndarray:
    path = f"layers/{index}/mlp"
    gate = _project(p, f"{path}/gate_proj", x)
    if _is_gemma(config):
        gate = gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = gate / (1 + np.exp(-gate))
    return _project(p, f"{path}/down_proj", gate * _project(p, f"{path}/up_proj", x))


def logits(
    leaves: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    token_ids: Sequence[int],
    num_prompt_tokens: int | None = None,
) -> np.ndarray:
    """Returns float64 logits [T, V] of every position of one sequence; arguments as of `hidden`."""
    x = hidden(leaves, config, token_ids, num_prompt_tokens)
    head = leaves["lm_head/kernel"] if "lm_head/kernel" in leaves else leaves["embed_tokens/embedding"].T
    return _soft_cap(x @ np.asarray(head, np.float64), config.get("final_logit_softcapping"))


def hidden(
    leaves: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    token_ids: Sequence[int],
    num_prompt_tokens: int | None = None,
) -> np.ndarray:
    """Returns float64 hidden states [T, D] of every position of one sequence, after the final norm.

    Args:
        leaves: the canonical tree.
        config: config.json.
        token_ids: prompt and what was generated after it.
        num_prompt_tokens: tokens of the first forward, each later one is a forward of its own; None: all are of the first.
    """
    p = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
    lens = np.maximum(np.arange(len(token_ids)) + 1, num_prompt_tokens or len(token_ids))
    x = p["embed_tokens/embedding"][list(token_ids)] * (np.sqrt(config["hidden_size"]) if _is_gemma(config) else 1)
    for index in range(config["num_hidden_layers"]):
        layer = f"layers/{index}"
        attended = _attend(p, config, index, _norm(p, f"{layer}/input_layernorm", x, config), lens)
        if f"{layer}/pre_feedforward_layernorm/scale" in p:
            x = x + _norm(p, f"{layer}/post_attention_layernorm", attended, config)
            h = _feed_forward(p, config, index, _norm(p, f"{layer}/pre_feedforward_layernorm", x, config))
            x = x + _norm(p, f"{layer}/post_feedforward_layernorm", h, config)
        else:
            x = x + attended
            x = x + _feed_forward(p, config, index, _norm(p, f"{layer}/post_attention_layernorm", x, config))
    return _norm(p, "norm", x, config)


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
        last = logits(leaves, config, context, len(prompt))[-1]
        second, first = np.sort(last)[-2:]
        token = int(np.argmax(last))
        result.token_ids.append(token)
        result.logprobs.append(float(log_softmax(last)[token]))
        result.margins.append(float(first - second))
        context.append(token)
    return result
