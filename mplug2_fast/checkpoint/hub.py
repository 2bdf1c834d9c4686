"""Checkpoints on the Hugging Face Hub, by `owner/name` or `owner/name@revision`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mplug2_fast.errors import CheckpointError

FILES = ("config.json", "model.safetensors", "vocab.txt", "README.md")
"""What is downloaded of a repository."""

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def local(path: str | os.PathLike[str]) -> Path:
    """The path itself, or the folder of a downloaded repository if it names one and there is no such file.

    Downloads are cached as usual (`HF_HOME`), and `HF_ENDPOINT` and `HF_TOKEN` are respected.

    Raises:
        CheckpointError: the repository cannot be downloaded.
    """
    name = os.fspath(path)
    repository, _, revision = name.partition("@")
    if not _NAME.fullmatch(name) or name.endswith(_SUFFIXES) or os.path.lexists(name) or os.path.lexists(repository):
        return Path(path)
    if Path(name).parent.is_dir():  # a file in a folder that is there
        return Path(path)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such file or directory; to load it from the Hugging Face Hub: pip install 'mplug2-fast[hub]'"
        ) from error
    options = {"revision": revision or None, "endpoint": os.environ.get("HF_ENDPOINT")}
    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES), **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".: ") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no such file or directory, and the Hugging Face Hub does not give it ({reason}); check the name, "
            "or HF_TOKEN for a private one"
        ) from error
