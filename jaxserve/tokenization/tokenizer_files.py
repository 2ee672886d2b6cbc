"""The JSON files beside a tokenizer: which tokens begin and end a sequence, which are added, the chat template.

Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json and
chat_template.jinja; each may be missing. Knows nothing of tokenizer.json and tokenizer.model themselves.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that stands beside the vocabulary proper.

    Attributes:
        text: how it is written.
        special: whether skip_special_tokens skips it.
    """

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files say; None where they are silent.

    Attributes:
        tokenizer_class: of tokenizer_config.json.
        model_type: of config.json.
        bos_token: text of the token that begins a sequence.
        eos_token: text of the token that ends one.
        bos_token_id: as in generation_config.json or config.json.
        eos_token_ids: of both of them, in that order, without repetitions.
        add_bos_token: whether encoding puts bos in front.
        add_eos_token: whether encoding puts eos behind.
        added_tokens: by id.
        chat_template: the default one.
    """

    tokenizer_class: str | None
    model_type: str | None
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos_token: bool | None
    add_eos_token: bool | None
    added_tokens: dict[int, AddedToken]
    chat_template: str | None

    @classmethod
    def read(cls, directory: Path) -> "TokenizerFiles":
        """Reads what there is.

        Raises:
            CheckpointError: a file is no JSON object, or a field has the wrong type.
        """
        settings = _read_object(directory / "tokenizer_config.json")
        tokens = _read_object(directory / "special_tokens_map.json") | settings
        generation = _read_object(directory / "generation_config.json")
        config = _read_object(directory / "config.json")
        text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
        sources = [("generation_config.json", generation), ("config.json", config), ("config.json", text_config)]
        eos = [i for name, source in sources for i in _token_ids(name, source, "eos_token_id")]
        bos = [i for name, source in sources for i in _token_ids(name, source, "bos_token_id")]
        return cls(
            tokenizer_class=_optional(settings, "tokenizer_class", str),
            model_type=_optional(config, "model_type", str),
            bos_token=_token_text(tokens, "bos_token"),
            eos_token=_token_text(tokens, "eos_token"),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            add_bos_token=_optional(settings, "add_bos_token", bool),
            add_eos_token=_optional(settings, "add_eos_token", bool),
            added_tokens=_added_tokens(directory, settings),
            chat_template=_chat_template(directory, settings),
        )

    def resolve_bos(self, token_id: Callable[[str], int | None]) -> int | None:
        """The bos id: by text if the tokenizer knows it, otherwise as the configurations have it."""
        found = token_id(self.bos_token) if self.bos_token else None
        return self.bos_token_id if found is None else found

    def resolve_eos(self, token_id: Callable[[str], int | None]) -> tuple[int, ...]:
        """All eos ids: the tokenizer's own first, then those of generation_config.json and config.json."""
        found = token_id(self.eos_token) if self.eos_token else None
        own = () if found is None else (found,)
        return tuple(dict.fromkeys(own + self.eos_token_ids))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}. Download the file again.")
    return content


def _optional(source: dict[str, Any], name: str, kind: type) -> Any:
    value = source.get(name)
    return value if isinstance(value, kind) else None


def _token_text(source: dict[str, Any], name: str) -> str | None:
    """A token is written as its text or as an object with its text in `content`."""
    value = source.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _token_ids(file_name: str, source: dict[str, Any], name: str) -> list[int]:
    value = source.get(name)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{file_name}: {name} must be a token id or a list of them, got {value!r}. Correct the file.")
    return [i for i in ids if i >= 0]  # -1 is how old files say "none"


def _added_tokens(directory: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    added = {}
    for text, token_id in _read_object(directory / "added_tokens.json").items():
        if isinstance(token_id, int) and text:
            added[token_id] = AddedToken(text, special=False)
    decoder = settings.get("added_tokens_decoder")
    for token_id, token in (decoder if isinstance(decoder, dict) else {}).items():
        text = _token_text({"token": token}, "token")
        if text and token_id.isdecimal():
            special = isinstance(token, dict) and bool(token.get("special", False))
            added[int(token_id)] = AddedToken(text, special)
    return added


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja wins; a list of named templates gives "default", or the only one."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}. Download the file again.") from None
    template = settings.get("chat_template") or _read_object(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return template if isinstance(template, str) and template else None
