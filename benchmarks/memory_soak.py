"""A legal request never runs out of memory: long prompts with the whole vocabulary's log-probabilities, and what they take.

`python -m benchmarks.memory_soak` serves a tiny model with a vocabulary of 128k tokens and asks for prompt_logprobs=-1 on prompts
of 4,096 tokens, more of them than the engine's budget holds at a time. Each result is checked and dropped. Prints resident bytes
beside the formula, `RequestFactory.peak_host_bytes`.
"""

import argparse
import asyncio
import resource
import sys
import threading
import time

import numpy as np

from jaxserve import AsyncLLM, SamplingParams

VOCAB_SIZE = 128_256


def _params() -> dict[str, object]:
    """The smallest Llama with that vocabulary: its logits are the subject, not its layers."""
    generator = np.random.default_rng(0)
    width, heads, head_dim, hidden = 32, 2, 16, 64

    def matrix(num_in: int, num_out: int) -> dict[str, np.ndarray]:
        return {"kernel": generator.standard_normal((num_in, num_out)).astype(np.float32) * num_in**-0.5}

    attention = {name: matrix(width, heads * head_dim) for name in ("q_proj", "k_proj", "v_proj")}
    layer = {
        "input_layernorm": {"scale": np.ones(width, np.float32)},
        "post_attention_layernorm": {"scale": np.ones(width, np.float32)},
        "self_attn": attention | {"o_proj": matrix(heads * head_dim, width)},
        "mlp": {"gate_proj": matrix(width, hidden), "up_proj": matrix(width, hidden), "down_proj": matrix(hidden, width)},
    }
    return {
        "embed_tokens": {"embedding": generator.standard_normal((VOCAB_SIZE, width)).astype(np.float32)},
        "layers": {"0": layer},
        "norm": {"scale": np.ones(width, np.float32)},
    }


def _config(max_model_len: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


def resident_bytes() -> int:
    """Returns what the process has in memory now [bytes]."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


class Peak(threading.Thread):
    """Samples resident bytes until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.resident = 0
        self._stop_event = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_event.wait(0.02):
            self.resident = max(self.resident, resident_bytes())

    def stop(self) -> int:
        self._stop_event.set()
        self.join()
        return self.resident


async def soak(num_requests: int, prompt_len: int, budget: int) -> None:
    llm = await AsyncLLM.create(
        params=_params(),
        config=_config(prompt_len + 64),
        max_num_seqs=8,
        max_num_batched_tokens=512,
        max_host_bytes=budget,
    )
    async with llm:
        sampling = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=-1)
        formula = prompt_len * VOCAB_SIZE * 4
        at_rest = resident_bytes()
        peak = Peak()
        generator = np.random.default_rng(1)
        started = time.monotonic()

        async def one(index: int) -> None:
            prompt = generator.integers(0, VOCAB_SIZE, prompt_len).tolist()
            async for output in llm.generate(prompt, sampling, request_id=str(index)):
                if output.finished:
                    assert output.prompt_logprobs is not None
                    entries = output.prompt_logprobs
                    assert (len(entries), len(entries[-1])) == (prompt_len, VOCAB_SIZE)
                    total = float(np.exp(np.asarray(entries[-1].logprobs_V, np.float64)).sum())
                    assert abs(total - 1) < 1e-3, total

        await asyncio.gather(*(one(i) for i in range(num_requests)))
        took = peak.stop() - at_rest
        seconds = time.monotonic() - started
        mib = {
            "formula, one request": formula,
            "budget": budget,
            "resident over the idle engine, at most": took,
            "resident over the idle engine, afterwards": resident_bytes() - at_rest,
        }
        lines = [f"{num_requests} prompts of {prompt_len} tokens, a vocabulary of {VOCAB_SIZE}, {seconds:.0f} s; MiB:"]
        lines += [f"{name:42}{value / 2**20:8.0f}" for name, value in mib.items()]
        sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=4096)
    parser.add_argument("--budget-mib", type=int, default=5000)
    args = parser.parse_args()
    asyncio.run(soak(args.requests, args.prompt_len, args.budget_mib << 20))


if __name__ == "__main__":
    main()
