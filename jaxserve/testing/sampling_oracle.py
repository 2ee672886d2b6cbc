"""What a token is chosen from and which one is drawn, a row at a time in float64: vLLM's documented order of operations.

Written from the documentation, without a look at `jaxserve.execution`; the random number alone is the engine's own.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.request import SamplingParams
from jaxserve.testing.oracle import log_softmax

NEAR_BOUNDARY = 1e-4
"""Of a cumulative probability: float32 sums over a small vocabulary are closer than this to exact ones."""


def adjusted(
    logits_V: np.ndarray,
    sampling: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    forbidden: Iterable[int] = (),
) -> np.ndarray:
    """Returns the logits after masks, bias and penalties."""
    x = logits_V.astype(np.float64)
    ids = np.arange(len(x))
    if sampling.allowed_token_ids is not None:
        x = np.where(np.isin(ids, sampling.allowed_token_ids), x, -np.inf)
    x[list(forbidden)] = -np.inf
    for token_id, bias in (sampling.logit_bias or {}).items():
        x[token_id] += bias
    counts = np.bincount(output, minlength=len(x)) if len(output) else np.zeros(len(x))
    factor = sampling.repetition_penalty
    x = np.where(np.isin(ids, prompt) | (counts > 0), np.where(x > 0, x / factor, x * factor), x)
    return x - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def truncated(x: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Returns adjusted logits after temperature, min-p, top-k and top-p: what is sampled from; greedy ones as they are."""
    if sampling.is_greedy:
        return x
    x = x / sampling.temperature
    if sampling.min_p:
        x = np.where(x >= x.max() + np.log(sampling.min_p), x, -np.inf)
    if sampling.top_k > 0:
        x = np.where(x >= np.sort(x)[-min(sampling.top_k, len(x))], x, -np.inf)
    if sampling.top_p < 1:
        order = np.argsort(-x, kind="stable")
        share = np.cumsum(np.exp(log_softmax(x))[order])
        x = np.where(np.isin(np.arange(len(x)), order[: int(np.searchsorted(share, sampling.top_p)) + 1]), x, -np.inf)
    return x


def draw(x: np.ndarray, key: tuple[int, int], position: int) -> tuple[int, bool]:
    """Returns the token that the random number of a key and a position picks, and whether another is as close as rounding."""
    folded = jax.random.fold_in(jax.random.wrap_key_data(jnp.array(key, jnp.uint32), impl="threefry2x32"), position)
    uniform = float(jax.random.uniform(folded, (), np.float32))
    share = np.cumsum(np.exp(log_softmax(x)))
    return int(np.sum(share <= uniform)), bool(np.min(np.abs(share - uniform)) < NEAR_BOUNDARY)
