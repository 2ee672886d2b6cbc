"""A model's name made a directory: a local one, or a Hugging Face Hub id through the Hub's own cache.

Knows which files of a repository are wanted and what can go wrong on the way. Does not read them. The cache belongs to
huggingface_hub (HF_HOME, HF_HUB_CACHE).
"""

import re
from pathlib import Path
from types import ModuleType

from jaxserve.checkpoints import directory, huggingface
from jaxserve.errors import CheckpointError, ModelNotFoundError

ALLOWED_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt")
# Subdirectories hold other formats (onnx/, original/); consolidated.* is the same weights once more.
IGNORED_PATTERNS = ("*/*", "consolidated*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def resolve(model: str, revision: str | None = None) -> Path:
    """Returns the directory of a model, downloading it if need be.

    Args:
        model: an existing directory, or a Hub id "organisation/name".
        revision: branch, tag or commit on the Hub; None for main.

    Raises:
        ModelNotFoundError: neither; or the Hub cannot be reached, does not know it, or wants a token.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelNotFoundError(f"revision must be left out for the local directory {model}, got {revision!r}.")
        return path
    if path.exists():
        raise ModelNotFoundError(f"{model} is a file; give the directory that holds config.json and the weights.")
    if not _HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        raise ModelNotFoundError(
            f"{model!r} is neither an existing directory nor a Hugging Face id of the form organisation/name."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelNotFoundError(
            f"{model} is no local directory, and the package huggingface_hub that could fetch it is not installed; "
            "install it with pip or give a directory."
        ) from error
    cached = _cached(huggingface_hub, model, revision)
    return cached if cached is not None else _download(huggingface_hub, model, revision)


def _cached(hub: ModuleType, model: str, revision: str | None) -> Path | None:
    """Returns the snapshot in the cache if it has everything that loading needs; nothing is asked of the network."""
    try:
        snapshot = hub.snapshot_download(
            model,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(ALLOWED_PATTERNS),
            ignore_patterns=list(IGNORED_PATTERNS),
        )
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        return None
    root = Path(snapshot)
    return root if _is_complete(root) else None


def _is_complete(root: Path) -> bool:
    """Returns whether config.json and every file of weights is there; other programs cache single files of a repository."""
    if not (root / directory.CONFIG).exists():
        return False
    if (root / huggingface.SINGLE).exists():
        return True
    try:
        weight_map = directory.read_json(root, huggingface.INDEX)["weight_map"]
        return all((root / file).exists() for file in set(weight_map.values()))
    except (CheckpointError, KeyError, AttributeError, TypeError):
        return False


def _download(hub: ModuleType, model: str, revision: str | None) -> Path:
    named = model if revision is None else f"{model} at revision {revision!r}"
    errors = hub.errors
    try:
        snapshot = hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(ALLOWED_PATTERNS),
            ignore_patterns=list(IGNORED_PATTERNS),
        )
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{model} is gated: accept its terms on https://huggingface.co/{model} and set HF_TOKEN to a token of that "
            "account."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{model} is not on the Hugging Face Hub, or is private; check the spelling, and set HF_TOKEN if it is private. "
            "It is no local directory either."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{model} has no revision {revision!r}; branches, tags and commits are allowed.") from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{model!r} is no valid Hugging Face id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ModelNotFoundError(_unreachable(hub, named, error)) from error
    root = Path(snapshot)
    if not _is_complete(root):
        if hub.constants.is_offline_mode():
            raise ModelNotFoundError(_unreachable(hub, named, hub.errors.OfflineModeIsEnabled("offline")))
        # A pickle-only repository, whose weights are never fetched; or the network failed and this is what was cached.
        raise ModelNotFoundError(
            f"{named} lacks {directory.CONFIG} or safetensors weights after fetching ({root}). Other formats (pickles, GGUF) "
            "are not fetched: take a repository with .safetensors files, or convert it first. If the network failed, try again."
        )
    return root


def _unreachable(hub: ModuleType, named: str, error: Exception) -> str:
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", None)
    if hub.constants.is_offline_mode() or isinstance(cause, hub.errors.OfflineModeIsEnabled):
        return (
            f"{named} is not complete in the Hugging Face cache ({hub.constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids "
            "to fetch it; unset that once, or give a local directory."
        )
    if status in (401, 403):
        return f"{named} may not be read with this token (HTTP {status}); set HF_TOKEN to one that may."
    if status is not None:
        return f"{named} could not be fetched: the Hugging Face Hub answered HTTP {status}; try again later."
    first_line = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return (
        f"{named} is not in the Hugging Face cache and could not be fetched ({first_line}); check the network, or give a "
        "local directory."
    )
