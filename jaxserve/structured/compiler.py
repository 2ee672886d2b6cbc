"""Compiles schemas, regular expressions and grammars, within limits that hold whatever is sent.

A grammar may take for ever or fail; nobody but the caller that sent it may notice. So each is compiled on a thread of its
own, a few at a time, at a low priority, and its caller waits no longer than a deadline. A thread that is still at it then goes
on alone (nothing can stop it) and its place is given to another one, until too many do that: then callers are told to come
back. Results are kept, refusals too. Called from any thread but the engine's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.errors import InvalidRequestError, OverloadedError
from jaxserve.structured.compiled_grammar import CompiledGrammar
from jaxserve.structured.grammar import GrammarError, lark_text, reason_of
from jaxserve.structured.vocabulary import Vocabulary, is_installed, limits_of
from jaxserve.structured_outputs import PREFIX, StructuredOutputsParams

if TYPE_CHECKING:
    from jaxserve.tokenization.tokenizer import Tokenizer

_STACK_BYTES = 512 << 20
"""Of a compiling thread [bytes of address space; what is not touched takes no memory]. `llguidance` recurses from rule to
rule, and a chain of 8,000 of them overflows 8 MB, which ends the process."""

_NICENESS = 10
"""Added to a compiling thread's: a step of the engine goes first."""

_stack_size_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """What compiling, and each step of a request, may take.

    Attributes:
        deadline_s: from the call to its answer, waiting included [s]. Below the 2 s that are promised.
        max_source_bytes: of a schema, expression or grammar, as UTF-8.
        max_compiling: at a time.
        max_abandoned: threads that go on beyond their deadline; their places are given to others until then.
        max_waiting: callers that wait for a place.
        cache_bytes: for compiled grammars, by the estimate of `_cost`.
        max_lexer_states: of a grammar, over all its requests (about 1 kB each).
        initial_lexer_fuel: see `llguidance.LLParserLimits`.
        step_lexer_fuel: for a token's mask.
        step_max_items: for a token's mask.
        max_items_in_row: of the parser, after a token.
    """

    deadline_s: float = 1.5
    max_source_bytes: int = 128 << 10
    max_compiling: int = 2
    max_abandoned: int = 2
    max_waiting: int = 64
    cache_bytes: int = 256 << 20
    max_lexer_states: int = 50_000
    initial_lexer_fuel: int = 1_000_000
    step_lexer_fuel: int = 100_000
    step_max_items: int = 5_000
    max_items_in_row: int = 500


class _Job:
    """One compilation, which several callers may wait for."""

    def __init__(self) -> None:
        self.is_done = threading.Event()
        self.has_started = False
        self.is_abandoned = False
        self.outcome: CompiledGrammar | GrammarError | Exception | None = None


