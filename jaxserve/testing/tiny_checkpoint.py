"""Tiny random model directories as Hugging Face would write them, for tests: numpy alone, the same bits for the same seed.

Weights are scaled so that greedy tokens differ from place to place (a too small model repeats one token, which hides
mistakes). Knows file formats only. Holds no state.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.models.registry import make_model
from jaxserve.models.weights import unflatten

_EMBEDDING_SCALE = 0.4
_MATRIX_GAIN = 2.5  # times 1 / sqrt(fan in)
_NORM_SPREAD = 0.1
_BIAS_SCALE = 0.5

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

LLAMA3_ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "a page holds keys and values of sixteen tokens",
    "plan, dispatch, wait, commit: one step of the engine",
    "Grüße aus Zürich, 你好, мир, 🙂 and 0123456789",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family's config.json and tensors differ from a Llama's.

    Attributes:
        fields: of config.json; every switch of the family is on.
        is_gemma: norms hold their distance from 1, and there are four of them a layer but in the first version.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, Any]
    has_qk_norm: bool = False
    has_post_norms: bool = False
    is_gemma: bool = False


_GEMMA2_FIELDS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 24,
    "final_logit_softcapping": 15.0,
}
_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", "llama", {"attention_bias": False, "mlp_bias": False}),
    "mistral": _Family("MistralForCausalLM", "mistral", {"sliding_window": 24}),
    "qwen2": _Family(
        "Qwen2ForCausalLM", "qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    ),
    "qwen3": _Family("Qwen3ForCausalLM", "qwen3", {"attention_bias": True}, has_qk_norm=True),
    "gemma": _Family("GemmaForCausalLM", "gemma", {"hidden_act": "gelu_pytorch_tanh"}, is_gemma=True),
    "gemma2": _Family(
        "Gemma2ForCausalLM",
        "gemma2",
        _GEMMA2_FIELDS | {"attn_logit_softcapping": 10.0},
        has_post_norms=True,
        is_gemma=True,
    ),
    "gemma3": _Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA2_FIELDS | {"sliding_window_pattern": 2, "rope_theta": 100000.0, "rope_local_base_freq": 1000.0},
        has_qk_norm=True,
        has_post_norms=True,
        is_gemma=True,
    ),
}
FAMILIES = tuple(_FAMILIES)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """The shape of one tiny model; defaults make about 150,000 parameters.

    Attributes:
        family: one of FAMILIES.
        dtype: "float32", "bfloat16" or "float16".
        num_shards: files to spread the tensors over; 1 writes `model.safetensors`.
        tokenizer: "bytes" (a tokenizer.json with the vocabulary size asked for, at least 260), "sentencepiece"
            (a tokenizer.model trained here) or None.
        extra_config: fields to add to config.json, or to replace.
    """

    family: str = "llama"
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 128
    vocab_size: int = 320
    is_tied: bool = False
    rope_scaling: Mapping[str, Any] | None = None
    dtype: str = "float32"
    num_shards: int = 1
    seed: int = 0
    max_position_embeddings: int = 512
    tokenizer: str | None = None
    extra_config: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Returns config.json."""
        family = _FAMILIES[self.family]
        config = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "hidden_act": "silu",
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": self.dtype,
        }
        return config | dict(family.fields) | dict(self.extra_config)

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns {Hugging Face name: tensor}, matrices [out, in]."""
        generator = np.random.default_rng(self.seed)
        dtype = _DTYPES[self.dtype]
        family, config = _FAMILIES[self.family], self.config()
        has_bias = bool(config.get("attention_bias"))
        tensors: dict[str, np.ndarray] = {}

        def matrix(name: str, num_out: int, num_in: int, has_bias: bool = False) -> None:
            weight = generator.standard_normal((num_out, num_in)) * _MATRIX_GAIN / num_in**0.5
            tensors[f"{name}.weight"] = weight.astype(dtype)
            if has_bias:
                tensors[f"{name}.bias"] = (_BIAS_SCALE * generator.standard_normal(num_out)).astype(dtype)

        def norm(name: str, size: int = self.hidden_size) -> None:
            middle = 0 if family.is_gemma else 1
            tensors[f"{name}.weight"] = (middle + _NORM_SPREAD * generator.standard_normal(size)).astype(dtype)

        embedding = generator.standard_normal((self.vocab_size, self.hidden_size)) * _EMBEDDING_SCALE
        tensors["model.embed_tokens.weight"] = embedding.astype(dtype)
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for index in range(self.num_layers):
            layer = f"model.layers.{index}"
            norm(f"{layer}.input_layernorm")
            for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
                matrix(f"{layer}.self_attn.{name}_proj", width, self.hidden_size, has_bias or self.family == "qwen2")
            matrix(f"{layer}.self_attn.o_proj", self.hidden_size, q_width, has_bias)
            if family.has_qk_norm:
                norm(f"{layer}.self_attn.q_norm", self.head_dim)
                norm(f"{layer}.self_attn.k_norm", self.head_dim)
            norm(f"{layer}.post_attention_layernorm")
            if family.has_post_norms:
                norm(f"{layer}.pre_feedforward_layernorm")
                norm(f"{layer}.post_feedforward_layernorm")
            has_mlp_bias = bool(config.get("mlp_bias"))
            matrix(f"{layer}.mlp.gate_proj", self.intermediate_size, self.hidden_size, has_mlp_bias)
            matrix(f"{layer}.mlp.up_proj", self.intermediate_size, self.hidden_size, has_mlp_bias)
            matrix(f"{layer}.mlp.down_proj", self.hidden_size, self.intermediate_size, has_mlp_bias)
        norm("model.norm")
        if not config["tie_word_embeddings"]:
            matrix("lm_head", self.vocab_size, self.hidden_size)
        return tensors


TinyLlama = TinyModel
"""The default family under its own name."""


def write_tiny(path: str | Path, model: TinyModel) -> Path:
    """Writes a model directory, created if needed, and returns its path."""
    from safetensors.numpy import save_file  # where it is not installed, `tensors` still serves

    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n")
    (root / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}) + "\n")
    tensors = model.tensors()
    if model.num_shards == 1:
        save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(root, tensors, model.num_shards)
    for name, data in tokenizer_files(model.tokenizer, model.vocab_size).items():
        (root / name).write_bytes(data)
    return root


def write_tiny_llama(path: str | Path, model: TinyModel | None = None, **fields: Any) -> Path:
    """Writes a Llama's directory and returns its path: `model`, or one of these `fields` by name."""
    return write_tiny(path, model or TinyModel(**fields))


