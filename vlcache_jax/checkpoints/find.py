"""Where a model is: on the disk, on the hub, or in this package."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlcache_jax import demo
from vlcache_jax.checkpoints.checkpoint import (
    CONFIG_PATTERNS,
    DECODER,
    Progress,
    open_checkpoint,
)
from vlcache_jax.checkpoints.writing import write_checkpoint
from vlcache_jax.errors import reason, short
from vlcache_jax.fields import is_gguf, local_path, shown
from vlcache_jax.files import cache_folder, sha256


def resolve(
    model: str | Path,
    *,
    weights: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Where a model is: a local directory or GGUF file, one of this package, or a download.

    Only weights in safetensors, configuration and tokenizer files are fetched; nothing that is
    fetched is ever run. The demo, of which this package holds what was learned beside a published
    decoder, is put together in the user's cache folder when its weights are first asked for.

    Args:
        model: a directory or a GGUF file; where there is none of that name, `owner/name` on the hub
            or a name of `demo.MODELS`.
        weights: whether a download includes the weights.
        revision: branch, tag or commit of a hub id; its main branch by default.
        progress: called while the demo is put together; see `Progress`.

    Raises:
        ValueError: it is another file, or a `revision` is given for what is not on the hub.
        FileNotFoundError: there is no such directory, nor such a model or revision on the hub, or
            the package of the demo's decoder is not installed.
        OSError: the demo cannot be written to the cache folder.
        ConnectionError: the hub cannot be reached and the model is not in the local cache.
    """
    path, name = local_path(model), str(model)
    if path.is_dir() or is_gguf(path) or (name in demo.MODELS and not path.exists()):
        if revision is not None:
            raise ValueError(
                f"{short(name)} is not on the hub and has no revision={shown(revision)}: leave "
                "that out"
            )
        if path.exists():
            return path
        own = demo.MODELS[name]
        return _merged(own, progress) if weights and (own / DECODER).is_file() else own
    if path.exists():
        raise ValueError(f"{short(path)} is a file, but no GGUF file: give the model's directory")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"no directory {short(name)}: give a model's directory or a hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    files = [*CONFIG_PATTERNS, "*.safetensors"] if weights else [*CONFIG_PATTERNS]
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no directory {short(name)}, and no model of that name on the Hugging Face hub: check "
            "the spelling, or log in with `hf auth login` if the model is private or gated"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"{short(name)} has no revision={shown(revision)} on the hub: check it"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"no directory {short(name)}, and no reply from the hub ({reason(error)}): go online, "
            "or download the model elsewhere and give its directory"
        ) from None
    return Path(found)


def _merged(own: Path, progress: Progress | None) -> Path:
    """The directory of a changed decoder with its changes merged, made if it is not there."""
    mark = sha256(own / DECODER)  # which names the hashes of all that goes into it
    target = cache_folder() / f"{own.name}-{mark[:16]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = open_checkpoint(own)
        write_checkpoint(checkpoint, target, to_hf=True, force=True, progress=progress)
    return target