class GrammarCompiler:
    """Compiles for one model. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        limits: GrammarLimits | None = None,
    ):
        """Reads the vocabulary, unless there is nothing to compile for or with; `compile` tells then.

        Args:
            tokenizer: None where the engine has none.
            vocab_size: the model's.
            eos_token_ids: what ends a request.
            limits: None takes the defaults.
        """
        self.vocab_size = vocab_size
        self._limits = limits or GrammarLimits()
        self._unavailable = _unavailable(tokenizer, vocab_size, eos_token_ids)
        if tokenizer is not None and not self._unavailable:
            self._vocabulary = Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self._places = threading.BoundedSemaphore(self._limits.max_compiling)
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, tuple[CompiledGrammar | GrammarError, int]] = OrderedDict()
        self._cached_bytes = 0
        self._running: dict[bytes, _Job] = {}
        self._num_waiting = 0
        self._num_abandoned = 0

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """The constraint.

        Raises:
            InvalidRequestError: names the field, what is wrong with it and what to do.
            OverloadedError: too many others are being compiled.
        """
        field = f"{PREFIX}.{params.kind}"
        source = getattr(params, params.kind)
        if self._unavailable:
            raise InvalidRequestError(PREFIX, params.kind, *self._unavailable)
        self._check_size(field, params)
        key = hashlib.sha256(repr(params).encode()).digest()
        outcome = self._cached(key) or self._outcome(key, params)
        if isinstance(outcome, CompiledGrammar):
            return outcome
        if isinstance(outcome, GrammarError):
            raise InvalidRequestError(field, source, outcome.allowed, outcome.remedy)
        raise outcome

    def _check_size(self, field: str, params: StructuredOutputsParams) -> None:
        size = len(_source(params).encode()) + len((params.whitespace_pattern or "").encode())
        if size > self._limits.max_source_bytes:
            limit = self._limits.max_source_bytes
            raise InvalidRequestError(field, f"{size} bytes", f"at most {limit} bytes long", "Shorten it.")

    def _cached(self, key: bytes) -> CompiledGrammar | GrammarError | None:
        with self._lock:
            if key not in self._cache:
                return None
            outcome, cost = self._cache[key]
            if isinstance(outcome, CompiledGrammar) and outcome.is_spent:
                del self._cache[key]
                self._cached_bytes -= cost
                return None
            self._cache.move_to_end(key)
            return outcome

    def _outcome(self, key: bytes, params: StructuredOutputsParams) -> CompiledGrammar | GrammarError | Exception:
        """Compiles, or waits for another caller who does."""
        deadline = time.monotonic() + self._limits.deadline_s
        with self._lock:
            job = self._running.get(key)
            is_mine = job is None
            if job is None:
                if self._num_waiting >= self._limits.max_waiting:
                    return self._overloaded()
                job = self._running[key] = _Job()
            self._num_waiting += is_mine
        if is_mine:
            has_place = self._places.acquire(timeout=max(0.0, deadline - time.monotonic()))
            with self._lock:
                self._num_waiting -= 1
            if has_place:
                self._start(key, params, job)
            else:
                self._finish(key, params, job, self._overloaded())
        if job.is_done.wait(max(0.0, deadline - time.monotonic())):
            assert job.outcome is not None
            return job.outcome
        if not job.has_started:
            return self._overloaded()
        self._abandon(job)
        return GrammarError(
            f"something that can be compiled in {self._limits.deadline_s} s",
            "Make it simpler: fewer alternatives, shorter repetitions, no intersections.",
        )

    def _start(self, key: bytes, params: StructuredOutputsParams, job: _Job) -> None:
        job.has_started = True
        thread = threading.Thread(target=self._run, args=(key, params, job), name="compile-grammar", daemon=True)
        try:
            with _stack_size_lock:
                before = threading.stack_size(_STACK_BYTES)
                try:
                    thread.start()
                finally:
                    threading.stack_size(before)
        except RuntimeError:  # no memory for a thread
            self._places.release()
            self._finish(key, params, job, self._overloaded())

    def _run(self, key: bytes, params: StructuredOutputsParams, job: _Job) -> None:
        outcome: CompiledGrammar | GrammarError | Exception
        try:
            outcome = self._compiled(params)
        except GrammarError as error:
            outcome = error
        except Exception as error:  # told to the callers, as the fault of the server that it is
            outcome = error
        with self._lock:
            if job.is_abandoned:
                self._num_abandoned -= 1
            else:
                self._places.release()
        self._finish(key, params, job, outcome)

    def _compiled(self, params: StructuredOutputsParams) -> CompiledGrammar:
        import llguidance

        limits = self._limits
        text = lark_text(params)
        with contextlib.suppress(OSError, AttributeError):  # a sandbox may forbid it, another system lack it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        matcher = llguidance.LLMatcher(
            self._vocabulary.library,
            text,
            log_level=0,
            limits=limits_of(
                max_lexer_states=limits.max_lexer_states,
                initial_lexer_fuel=limits.initial_lexer_fuel,
                step_lexer_fuel=limits.step_lexer_fuel,
                step_max_items=limits.step_max_items,
                max_items_in_row=limits.max_items_in_row,
            ),
        )
        if matcher.is_error():
            raise GrammarError(*_judgement(params.kind, reason_of(matcher.get_error())))
        return CompiledGrammar(self._vocabulary, matcher)

    def _finish(
        self, key: bytes, params: StructuredOutputsParams, job: _Job, outcome: CompiledGrammar | GrammarError | Exception
    ) -> None:
        with self._lock:
            job.outcome = outcome
            del self._running[key]
            if isinstance(outcome, (CompiledGrammar, GrammarError)):
                self._keep(key, outcome, _cost(params, outcome))
        job.is_done.set()

    def _abandon(self, job: _Job) -> None:
        """Gives a place to the next one, though the thread goes on; unless too many do already."""
        with self._lock:
            is_over = job.outcome is not None or job.is_abandoned
            if not is_over and self._num_abandoned < self._limits.max_abandoned:
                job.is_abandoned = True
                self._num_abandoned += 1
                self._places.release()

    def _keep(self, key: bytes, outcome: CompiledGrammar | GrammarError, cost: int) -> None:
        _, before = self._cache.pop(key, (None, 0))
        self._cache[key] = outcome, cost
        self._cached_bytes += cost - before
        while self._cached_bytes > self._limits.cache_bytes and len(self._cache) > 1:
            _, (_, freed) = self._cache.popitem(last=False)
            self._cached_bytes -= freed

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(
            f"{PREFIX}: too many grammars are being compiled. Try again in a moment.", retry_after_s=self._limits.deadline_s
        )


def _cost(params: StructuredOutputsParams, outcome: CompiledGrammar | GrammarError) -> int:
    """An estimate of what is kept [bytes]: measured at 10 to 300 times the text, on top of some tables."""
    if isinstance(outcome, GrammarError):
        return 4096
    return (512 << 10) + 256 * len(_source(params))


def _source(params: StructuredOutputsParams) -> str:
    """What is to be compiled, as one text."""
    source = getattr(params, params.kind)
    return " | ".join(source) if isinstance(source, tuple) else source if isinstance(source, str) else ""


def _judgement(kind: str, reason: str) -> tuple[str, str]:
    """What a refused source should have been, and the remedy."""
    match kind:
        case "json" | "json_object":
            return (
                f"a JSON schema that can be compiled ({reason})",
                "Leave out what is not supported, or say it another way (anyOf for oneOf).",
            )
        case "regex":
            return (
                f"a regular expression that can be compiled ({reason})",
                "Lookarounds and back-references are not supported; the syntax is that of Rust's regex.",
            )
        case "grammar":
            return (
                f"a grammar in GBNF or Lark that can be compiled ({reason})",
                "GBNF begins with root ::=, Lark with start:.",
            )
        case _:
            return f"something that can be compiled ({reason})", "Make it simpler."


def _unavailable(tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int]) -> tuple[str, str] | None:
    """Why nothing can be compiled, and the remedy; None where it can."""
    if tokenizer is None:
        return "absent, as this engine has no tokenizer", "Pass tokenizer=."
    if not any(0 <= i < vocab_size for i in eos_token_ids):
        return "absent, as this model has no end-of-sequence token", "Name one in its generation_config.json (eos_token_id)."
    if not is_installed():
        return "absent, as the package llguidance is missing", "Install it with pip."
    return None
