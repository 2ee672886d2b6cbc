"""A process with one peer and one model, that runs a workload whenever it is told to. Started by `benchmarks.offline`.

Speaks JSON lines: one on standard output when it is ready, then for each `{"workload": name, "seed": n}` on standard input one
with the figures. Everything else that anybody prints goes to standard error.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

from benchmarks import workloads
from benchmarks.peers import PEERS
from benchmarks.results import Peer


def _busy_s() -> float:
    """Returns seconds that the machine's cores have worked since it started, for anybody."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:]]
    return (sum(ticks[:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK")


def _peak_mib() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def measure(peer: Peer, name: str, vocab_size: int, seed: int) -> dict[str, Any]:
    """Runs a workload once.

    Returns:
        Output tokens a second, TTFT and ITL (of each request its mean time between tokens; both medians over requests) [ms],
        the cores that others used meanwhile, the process's peak memory, and the tokens.
    """
    requests = workloads.requests(name, vocab_size, seed)
    busy, own, started = _busy_s(), time.process_time(), time.monotonic()
    results = peer.run(requests)
    elapsed = time.monotonic() - started
    others = max(0.0, (_busy_s() - busy - (time.process_time() - own)) / elapsed)
    for request, result in zip(requests, results, strict=True):
        if len(result.token_ids) != request.max_tokens:
            raise RuntimeError(f"{name}: {request.max_tokens} tokens were asked for, {len(result.token_ids)} came")
    gaps = [(r.last_s - r.first_s) / (len(r.token_ids) - 1) for r in results]
    return {
        "tokens_per_s": sum(len(r.token_ids) for r in results) / max(r.last_s for r in results),
        "ttft_ms": statistics.median(r.first_s for r in results) * 1e3,
        "itl_ms": statistics.median(gaps) * 1e3,
        "others_cores": others,
        "peak_mib": _peak_mib(),
        "tokens": [r.token_ids for r in results],
    }


def main() -> None:
    """Serves one peer until standard input ends."""
    name, model, vocab_size, started = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = PEERS[name](model)
    peer.run([workloads.Request(list(range(100, 228)), 1)])
    answers.write(json.dumps({"first_token_s": time.time() - started}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("warm_up"):
            peer.run(workloads.warm_up(vocab_size))
            answers.write("{}\n")
        else:
            answers.write(json.dumps(measure(peer, order["workload"], vocab_size, order["seed"])) + "\n")
    peer.close()
    sys.stderr.flush()
    os._exit(0)  # some engines leave threads behind that do not end


if __name__ == "__main__":
    main()
