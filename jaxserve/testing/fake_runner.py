"""A device in numpy: runs a scheduler's plans over real pages and block tables, with the toy model's arithmetic.

Each plan goes through the packing that the real runner uses, so a plan that does not fit its bucket raises, and is then
executed from the packed arrays alone, in the order in which the programs do it: page updates, tokens into pages, contexts read
back through the block table. A page that is missing, stale or somebody else's gives a wrong token. Knows nothing of requests.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.config import ResolvedConfig
from jaxserve.execution.batch import FROM_DEVICE, backbone_layout, pack_backbone
from jaxserve.execution.buckets import BackboneBucket, Ladder, powers_of_two
from jaxserve.models import toy
from jaxserve.outputs import TokenScores
from jaxserve.plan import PromptScores, SampledToken, SequencePlan, StepPlan, StepResult
from jaxserve.request import ALL_LOGPROBS, Request, SamplingParams

NextToken = Callable[[Sequence[int]], int]


def toy_config(**changes: Any) -> ResolvedConfig:
    """Returns what a small engine around the toy model runs with; the fields that follow from others are derived.

    Defaults are small enough for a prompt to be chunked, a pool to run full and a decode to take several work items.
    """
    values: dict[str, Any] = {
        "model_name": "toy",
        "platform": "cpu",
        "vocab_size": toy.VOCAB_SIZE,
        "tensor_parallel_size": 1,
        "dtype": "float32",
        "kv_dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "page_size": 4,
        "split_size": 8,
        "query_tile": 4,
        "seed": 0,
        "max_cached_pages": 0,
        "reads_prompt_len": False,
        "max_host_bytes": 1 << 20,
        "max_logprobs": 5,
        "logprobs_mode": "raw",
        "logits_processors": (),
        "max_full_scores": 4,
        "attention_backend": "auto",
    } | changes
    max_pages = -(-values["max_model_len"] // values["page_size"])
    num_pages = values.setdefault("num_pages", 2 * max_pages)
    splits = -(-values["max_model_len"] // values["split_size"])
    max_tokens = values["max_num_batched_tokens"]
    values.setdefault("long_prefill_token_threshold", max_tokens)
    derived = {
        "max_pages_per_seq": max_pages,
        "token_buckets": powers_of_two(min(4, max_tokens), max_tokens),
        "sequence_buckets": powers_of_two(1, values["max_num_seqs"]),
        "max_decode_items": max(splits, values["max_num_seqs"] + num_pages * values["page_size"] // values["split_size"]),
    }
    return ResolvedConfig(**(derived | values))


def toy_request(
    request_id: str, prompt: Sequence[int] = (65,), *, priority: int = 0, peak_host_bytes: int = 0, **sampling: Any
) -> Request:
    """Returns a validated request; what `SamplingParams` takes goes by its name."""
    fields: dict[str, Any] = {"temperature": 0.0} | sampling
    params = SamplingParams(**fields)
    stops = frozenset(params.stop_token_ids or ())
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=params,
        stop_token_ids=stops,
        priority=priority,
        peak_host_bytes=peak_host_bytes,
    )


def expected(request: Request, config: ResolvedConfig, next_token: NextToken = toy.next_token) -> tuple[list[int], str]:
    """Returns what an engine must answer, recomputed from nothing at each token: its tokens and the finish reason."""
    context, output = list(request.prompt_token_ids), []
    while True:
        token = next_token(context)
        may_stop = len(output) >= request.sampling.min_tokens
        if token in request.stop_token_ids and not may_stop:
            token = min(set(range(config.vocab_size)) - request.stop_token_ids)
        context.append(token)
        output.append(token)
        if token in request.stop_token_ids:
            return output, "stop"
        if len(output) == request.sampling.max_tokens or len(context) == config.max_model_len:
            return output, "length"


@dataclass(slots=True)
class Handle:
    """A step in flight; without a result until it is sampled."""

    plan: StepPlan
    sampling: list[tuple[SequencePlan, list[int]]]
    prompt_scores: dict[str, PromptScores]
    pooled: dict[str, np.ndarray]
    result: StepResult | None = None


class FakeRunner:
    """Implements `jaxserve.engine.StepRunner`.

    Args:
        config: limits of the engine.
        num_groups: block tables a sequence has.
        next_token: the model.

    Attributes:
        plans: all that were dispatched.
        nonfinite: requests whose logits are to be NaN.
        before_wait: called with each step's plan by `wait`, on the engine's thread; may block or raise.
    """

    def __init__(self, config: ResolvedConfig, num_groups: int = 1, next_token: NextToken = toy.next_token):
        self.plans: list[StepPlan] = []
        self.nonfinite: set[str] = set()
        self.before_wait: Callable[[StepPlan], None] = lambda plan: None
        self._config, self._next_token = config, next_token
        self._ladder = Ladder(config)
        self._buffers: dict[BackboneBucket, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
        for bucket in self._ladder.backbones():
            layout = backbone_layout(self._ladder, bucket, num_groups)
            buffer = np.empty(layout.size, np.int32)
            self._buffers[bucket] = buffer, layout.host_views(buffer)
        # No token is -1, so that a slot that nobody has written cannot pass for one.
        self._pages = np.full((num_groups, config.num_pages, config.page_size), -1)
        self._tables = np.zeros((num_groups, config.max_num_seqs, config.max_pages_per_seq), np.int64)
        self._last_token = np.full(config.max_num_seqs, -1)
        self._owners: dict[int, str] = {}
        self._num_waited = 0

    def dispatch(self, plan: StepPlan) -> Handle:
        """Runs a step, as the device would by the time that it is waited for."""
        assert plan.step == len(self.plans), "steps are dispatched in order"
        assert plan.step - self._num_waited <= 1, "at most one step is in flight when the next one is dispatched"
        self.plans.append(plan)
        for admission in plan.admissions:
            self._owners[admission.row] = admission.request_id
        bucket = self._ladder.backbone_for(plan.num_tokens, all(s.num_tokens == 1 for s in plan.sequences))
        buffer, views = self._buffers[bucket]
        buffer[:] = -77  # what packing leaves out must hurt
        sampling = pack_backbone(plan, bucket, self._ladder, views)
        self._check_updates(plan, bucket)
        for group, row, index, page in views["page_updates_U4"]:
            if row < self._config.max_num_seqs:
                self._tables[group, row, index] = page
        self._write(views)
        contexts = self._contexts(sampling, views)
        handle = Handle(plan, list(zip(sampling, contexts, strict=True)), self._prompt_scores(plan), self._pooled(plan))
        if not any(s.has_constraint for s in sampling):
            self.sample(handle, {})
        return handle

    def wait(self, handle: Handle) -> StepResult:
        """Returns a step's tokens; steps are waited for in order, each once."""
        assert handle.plan.step == self._num_waited, "steps are waited for in order, each once"
        self._num_waited += 1
        self.before_wait(handle.plan)
        assert handle.result is not None, "a step is sampled before it is waited for"
        return handle.result

    def _check_updates(self, plan: StepPlan, bucket: BackboneBucket) -> None:
        limit = self._ladder.num_page_updates(bucket)
        for group in range(len(self._tables)):
            assert sum(u.group == group for u in plan.page_updates) <= limit, "a bucket's room for page updates, a group"
        for s in plan.sequences:
            assert self._owners[s.row] == s.request_id, "a row is used by who was admitted to it"

    def _write(self, views: dict[str, np.ndarray]) -> None:
        is_token = views["positions_T"] >= 0
        rows, positions = views["rows_T"][is_token], views["positions_T"][is_token]
        tokens = views["tokens_T"][is_token]
        tokens = np.where(tokens == FROM_DEVICE, self._last_token[rows], tokens)
        assert (tokens >= 0).all(), "a token was read from a row that has sampled none"
        pages = self._tables[:, rows, positions // self._config.page_size]
        slots = pages * self._config.page_size + positions % self._config.page_size
        for written, group_slots in zip(self._pages, slots, strict=True):
            assert len(set(group_slots.tolist())) == len(tokens), "two tokens of one step in one slot"
            written.reshape(-1)[group_slots] = tokens

    def _contexts(self, sampling: list[SequencePlan], views: dict[str, np.ndarray]) -> list[list[int]]:
        """Returns the tokens that each sampling sequence has in its pages."""
        found = []
        for token_index, row in zip(views["sampled_tokens_S"][: len(sampling)], views["sampled_rows_S"], strict=False):
            contexts = self._pages[np.arange(len(self._tables))[:, None], self._tables[:, row]]
            context_len = views["positions_T"][token_index] + 1
            contexts = contexts.reshape(len(self._tables), -1)[:, :context_len]
            assert (contexts == contexts[0]).all(), "the groups' pages hold different tokens"
            found.append(contexts[0].tolist())
        return found

    def sample(self, handle: Handle, allowed: Mapping[str, np.ndarray]) -> None:
        """Samples a dispatched step's tokens, as the head would."""
        assert handle.result is None, "a step is sampled once"
        tokens = {}
        for s, context in handle.sampling:
            forbidden = set(s.forbidden)
            if s.request_id in allowed:
                words = allowed[s.request_id]
                others = {i for i in range(self._config.vocab_size) if not words[i // 32] >> (i % 32) & 1}
                forbidden = others | forbidden if len(others | forbidden) < self._config.vocab_size else others
            tokens[s.request_id] = sampled = self._head(context, s, forbidden)
            self._last_token[s.row] = sampled.token_id
        broken = frozenset(self.nonfinite & tokens.keys())
        tokens |= {request_id: SampledToken(-1) for request_id in broken}
        handle.result = StepResult(handle.plan.step, tokens, broken, handle.prompt_scores, handle.pooled)

    def _head(self, context: list[int], s: SequencePlan, forbidden: Set[int]) -> SampledToken:
        """The toy's logits are 10 for its answer and 0 for everything else; greedy takes the smallest id among equals."""
        answer = self._next_token(context)
        token = answer
        if answer in forbidden:
            token = next(i for i in range(self._config.vocab_size) if i not in forbidden)
        if s.num_logprobs is None:
            return SampledToken(token)
        return SampledToken(token, self._scores(answer, token, s.num_logprobs))

    def _scores(self, answer: int, token: int, num_logprobs: int) -> TokenScores:
        norm = math.log(math.exp(10.0) + self._config.vocab_size - 1)
        logprobs = {i: (10.0 if i == answer else 0.0) - norm for i in range(self._config.vocab_size)}
        rank = 1 + sum(value > logprobs[token] for value in logprobs.values())
        if num_logprobs == ALL_LOGPROBS:
            return TokenScores(logprobs[token], rank, all_logprobs=np.array(list(logprobs.values()), np.float32))
        best = sorted(logprobs.items(), key=lambda item: -item[1])[:num_logprobs]
        return TokenScores(logprobs[token], rank, tuple(i for i, _ in best), tuple(value for _, value in best))

    def _prompt_scores(self, plan: StepPlan) -> dict[str, PromptScores]:
        scores = {}
        for s in plan.sequences:
            if s.scored_token_ids:
                assert s.num_prompt_logprobs is not None
                context = self._pages[0][self._tables[0, s.row]].reshape(-1).tolist()
                tokens = (
                    self._scores(self._next_token(context[: s.start + i + 1]), token, s.num_prompt_logprobs)
                    for i, token in enumerate(s.scored_token_ids)
                )
                scores[s.request_id] = PromptScores(s.start, tuple(tokens))
        return scores

    def _pooled(self, plan: StepPlan) -> dict[str, np.ndarray]:
        """An embedding of the fake: the prompt's length and the sum of its tokens."""
        pooled = {}
        for s in plan.sequences:
            if s.pooling and s.samples:
                context = self._pages[0][self._tables[0, s.row]].reshape(-1)[: s.num_prompt_tokens]
                pooled[s.request_id] = np.array([len(context), context.sum()], np.float32)
        return pooled
