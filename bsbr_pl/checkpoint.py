"""Checkpoint files: written whole or not at all, proven whole before anything is made of them, never run."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from bsbr_pl.utils.files import write_whole
from bsbr_pl.values import one_line

PARTS = ("state_dict", "hyper_parameters", "pytorch-lightning_version")  # without these it is of no use here


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """All that a checkpoint holds, once every part of it has been proven undamaged.

    Raises:
        ValueError: naming the file, where it is missing, damaged, no checkpoint, or holds anything but plain values.
    """
    try:
        with open(path, "rb") as stream:
            _check(stream)
            stream.seek(0)  # the same open file, even if another one has its name by now
            checkpoint = torch.load(stream, map_location=map_location, weights_only=True)
        missing = [part for part in PARTS if part not in checkpoint]
        if missing:
            raise ValueError(f"no {', no '.join(missing)}")
    except Exception as error:  # damage can fail anywhere
        raise ValueError(f"{path} is not a readable checkpoint: {_reason(error)}") from error
    return checkpoint


def _check(stream: IO[bytes]) -> None:
    """Look at what `torch.load` does not: torch writes a CRC-32 of each part of the archive, and ignores it."""
    with zipfile.ZipFile(stream) as archive:
        damaged = archive.testzip()
        # Attributes are 0. One of their bits means a folder, whose content torch takes from memory as it happens to be.
        marked = [part.filename for part in archive.infolist() if part.external_attr]
    if damaged or marked:
        raise zipfile.BadZipFile(f"{damaged or marked[0]} is not what was written")


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own words recommend to load it nevertheless
        return "it holds more than tensors and plain values, and code in a checkpoint is never run"
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    return f"it is damaged, or was not written by train.py ({one_line(error)})"


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's way to a local checkpoint file, through `load_checkpoint` and `write_whole`.

    Lightning's own writes to the folder for temporary files and moves from there, which is no longer one step where
    that is another disk: the older checkpoint is lost if the disk is full.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(path, map_location)
