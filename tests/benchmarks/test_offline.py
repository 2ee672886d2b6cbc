"""The comparison runs from start to table, with the peers that are installed here."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import random_checkpoint


@pytest.mark.slow
def test_every_peer_gives_the_same_greedy_tokens(tmp_path):
    report = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.offline", "--models", "14M", "--workloads", "single,8 equal"]
    command += ["--repetitions", "1", "--json", str(report), "--directory", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NUM")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "x best" in done.stdout or "runs alone" in done.stdout
    (figures,) = json.loads(report.read_text())
    for by_peer in figures["runs"].values():
        tokens = [run["tokens"] for runs in by_peer.values() for run in runs]
        assert all(other == tokens[0] for other in tokens)
        assert all(run["tokens_per_s"] > 0 and run["ttft_ms"] > 0 for runs in by_peer.values() for run in runs)


def test_the_same_name_writes_the_same_model(tmp_path, monkeypatch):
    tiny = random_checkpoint.Shape(16, 1, 2, 1, 32, 64, is_tied=False)
    monkeypatch.setitem(random_checkpoint.SHAPES, "tiny", tiny)
    one, other = (random_checkpoint.write("tiny", tmp_path / place) for place in "ab")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    from jaxserve import LLM, SamplingParams

    with LLM(str(one), use_tqdm=False, skip_tokenizer_init=True, max_num_seqs=1, max_num_batched_tokens=8) as llm:
        assert len(llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)) == 1
