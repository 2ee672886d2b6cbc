"""The engines that live in an environment of their own: vLLM's CPU build and llama.cpp. `README.md` says how to get them.

Imported by those environments' interpreters: numpy, gguf and the engine itself, nothing of jaxserve.
"""

import ctypes
import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workloads
from benchmarks.results import Result
from benchmarks.workloads import Request

PREFIX_WORTH_COPYING = 32
"""Fewest tokens that llama.cpp computes once for requests that share them."""


class Vllm:
    """vLLM, compiled, in this process: the loop of its `LLM.generate`, with each step's tokens."""

    def __init__(self, model: str):
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self._engine = LLM(
            model=model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=workloads.MAX_MODEL_LEN,
            max_num_seqs=workloads.MAX_SEQS,
            disable_log_stats=True,
        ).llm_engine
        self._num_added = 0

    def run(self, requests: list[Request]) -> list[Result]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        started = time.monotonic()
        tokens: dict[str, list[int]] = {}
        times: dict[str, list[float]] = {}
        for request in requests:
            params = SamplingParams(
                temperature=0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            name = str(self._num_added)
            self._num_added += 1
            tokens[name], times[name] = [], []
            self._engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.monotonic() - started
            for output in outputs:
                new = list(output.outputs[0].token_ids)
                tokens[output.request_id] += new
                times[output.request_id] += [now] * len(new)
        return [Result(tokens[name], times[name][0], times[name][-1]) for name in tokens]

    def close(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp's C interface: one context of as many sequences as every peer has, continuous batching around `llama_decode`.

    Decoding tokens first, then prompts' tokens up to a batch. A prefix that all requests share is computed once and copied, as
    the others' prefix caches would.
    """

    BATCH = 2048

    def __init__(self, model: str):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._library = llama_cpp
        # Held: the library keeps a bare pointer to it.
        self._log = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(Path(model) / "model-f32.gguf").encode(), options)
        self._context = llama_cpp.llama_init_from_model(self._model, self._context_options())
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {model}/model-f32.gguf")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = batch = llama_cpp.llama_batch_init(self.BATCH, 0, 1)
        fields = (batch.token, batch.pos, batch.logits, batch.n_seq_id)
        self._token, self._position, self._wanted, num_sequences = (np.ctypeslib.as_array(x, (self.BATCH,)) for x in fields)
        num_sequences[:] = 1

    def _context_options(self) -> Any:
        options = self._library.llama_context_default_params()
        options.n_ctx, options.n_seq_max = workloads.MAX_MODEL_LEN * workloads.MAX_SEQS, workloads.MAX_SEQS
        options.n_batch = self.BATCH
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.type_k = options.type_v = 0  # float32
        options.no_perf = True
        return options

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> list[int]:
        """Computes (token, position, sequence, is its successor wanted) and returns the wanted greedy tokens, in order."""
        batch, count = self._batch, len(items)
        tokens, positions, sequences, are_wanted = zip(*items, strict=True)
        self._token[:count], self._position[:count], self._wanted[:count] = tokens, positions, are_wanted
        for index, sequence in enumerate(sequences):
            batch.seq_id[index][0] = sequence
        batch.n_tokens, wanted = count, sum(are_wanted)
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        if not wanted:
            self._library.llama_synchronize(self._context)
            return []
        logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (wanted, self._vocab_size))
        return logits.argmax(1).tolist()

    def _share_prefix(self, prompts: list[list[int]]) -> int:
        """Computes what all prompts begin with, once, for every sequence; returns its length."""
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)  # of each prompt something is left to compute
        length = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        if len(prompts) == 1 or length < PREFIX_WORTH_COPYING:
            return 0
        for start in range(0, length, self.BATCH):
            stop = min(length, start + self.BATCH)
            self._decode([(prompts[0][place], place, 0, False) for place in range(start, stop)])
        for sequence in range(1, len(prompts)):
            self._library.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        return length

    def run(self, requests: list[Request]) -> list[Result]:
        started = time.monotonic()
        self._library.llama_memory_clear(self._memory, False)
        prompts = [r.prompt for r in requests]
        num_computed = [self._share_prefix(prompts)] * len(requests)
        tokens: list[list[int]] = [[] for _ in requests]
        times: list[list[float]] = [[] for _ in requests]
        running = set(range(len(requests)))
        while running:
            items, sampling = [], []
            for s in sorted(running, key=lambda s: (not tokens[s], s)):  # decodes first
                known, first = ([tokens[s][-1]], num_computed[s]) if tokens[s] else (prompts[s], 0)
                last = first + len(known) - 1
                stop = min(last + 1, num_computed[s] + self.BATCH - len(items))
                items += [(known[place - first], place, s, place == last) for place in range(num_computed[s], stop)]
                num_computed[s] = stop
                if stop > last:
                    sampling.append(s)
            new = self._decode(items)
            now = time.monotonic() - started
            for s, token in zip(sampling, new, strict=True):
                tokens[s].append(token)
                times[s].append(now)
                if len(tokens[s]) == requests[s].max_tokens:
                    running.discard(s)
                    self._library.llama_memory_seq_rm(self._memory, s, -1, -1)
        return [Result(tokens[s], times[s][0], times[s][-1]) for s in range(len(requests))]

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