def caller_params(model: TinyLlama) -> dict[str, Any]:
    """Returns the same model as a caller has it in memory: `params` (a nested dict) and `config`, for `LLM`; needs no files."""
    tensors = model.tensors()
    leaves = {}
    for parameter in make_model(model.config()).parameters():
        tensor = tensors[parameter.huggingface_name]
        leaves[parameter.path] = tensor.T if parameter.is_transposed_in_huggingface else tensor
    return {"params": unflatten(leaves), "config": model.config()}


def _write_shards(root: Path, tensors: dict[str, np.ndarray], num_shards: int) -> None:
    from safetensors.numpy import save_file

    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        held = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(held, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@functools.cache
def tokenizer_files(kind: str | None, vocab_size: int) -> dict[str, bytes]:
    """Returns the tokenizer's files by name, trained once a process.

    Args:
        kind: "bytes", "sentencepiece" or None, see `TinyLlama`.
        vocab_size: of the model; ids 0, 1 and 2 are padding, beginning and end.
    """
    if kind is None:
        return {}
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
    }
    if kind == "bytes":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        data = {"tokenizer.json": _byte_level_tokenizer(vocab_size)}
    elif kind == "sentencepiece":
        config["tokenizer_class"] = "LlamaTokenizer"
        data = {"tokenizer.model": _sentencepiece_model(vocab_size)}
    else:
        raise ValueError(f"tokenizer must be 'bytes', 'sentencepiece' or None, got {kind!r}.")
    return data | {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _byte_level_tokenizer(vocab_size: int) -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str(pretty=True).encode()


def _sentencepiece_model(vocab_size: int) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 8),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=0.98,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()
