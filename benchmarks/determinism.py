"""What `deterministic=True` costs: deterministic ÷ fast, per workload, a lone request included.

    python -m benchmarks.determinism
    python -m benchmarks.determinism --models 125M --dtypes float32,bfloat16 --repetitions 5

Both engines stand in one process and take turns; which is first turns with every repetition. Output tokens a second are of the
whole workload, from its submission to its last token; the ratio is of the medians. Prints too how many requests each mode answers
alike, tokens and bits of the log-probabilities, alone and in their workload. Measures and prints; never asserts.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import random_checkpoint, workloads
from jaxserve import LLM, SamplingParams

MODES = {"fast": False, "deterministic": True}
NUM_COMPARED = 8
"""Requests of a workload that are asked again alone."""


def _run(llm: LLM, requests: list[workloads.Request], logprobs: int | None = None) -> tuple[float, list[tuple[object, ...]]]:
    """Returns output tokens a second, and each request's tokens with their log-probabilities."""
    params = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True, logprobs=logprobs) for r in requests]
    started = time.monotonic()
    outputs = [output.outputs[0] for output in llm.generate([r.prompt for r in requests], params, use_tqdm=False)]
    elapsed = time.monotonic() - started
    answers = [
        (tuple(o.token_ids), tuple(step[token].logprob for step, token in zip(o.logprobs or (), o.token_ids, strict=False)))
        for o in outputs
    ]
    return sum(r.max_tokens for r in requests) / elapsed, answers


def _engine(path: Path, dtype: str, *, deterministic: bool) -> LLM:
    return LLM(
        str(path),
        dtype=dtype,
        deterministic=deterministic,
        skip_tokenizer_init=True,
        max_num_seqs=workloads.MAX_SEQS,
        max_model_len=workloads.MAX_MODEL_LEN,
        use_tqdm=False,
    )


def compare(model: str, dtype: str, names: list[str], repetitions: int, directory: Path) -> Table:
    """Runs both modes interleaved and returns the table."""
    path, vocab_size = random_checkpoint.write(model, directory), random_checkpoint.SHAPES[model].vocab_size
    engines = {mode: _engine(path, dtype, deterministic=flag) for mode, flag in MODES.items()}
    rates: dict[tuple[str, str], list[float]] = {(mode, name): [] for mode in MODES for name in names}
    same: dict[tuple[str, str], str] = {}
    for llm in engines.values():
        _run(llm, workloads.warm_up(vocab_size))
    for repetition in range(repetitions):
        for name in names:
            for mode in list(MODES)[:: 1 if repetition % 2 == 0 else -1]:
                rate, _ = _run(engines[mode], workloads.requests(name, vocab_size, repetition))
                rates[mode, name].append(rate)
    for name in names:
        for mode, llm in engines.items():
            requests = workloads.requests(name, vocab_size, repetitions)
            _, together = _run(llm, requests, logprobs=0)
            alone = [_run(llm, [request], logprobs=0)[1][0] for request in requests[:NUM_COMPARED]]
            same[mode, name] = f"{sum(a == b for a, b in zip(alone, together, strict=False))}/{len(alone)}"
    for llm in engines.values():
        llm.close()
    table = Table(title=f"{model} random weights, {dtype}, medians of {repetitions} interleaved runs")
    for column in (
        "workload",
        "fast tokens/s",
        "deterministic",
        "deterministic ÷ fast",
        "same alone: fast",
        "deterministic",
    ):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name in names:
        fast, exact = (statistics.median(rates[mode, name]) for mode in MODES)
        table.add_row(name, f"{fast:.1f}", f"{exact:.1f}", f"{exact / fast:.2f}", *(same[mode, name] for mode in MODES))
    return table


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(random_checkpoint.SHAPES), help="of " + ", ".join(random_checkpoint.SHAPES)
    )
    parser.add_argument("--dtypes", default="float32", help="of float32, bfloat16")
    parser.add_argument("--workloads", default=",".join(workloads.NAMES), help="of " + ", ".join(workloads.NAMES))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "jaxserve-bench", help="of the models"
    )
    arguments = parser.parse_args()
    console = Console(width=120)
    for model in arguments.models.split(","):
        for dtype in arguments.dtypes.split(","):
            console.print(compare(model, dtype, arguments.workloads.split(","), arguments.repetitions, arguments.directory))


if __name__ == "__main__":
    main()
