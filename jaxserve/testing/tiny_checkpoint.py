"""Tiny random Llama directories as Hugging Face would write them, for tests: numpy alone, the same bits for the same seed.

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
class TinyLlama:
    """The shape of one tiny model; defaults make about 150,000 parameters.

    Attributes:
        dtype: "float32", "bfloat16" or "float16".
        num_shards: files to spread the tensors over; 1 writes `model.safetensors`.
        tokenizer: "bytes" (a tokenizer.json with the vocabulary size asked for, at least 260), "sentencepiece"
            (a tokenizer.model trained here) or None.
        extra_config: fields to add to config.json, or to replace.
    """

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
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": self.dtype,
        }
        return config | dict(self.extra_config)

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns {Hugging Face name: tensor}, matrices [out, in]."""
        generator = np.random.default_rng(self.seed)
        dtype = _DTYPES[self.dtype]

        def matrix(num_out: int, num_in: int) -> np.ndarray:
            return (generator.standard_normal((num_out, num_in)) * _MATRIX_GAIN / num_in**0.5).astype(dtype)

        def norm() -> np.ndarray:
            return (1 + _NORM_SPREAD * generator.standard_normal(self.hidden_size)).astype(dtype)

        embedding = generator.standard_normal((self.vocab_size, self.hidden_size)) * _EMBEDDING_SCALE
        tensors = {"model.embed_tokens.weight": embedding.astype(dtype)}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for index in range(self.num_layers):
            layer = f"model.layers.{index}"
            tensors[f"{layer}.input_layernorm.weight"] = norm()
            tensors[f"{layer}.self_attn.q_proj.weight"] = matrix(q_width, self.hidden_size)
            tensors[f"{layer}.self_attn.k_proj.weight"] = matrix(kv_width, self.hidden_size)
            tensors[f"{layer}.self_attn.v_proj.weight"] = matrix(kv_width, self.hidden_size)
            tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(self.hidden_size, q_width)
            tensors[f"{layer}.post_attention_layernorm.weight"] = norm()
            tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(self.intermediate_size, self.hidden_size)
            tensors[f"{layer}.mlp.up_proj.weight"] = matrix(self.intermediate_size, self.hidden_size)
            tensors[f"{layer}.mlp.down_proj.weight"] = matrix(self.hidden_size, self.intermediate_size)
        tensors["model.norm.weight"] = norm()
        if not self.is_tied:
            tensors["lm_head.weight"] = matrix(self.vocab_size, self.hidden_size)
        return tensors


def write_tiny_llama(path: str | Path, model: TinyLlama | None = None, **fields: Any) -> Path:
    """Writes a model directory and returns its path.

    Args:
        path: created if needed.
        model: the shape; or give its `fields` by name.
    """
    model = model or TinyLlama(**fields)
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
