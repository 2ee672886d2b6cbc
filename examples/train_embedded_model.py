"""Trains the small Llama that ships inside the package, from nothing but the library of the interpreter it runs on.

    python examples/train_embedded_model.py --output DIR [--checkpoint DIR] [--steps N] [--seed 0] [--small]

Corpus, model, training, evaluation and export each have a file under `examples/embedded_model/`; this one is their order.
A second run with the same `--output` picks up where the first one stopped.
"""

import argparse
import itertools
import logging
import pathlib
import shlex
import sys

import jax
import numpy as np
import sentencepiece
from embedded_model import card, corpus, evaluation, export, training
from embedded_model.model import LlamaConfig
from flax import nnx
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("train_embedded_model")
DEFAULT_STEPS = 2000  # 70 minutes on two cores that do nothing else
SMALL_STEPS = 30
SMALL_CONFIG = LlamaConfig(num_hidden_layers=1, vocab_size=1024)
# One device a core, each with half of the batch: up to twice as fast as one device whose kernels share the cores.
NUM_CPU_DEVICES = 2
SAMPLE_TOKENS = 120
SAMPLE_TEMPERATURE = 0.8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for exports and training state")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder of the final checkpoint (OUTPUT/checkpoint)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {DEFAULT_STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a one-minute smoke run on a slice of the corpus")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    # Orbax has set up the root logger on import.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)
    args.output.mkdir(parents=True, exist_ok=True)

    config = SMALL_CONFIG if args.small else LlamaConfig()
    train = training.TrainConfig(steps=args.steps or (SMALL_STEPS if args.small else DEFAULT_STEPS), seed=args.seed)
    documents = corpus.collect(corpus.standard_library())
    train_documents, held_out_documents = corpus.split(documents[::10] if args.small else documents)
    tokenizer_model = corpus.train_tokenizer(train_documents, config.vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    stream = corpus.TokenStream.pack(train_documents, tokenizer)
    held_out = corpus.TokenStream.pack(held_out_documents, tokenizer)
    for name, part in (("train", stream), ("held out", held_out)):
        log.info("%s: %d files, %d bytes, %d tokens", name, part.num_documents, part.num_bytes, len(part.tokens))

    def on_save(state: training.TrainState, loss: float) -> None:
        training.save_state(args.output / "training_state.npz", state)
        export.export_npz(args.output, state.params, config, tokenizer_model)
        log.info("step %d, %.0f s: loss %.3f, exported to %s", state.step, state.seconds, loss, args.output)

    graphdef, fresh = training.initial_state(config, train)
    state = training.restore_state(args.output / "training_state.npz", fresh)
    with logging_redirect_tqdm():
        state = training.fit(stream, graphdef, state, train, on_save)

    state.params = export.rounded_to_bfloat16(jax.device_put(state.params, jax.devices()[0]))
    scores, by_position = held_out_scores(graphdef, state.params, config, stream, held_out)
    text = card.render(
        card.Result(
            config=config,
            train_config=train,
            num_parameters=sum(array.size for array in jax.tree.leaves(state.params)),
            train=stream,
            held_out=held_out,
            seconds=state.seconds,
            scores=scores,
            loss_by_position=by_position,
            samples=samples(graphdef, state.params, tokenizer),
            sample_tokens=SAMPLE_TOKENS,
            command=command(train),
        )
    )
    checkpoint = args.checkpoint or args.output / "checkpoint"
    export.export_npz(args.output, state.params, config, tokenizer_model)
    export.export_checkpoint(checkpoint, state.params, config, tokenizer_model, text)
    log.info("final parameters in %s and %s", args.output, checkpoint)


def held_out_scores(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    config: LlamaConfig,
    train: corpus.TokenStream,
    held_out: corpus.TokenStream,
) -> tuple[dict[str, evaluation.Score], dict[str, float]]:
    """The loss of the baselines and of the model over the same tokens, and the model's by position in the window."""
    windows = evaluation.model_losses(graphdef, params, held_out, config.max_position_embeddings)
    losses = {
        "unigram": evaluation.unigram_losses(train.tokens, held_out.tokens, config.vocab_size),
        "bigram": evaluation.bigram_losses(train.tokens, held_out.tokens, config.vocab_size),
        "model": windows[~np.isnan(windows)],
    }
    scores = {name: evaluation.Score.of(losses, held_out.num_bytes) for name, losses in losses.items()}
    for name, score in scores.items():
        log.info("held out, %s: %.3f nats/token, %.3f bits/byte", name, score.nats_per_token, score.bits_per_byte)
    edges = (0, 64, 256, 512, config.max_position_embeddings)
    by_position = {f"{a} to {b - 1}": float(np.nanmean(windows[:, a:b])) for a, b in itertools.pairwise(edges)}
    log.info("by position: %s", by_position)
    return scores, by_position


def samples(
    graphdef: nnx.GraphDef, params: nnx.State, tokenizer: sentencepiece.SentencePieceProcessor
) -> list[tuple[str, str]]:
    """A greedy and a drawn continuation of every prompt, as `(title, text)`."""
    drawn = []
    for seed, prompt in enumerate(evaluation.PROMPTS):
        for title, temperature in (("Greedy", 0.0), (f"Temperature {SAMPLE_TEMPERATURE}", SAMPLE_TEMPERATURE)):
            text = evaluation.sample(graphdef, params, tokenizer, prompt, temperature, SAMPLE_TOKENS, seed)
            drawn.append((f"{title}, after `{prompt!r}`", text))
            log.info("--- %s\n%s", title, text)
    return drawn


def command(train: training.TrainConfig) -> str:
    """The command line that repeats this run, without the machine's own paths."""
    small = ["--small"] if "--small" in sys.argv else []
    words = ["examples/train_embedded_model.py", "--output", "DIR", "--steps", str(train.steps), "--seed", str(train.seed)]
    return shlex.join(["python", *words, *small])


if __name__ == "__main__":
    main()
