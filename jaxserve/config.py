"""What was asked for (`EngineConfig`) and what the engine runs with (`ResolvedConfig`).

Knows names, defaults and ranges; knows nothing of devices or models: `build` turns the first into the second.
"""

from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from os import PathLike, fspath

from jaxserve.errors import ConfigError

LOGPROBS_MODES = ("raw", "processed")

_TEXTS = (
    "model",
    "tokenizer",
    "compilation_cache_dir",
    "revision",
    "generation_config",
    "reasoning_start",
    "reasoning_end",
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The intent: a field left at None is decided by `build` from the model and the platform.

    Attributes:
        model: a directory (Orbax or Hugging Face), a Hub id, "toy", or None for the embedded model.
        tokenizer: a directory with tokenizer files; None takes the model's own.
        skip_tokenizer_init: no tokenizer: token ids in, token ids out.
        tensor_parallel_size: devices that share one model.
        dtype: of parameters and activations; "auto" is bfloat16 on a GPU and float32 on a CPU.
        max_model_len: longest prompt plus output [tokens].
        max_num_seqs: most requests computed in one step.
        max_num_batched_tokens: most tokens computed in one step; longer prompts are chunked.
        long_prefill_token_threshold: most tokens of one prompt in a step, as long as others can use the rest of it; None is a
            quarter of max_num_batched_tokens, 0 no limit.
        page_size: tokens in a KV page.
        num_pages: pages in the KV pool; overrides both memory settings below.
        gpu_memory_utilization: share of a GPU's memory for weights, programs and KV pool together.
        kv_cache_memory_bytes: size of the KV pool; overrides gpu_memory_utilization.
        max_host_bytes: most of the host's memory that the answers of all running requests may take (log-probabilities above
            all); None is a quarter of the machine's.
        seed: of the engine; a request without its own seed draws from it.
        max_logprobs: largest `logprobs` a request may ask for; -1, the whole vocabulary, is served in any case.
        logprobs_mode: "raw" or "processed": what log-probabilities mean where a request does not say.
        generation_config: where the sampling defaults come from: "auto" (the model's generation_config.json), "vllm" (none), or
            a directory with such a file.
        reasoning_start: text with which the model begins to think, for `thinking_token_budget`; together with reasoning_end.
        reasoning_end: text with which it ends that.
        attention_backend: "auto", or the name of one implementation of paged attention.
        enable_prefix_caching: keep pages that nobody holds, until their room is needed, for prompts that begin alike.
        deterministic: the same request gives the same bits, whatever runs beside it, however it is cut into steps and whatever
            the limits above are; on a CPU.
        token_buckets: sizes of the mixed program [tokens]; fewer start faster, more pad less. The largest must be
            max_num_batched_tokens.
        sequence_buckets: sizes of the decode and head programs [sequences]; likewise, up to max_num_seqs.
        compilation_cache_dir: where compiled programs are kept, so that the next start compiles nothing. None takes a directory
            of the user, or leaves it to jax's persistent cache if that is configured; "" keeps nothing.
        revision: of a Hub id.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    max_host_bytes: int | None = None
    seed: int = 0
    max_logprobs: int = 20
    logprobs_mode: str = "raw"
    generation_config: str = "auto"
    reasoning_start: str | None = None
    reasoning_end: str | None = None
    attention_backend: str = "auto"
    enable_prefix_caching: bool = True
    deterministic: bool = False
    token_buckets: tuple[int, ...] | None = None
    sequence_buckets: tuple[int, ...] | None = None
    compilation_cache_dir: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, fspath(value))
            elif value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} must be a string, a path or None, got {value!r}.")
        for name in (
            "tensor_parallel_size",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "page_size",
            "num_pages",
            "kv_cache_memory_bytes",
            "max_host_bytes",
        ):
            if getattr(self, name) is not None or name == "tensor_parallel_size":
                self._check_count(name, 1, 2**63 - 1, "a whole number of at least 1")
        if self.long_prefill_token_threshold is not None:
            self._check_count("long_prefill_token_threshold", 0, 2**63 - 1, "a whole number of at least 0")
        for name in ("token_buckets", "sequence_buckets"):
            self._check_buckets(name)
        self._check_count("seed", 0, 2**63 - 1, "a whole number in [0, 2**63)")
        self._check_count("max_logprobs", 0, 128, "a whole number in [0, 128]")
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ConfigError(f"logprobs_mode must be one of {', '.join(LOGPROBS_MODES)}, got {self.logprobs_mode!r}.")
        if bool(self.reasoning_start) != bool(self.reasoning_end):
            raise ConfigError(
                f"reasoning_start and reasoning_end go together, got {self.reasoning_start!r} and {self.reasoning_end!r}."
            )
        if not isinstance(self.generation_config, str) or not self.generation_config:
            raise ConfigError(f"generation_config must be auto, vllm or a directory, got {self.generation_config!r}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if not isinstance(self.attention_backend, str):
            raise ConfigError(f"attention_backend must be a string, got {self.attention_backend!r}.")
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        share = self.gpu_memory_utilization
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {share!r}.")
        if self.page_size is not None and (self.page_size & (self.page_size - 1) or not 8 <= self.page_size <= 256):
            raise ConfigError(f"page_size must be a power of two in [8, 256], got {self.page_size}.")

    def _check_buckets(self, name: str) -> None:
        sizes = getattr(self, name)
        if sizes is None:
            return
        sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (None,)
        numbers = [n for n in sizes if type(n) is int]
        is_ascending = len(numbers) == len(sizes) and all(a < b for a, b in pairwise((0, *numbers)))
        if not sizes or not is_ascending:
            raise ConfigError(f"{name} must be ascending whole numbers of at least 1, got {getattr(self, name)!r}.")
        object.__setattr__(self, name, sizes)

    def _check_count(self, name: str, low: int, high: int, allowed: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
            raise ConfigError(f"{name} must be {allowed}, got {value!r}.")
        object.__setattr__(self, name, int(value))


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The fact: what one engine runs with. Units as in `EngineConfig`; every field is decided.

    Attributes:
        model_name: how the service calls the model.
        platform: "cpu" or "gpu".
        max_pages_per_seq: width of a block table row.
        token_buckets: sizes of the backbone's mixed program [tokens], ascending.
        sequence_buckets: sizes of the decode and the head program [sequences], ascending.
        split_size: KV tokens of one attention work item; a constant, so that sums have one order (ADR 0006).
        query_tile: query tokens of one prefill tile.
        max_decode_items: most decode work items in one step.
        max_cached_pages: most pages that the prefix cache may give in one step; 0 without one.
        max_full_scores: most prompt tokens in one step that are scored over the whole vocabulary.
        logits_processors: name and number of parameters of each registered one, in order.
        max_host_bytes: a request whose results could take more is refused; see `jaxserve.host_bytes`.
        reads_prompt_len: keys depend on the prompt's length (RoPE scaling "dynamic"): only prompts of one length share pages.
    """

    model_name: str
    platform: str
    vocab_size: int
    tensor_parallel_size: int
    dtype: str
    kv_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    page_size: int
    num_pages: int
    max_pages_per_seq: int
    token_buckets: tuple[int, ...]
    sequence_buckets: tuple[int, ...]
    split_size: int
    query_tile: int
    max_decode_items: int
    max_cached_pages: int
    max_full_scores: int
    reads_prompt_len: bool
    max_host_bytes: int
    seed: int
    max_logprobs: int
    logprobs_mode: str
    logits_processors: tuple[tuple[str, int], ...]
    attention_backend: str
    deterministic: bool = False
