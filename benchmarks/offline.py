"""jaxserve beside Hugging Face transformers on one machine: the same random weights, the same requests, in one run.

    make bench
    make bench ARGS="--models 125M --workloads 'single,32 mixed' --repetitions 5"

Each peer is a process of its own that stays; workloads run interleaved (one peer after the other, then the next workload; the
order turns with every repetition), each repetition with other tokens of the same lengths. Medians are shown, and jaxserve over
the best of the others. Start-up is from the start of the process to the first token: of a first start (jaxserve: with an empty
compilation cache) and of a second. Measures and prints; never asserts.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import random_checkpoint, workloads
from benchmarks.peers import PEERS

OWN = "jaxserve"


class Worker:
    """A peer in its own process."""

    def __init__(self, peer: str, model: Path, vocab_size: int, cache: Path):
        # jax's own log lines (no GPU found, ...) and progress bars would break the table.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker; see close)
        command = [sys.executable, "-m", "benchmarks.worker", peer, str(model), str(vocab_size), repr(time.time())]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.first_token_s = self._answer()["first_token_s"]

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"a peer has ended with status {self._process.returncode}:\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def _start_all(
    peers: list[str], model: Path, vocab_size: int, cache: Path
) -> tuple[dict[str, Worker], dict[str, list[float]]]:
    """Starts each peer twice and keeps the second; returns the workers and both times to a first token [s]."""
    startup: dict[str, list[float]] = {}
    workers = {}
    for peer in peers:
        first = Worker(peer, model, vocab_size, cache)
        first.close()
        workers[peer] = Worker(peer, model, vocab_size, cache)
        workers[peer].ask(warm_up=True)
        startup[peer] = [first.first_token_s, workers[peer].first_token_s]
    return workers, startup


def compare(model: str, peers: list[str], names: list[str], repetitions: int, directory: Path) -> dict[str, Any]:
    """Returns every figure of one model: {"startup_s": {peer: [first, second]}, "runs": {workload: {peer: [figures]}}}."""
    path = random_checkpoint.write(model, directory)
    vocab_size = random_checkpoint.SHAPES[model].vocab_size
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {peer: [] for peer in peers} for name in names}
    with tempfile.TemporaryDirectory() as cache:
        workers, startup = _start_all(peers, path, vocab_size, Path(cache))
        for repetition in range(repetitions):
            turned = peers[repetition % len(peers) :] + peers[: repetition % len(peers)]
            for name in names:
                for peer in turned:
                    runs[name][peer].append(workers[peer].ask(workload=name, seed=repetition))
        for worker in workers.values():
            worker.close()
    return {"model": model, "startup_s": startup, "runs": runs}


def _agreement(runs: dict[str, list[dict[str, Any]]], peer: str) -> str:
    """Returns how many requests got the very tokens that jaxserve gave, of all."""
    if OWN not in runs:
        return ""
    pairs = [
        pair
        for own, other in zip(runs[OWN], runs[peer], strict=True)
        for pair in zip(own["tokens"], other["tokens"], strict=True)
    ]
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}"


def print_tables(console: Console, figures: dict[str, Any], repetitions: int) -> None:
    """Prints a table of the workloads and one of start-up and memory."""
    table = Table(title=f"{figures['model']} random weights, float32, medians of {repetitions} interleaved runs")
    for column in ("workload", "peer", "output tokens/s", "min..max", "TTFT ms", "ITL ms", "others' cores", "same tokens"):
        table.add_column(column, justify="left" if column in ("workload", "peer") else "right")
    table.add_column("ratio", justify="right")
    for name, by_peer in figures["runs"].items():
        rates = {peer: statistics.median(r["tokens_per_s"] for r in runs) for peer, runs in by_peer.items()}
        rivals = [rate for peer, rate in rates.items() if peer != OWN]
        for peer, runs in by_peer.items():
            values = [r["tokens_per_s"] for r in runs]
            ratio = f"{rates[OWN] / max(rivals):.2f} x best" if peer == OWN and rivals else ""
            medians = [statistics.median(r[key] for r in runs) for key in ("ttft_ms", "itl_ms", "others_cores")]
            table.add_row(
                name,
                peer,
                f"{rates[peer]:.0f}" if rates[peer] >= 100 else f"{rates[peer]:.1f}",
                f"{min(values):.0f}..{max(values):.0f}",
                f"{medians[0]:.1f}",
                f"{medians[1]:.2f}",
                f"{medians[2]:.2f}",
                "" if peer == OWN else _agreement(by_peer, peer),
                ratio,
            )
        table.add_section()
    console.print(table)
    table = Table(
        "peer", "first start s", "second start s", "peak memory MiB", title="To the first token; memory of the process"
    )
    for peer, (first, second) in figures["startup_s"].items():
        peak = max(r["peak_mib"] for runs in figures["runs"].values() for r in runs[peer])
        table.add_row(peer, f"{first:.1f}", f"{second:.1f}", f"{peak:.0f}")
    console.print(table)


def _machine() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(random_checkpoint.SHAPES), help="of " + ", ".join(random_checkpoint.SHAPES)
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="of " + ", ".join(PEERS))
    parser.add_argument("--workloads", default=",".join(workloads.NAMES), help="of " + ", ".join(workloads.NAMES))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "jaxserve-bench", help="of the models"
    )
    arguments = parser.parse_args()
    models, peers, names = (getattr(arguments, key).split(",") for key in ("models", "peers", "workloads"))
    for given, known in ((models, random_checkpoint.SHAPES), (peers, PEERS), (names, workloads.NAMES)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is unknown; choose from {', '.join(known)}")
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        console.print("torch and transformers are not installed here: jaxserve runs alone.")
        peers = [peer for peer in peers if peer == OWN]
    console.print(f"{time.strftime('%Y-%m-%d')}, {_machine()}, Python {platform.python_version()}")
    everything = []
    for model in models:
        everything.append(compare(model, peers, names, arguments.repetitions, arguments.directory))
        print_tables(console, everything[-1], arguments.repetitions)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything) + "\n")


if __name__ == "__main__":
    main()
