"""Checkpoint files: atomic writes; integrity checked before loading; no code in a checkpoint is ever executed."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from bsbr_pl.utils.files import write_whole
from bsbr_pl.values import one_line

PARTS = ("state_dict", "hyper_parameters", "pytorch-lightning_version")  # every checkpoint has these


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, after a check of its integrity.

    Raises:
        ValueError: naming the file, if it is missing, damaged, not a checkpoint, or has anything but tensors and
            plain values.
    """
    try:
        with open(path, "rb") as stream:
            _check(stream)
            stream.seek(0)  # the same open file, even if another one has replaced it by now
            checkpoint = torch.load(stream, map_location=map_location, weights_only=True)
        missing = [part for part in PARTS if part not in checkpoint]
        if missing:
            raise ValueError(f"no {', no '.join(missing)}")
    except Exception as error:  # damage can fail anywhere
        raise ValueError(f"{path} is not a readable checkpoint: {_reason(error)}") from error
    return checkpoint


def _check(stream: IO[bytes]) -> None:
    """Check the CRC-32 of each part of the archive: torch writes it, but does not check it."""
    with zipfile.ZipFile(stream) as archive:
        damaged = archive.testzip()
        # Attributes are 0. A bit of them marks a folder; torch would take its content from uninitialised memory.
        marked = [part.filename for part in archive.infolist() if part.external_attr]
    if damaged or marked:
        raise zipfile.BadZipFile(f"{damaged or marked[0]} was changed after it was written")


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's message recommends to load the file nevertheless
        return "it contains more than tensors and plain values; code in a checkpoint is never executed"
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    return f"it is damaged, or was not written by train.py ({one_line(error)})"


class CheckedCheckpointIO(TorchCheckpointIO):
    """Makes Lightning read local checkpoints with `load_checkpoint` and write them with `write_whole`.

    Lightning writes to the folder for temporary files and moves the file. From another disk that is not atomic: a full
    disk would lose the older checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(path, map_location)
