"""The arguments of `LLM` and `AsyncLLM`: a model by name or by its parameters, fields of `EngineConfig`, and what other engines
know beside them. Checked at once; `build` takes as long as it takes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.build import BuiltEngine, build
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.execution.logits import LogitsProcessor
from jaxserve.model_source import own_model
from jaxserve.tokenization.tokenizer import Tokenizer

_OTHER_ENGINES = {
    "enforce_eager": "every program is compiled ahead of time; there is no eager mode",
    "trust_remote_code": "code from a model repository is never run; register a family with jaxserve.models.registry.register",
    "disable_log_stats": "statistics are not logged; ask LLM.stats()",
    "enable_chunked_prefill": "long prompts are always computed in chunks",
    "swap_space": "a preempted request is computed again; nothing is swapped",
    "cpu_offload_gb": "weights stay on the devices",
    "disable_custom_all_reduce": "XLA chooses the all-reduce",
    "max_seq_len_to_capture": "the programs are compiled for all lengths",
    "distributed_executor_backend": "the devices of one process are used through jax.sharding",
    "tokenizer_mode": "the tokenizer follows from the files",
    "load_format": "the format follows from the files",
    "compilation_config": "the ladder of programs follows from max_num_seqs and max_num_batched_tokens",
}
"""Arguments of vLLM's LLM that are taken, and what they mean here."""


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """What an engine is built from.

    Attributes:
        params, model_config: the caller's own model; both None for one that config.model names.
        tokenizer: of the caller's own model.
    """

    config: EngineConfig
    params: Any = None
    model_config: Any = None
    tokenizer: str | Tokenizer | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    @classmethod
    def of(
        cls,
        model: str | None,
        params: Any,
        model_config: Any,
        tokenizer: str | Tokenizer | None,
        logits_processors: Sequence[LogitsProcessor],
        options: dict[str, Any],
    ) -> "EngineArguments":
        """Checks them, as `LLM` takes them.

        Raises:
            ConfigError: names the argument.
        """
        config = EngineConfig(
            model=model, tokenizer=tokenizer if isinstance(tokenizer, str) else None, **_known_options(options)
        )
        if params is None and model_config is not None:
            raise ConfigError("config is taken only together with params; a checkpoint has its own config.json.")
        if params is not None and model is not None:
            raise ConfigError("model and params exclude each other: give one of them.")
        return cls(config, params, model_config, tokenizer, tuple(logits_processors))

    def build(self, *, show_progress: bool) -> BuiltEngine:
        source = None if self.params is None else own_model(self.params, self.model_config, self.tokenizer)
        return build(self.config, source=source, processors=self.logits_processors, show_progress=show_progress)


def _known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of EngineConfig; warns once of what has no meaning here; refuses what nobody knows."""
    known = set(EngineConfig.__dataclass_fields__) - {"model", "tokenizer"}
    foreign = {name: value for name, value in options.items() if name in _OTHER_ENGINES}
    if foreign:
        meanings = "; ".join(f"{name}: {_OTHER_ENGINES[name]}" for name in foreign)
        warnings.warn(f"These arguments have no effect here. {meanings}.", stacklevel=4)
    unknown = sorted(options.keys() - known - foreign.keys())
    if unknown:
        raise ConfigError(f"There is no argument {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return {name: value for name, value in options.items() if name in known}
