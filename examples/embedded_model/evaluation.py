"""How good the model is: held-out loss beside two counting baselines, and what it writes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx

from embedded_model.corpus import BOS, EOS, TokenStream, evaluation_windows
from embedded_model.model import token_losses

BIGRAM_PRIOR_TOKENS = (4, 16, 64, 256)
PROMPTS = ("def fib(n):", "class Stack:\n    def __init__(self", "import os\n")
SAMPLE_BUFFER = 160


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean held-out loss: per token [nats] and per byte of text [bits]."""

    nats_per_token: float
    bits_per_byte: float

    @classmethod
    def of(cls, losses: np.ndarray, num_bytes: int) -> "Score":
        return cls(float(losses.mean()), float(losses.sum()) / math.log(2) / num_bytes)


def unigram_losses(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> np.ndarray:
    """-log p [nats] of every held-out token but bos, from token frequencies with add-one smoothing."""
    return -np.log(_unigram(train, vocab_size))[held_out[held_out != BOS]]


def _unigram(train: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.bincount(train[train != BOS], minlength=vocab_size) + 1
    return counts / counts.sum()


def bigram_losses(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> np.ndarray:
    """The same from pairs, interpolated: p(b|a) = (count(ab) + c·p(b)) / (count(a) + c), with p(b) the unigram's.

    c is the value of `BIGRAM_PRIOR_TOKENS` that is best on the held-out tokens themselves: the baseline gets the benefit.
    """
    unigram = _unigram(train, vocab_size)
    pairs = np.bincount(train[:-1].astype(np.int64) * vocab_size + train[1:], minlength=vocab_size**2)
    contexts = np.bincount(train[:-1], minlength=vocab_size)
    before, after = held_out[:-1], held_out[1:]
    before, after = before[after != BOS], after[after != BOS]
    seen = pairs[before.astype(np.int64) * vocab_size + after]
    candidates = [-np.log((seen + c * unigram[after]) / (contexts[before] + c)) for c in BIGRAM_PRIOR_TOKENS]
    return min(candidates, key=np.mean)


@functools.partial(jax.jit, static_argnames="graphdef")
def _window_losses(params, inputs, targets, *, graphdef):
    return token_losses(nnx.merge(graphdef, params)(inputs), targets)


def model_losses(graphdef: nnx.GraphDef, params: nnx.State, held_out: TokenStream, length: int) -> np.ndarray:
    """-log p [nats] of every held-out token in windows of `length`: [windows, length], NaN where bos is the target."""
    inputs, targets = evaluation_windows(held_out, length)
    losses = [_window_losses(params, inputs[[row]], targets[[row]], graphdef=graphdef) for row in range(len(inputs))]
    return np.where(targets == BOS, np.nan, np.concatenate(jax.device_get(losses)))


@functools.partial(jax.jit, static_argnames="graphdef")
def _next_token(params, tokens, position, key, temperature, *, graphdef):
    logits = nnx.merge(graphdef, params)(tokens[None])[0, position]
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


def sample(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokenizer: sentencepiece.SentencePieceProcessor,
    prompt: str,
    temperature: float,
    max_new_tokens: int = 120,
    seed: int = 0,
) -> str:
    """The prompt and its continuation, recomputed from the start for every token; temperature 0 is greedy."""
    ids = [BOS, *tokenizer.encode(prompt)]
    key = jax.random.key(seed)
    for _ in range(min(max_new_tokens, SAMPLE_BUFFER - len(ids))):
        tokens = np.full(SAMPLE_BUFFER, EOS, np.int32)
        tokens[: len(ids)] = ids
        position = len(ids) - 1
        step_key = jax.random.fold_in(key, position)
        ids.append(int(_next_token(params, tokens, position, step_key, temperature, graphdef=graphdef)))
        if ids[-1] == EOS:
            break
    return tokenizer.decode([token for token in ids if token not in (BOS, EOS)])
