"""The model card: what was trained, on what, for how long, and how good it came out."""

import dataclasses
import os
import platform

import jax

from embedded_model.corpus import TokenStream
from embedded_model.evaluation import BIGRAM_PRIOR_TOKENS, Score
from embedded_model.model import LlamaConfig
from embedded_model.training import TrainConfig

_CARD = """\
# The embedded model

A Llama of {num_parameters:.2f} million parameters that completes Python, trained from nothing on the standard library of
{python}. It is here so that `jaxserve` serves real text from a trained network without a
download: for first steps, tests and demonstrations, not for use.

| | |
|---|---|
| architecture | Llama: {layers} layers, hidden {hidden}, SwiGLU {ffn}, tied embeddings |
| attention | {heads} query heads over {kv_heads} KV heads of {head_dim} |
| vocabulary | {vocab}: SentencePiece BPE, byte fallback; newline and runs of 2, 4, 8, 12, 16 spaces are tokens |
| context | {context} tokens |
| parameters | bfloat16, an Orbax checkpoint under `params/` |

## Training

| | train | held out |
|---|---|---|
| files | {train.num_documents:,} | {held_out.num_documents:,} |
| bytes | {train.num_bytes:,} | {held_out.num_bytes:,} |
| tokens | {train_tokens:,} | {held_out_tokens:,} |

The corpus is every distinct `.py` file of the library, its tests included, but for files that are mostly tables of
numbers; about 2 % of the files, by a hash of their path, are held out. The run: {steps:,} steps of
{tokens_per_step:,} tokens, which is {seen:.2f} million tokens or {epochs:.2f} passes over the corpus, in {minutes:.0f} minutes on
{machine}, with Muon for the matrices and
AdamW for the rest. Windows of {windows} tokens. The command:

    {command}

A second run of that command, with the same Python release, jax and machine, gives the same corpus, tokenizer and batches;
the last bits of the sums, and so of the parameters, may differ between machines.

## Held-out loss

Of the bfloat16 parameters, in windows of {context} tokens, on the files that neither model nor tokenizer has seen.

| | nats per token | bits per byte |
|---|---|---|
| unigram | {unigram.nats_per_token:.3f} | {unigram.bits_per_byte:.3f} |
| bigram | {bigram.nats_per_token:.3f} | {bigram.bits_per_byte:.3f} |
| **this model** | **{model.nats_per_token:.3f}** | **{model.bits_per_byte:.3f}** |

The unigram has add-one smoothing; the bigram is interpolated with it, p(b|a) = (count(ab) + c·p(b)) / (count(a) + c), with
the c of {priors} that suits the held-out files best. The model's nats per token by position in the window
(windows open anywhere, in the middle of a line too, which the first positions pay for):
{positions}.

## Samples

Unedited, {sample_tokens} tokens each at most.

{samples}

## Limits

It has the look of Python and not the sense: layout, indentation, `self` and docstrings mostly come out right; brackets often
do not close, names are made up, and no algorithm is ever right. Decoded greedily it falls into a loop within a few lines; draw
at a temperature of about 0.8 instead. It knows no other language and no facts, follows no instructions, and was never trained
beyond {context} tokens.

## Licence

The training text is the Python standard library, © Python Software Foundation and others, under the PSF License Agreement
(version 2) and the licences that its files name. A sample may repeat passages of it.
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run has to tell."""

    config: LlamaConfig
    train_config: TrainConfig
    num_parameters: int
    train: TokenStream
    held_out: TokenStream
    seconds: float
    scores: dict[str, Score]
    loss_by_position: dict[str, float]
    samples: list[tuple[str, str]]
    sample_tokens: int
    command: str


def render(result: Result) -> str:
    """The card as Markdown."""
    config, train = result.config, result.train_config
    seen = train.steps * train.tokens_per_step
    return _CARD.format(
        num_parameters=result.num_parameters / 1e6,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        train=result.train,
        held_out=result.held_out,
        train_tokens=len(result.train.tokens),
        held_out_tokens=len(result.held_out.tokens),
        steps=train.steps,
        tokens_per_step=train.tokens_per_step,
        seen=seen / 1e6,
        epochs=seen / len(result.train.tokens),
        windows=", ".join(f"{length} ({share:.0%} of the steps)" for length, share in train.phases),
        minutes=result.seconds / 60,
        machine=_machine(),
        command=result.command,
        priors=", ".join(map(str, BIGRAM_PRIOR_TOKENS)),
        positions=", ".join(f"{span}: {loss:.3f}" for span, loss in result.loss_by_position.items()),
        sample_tokens=result.sample_tokens,
        samples="\n\n".join(f"{title}:\n\n```python\n{text.rstrip()}\n```" for title, text in result.samples),
        **result.scores,
    )


def _machine() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else f"{jax.device_count()} × {device.device_kind}"
