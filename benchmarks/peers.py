"""The engines that are compared, behind one face: `run(requests)` gives each request's tokens and when its tokens came.

Only the peer that runs is imported. jaxserve through its public API alone.
"""

import os
import time
from typing import Any

from benchmarks import workloads
from benchmarks.foreign_peers import LlamaCpp, Vllm
from benchmarks.results import Result
from benchmarks.workloads import Request


class Jaxserve:
    """This project, by `LLM.generate`."""

    def __init__(self, model: str):
        from jaxserve import LLM

        self._llm = LLM(
            model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_num_seqs=workloads.MAX_SEQS,
            max_model_len=workloads.MAX_MODEL_LEN,
            use_tqdm=False,
        )

    def run(self, requests: list[Request]) -> list[Result]:
        from jaxserve import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
        started = time.monotonic()
        outputs = self._llm.generate([r.prompt for r in requests], params, use_tqdm=False)
        results = []
        for output in outputs:
            timings = output.metrics
            assert timings is not None
            assert timings.first_token is not None
            assert timings.finished is not None
            tokens = output.outputs[0].token_ids
            results.append(Result(tokens, timings.first_token - started, timings.finished - started))
        return results

    def close(self) -> None:
        self._llm.close()


def _load_transformers(model: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    loaded.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return loaded


class TransformersStatic:
    """`generate` on one left-padded batch that runs to its longest request; only tokens that were asked for count."""

    def __init__(self, model: str):
        self._model = _load_transformers(model)

    def run(self, requests: list[Request]) -> list[Result]:
        import torch
        import transformers

        class Clock(transformers.StoppingCriteria):
            """Notes when each step ends."""

            def __init__(self) -> None:
                self.times: list[float] = []

            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                self.times.append(time.monotonic())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        started = time.monotonic()
        width, length = max(len(r.prompt) for r in requests), max(r.max_tokens for r in requests)
        ids, mask = (torch.zeros(len(requests), width, dtype=torch.long) for _ in range(2))
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        clock = Clock()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        return [
            Result(
                out[row, width : width + r.max_tokens].tolist(),
                clock.times[0] - started,
                clock.times[r.max_tokens - 1] - started,
            )
            for row, r in enumerate(requests)
        ]

    def close(self) -> None:
        pass


class TransformersContinuous:
    """transformers' own continuous batching, with pages of 64 tokens and as many tokens a step as jaxserve has."""

    def __init__(self, model: str):
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        pages = workloads.MAX_SEQS * 768 // 64
        self._context = _load_transformers(model).continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=256, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=64,
                num_blocks=pages,
                max_batch_tokens=512,
                max_requests_per_batch=workloads.MAX_SEQS,
                auto_switch_to_flash=False,
                use_cuda_graph=False,
                default_compile_level=0,
            ),
            warmup=False,
        )
        self._manager = self._context.__enter__()

    def run(self, requests: list[Request]) -> list[Result]:
        # Its timestamps are time.perf_counter's.
        started = time.perf_counter()
        ids = [
            self._manager.add_request(r.prompt, max_new_tokens=r.max_tokens, record_timestamps=True, eos_token_id=-1)
            for r in requests
        ]
        done: dict[str, Any] = {}
        while len(done) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the thread of continuous batching has ended")
            elif result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                done[result.request_id] = result
        return [
            Result(list(done[i].generated_tokens), done[i].timestamps[0] - started, done[i].timestamps[-1] - started)
            for i in ids
        ]

    def close(self) -> None:
        self._context.__exit__(None, None, None)


PEERS: dict[str, type[Any]] = {
    "jaxserve": Jaxserve,
    "transformers static": TransformersStatic,
    "transformers continuous": TransformersContinuous,
    "vLLM": Vllm,
    "llama.cpp": LlamaCpp,
}
