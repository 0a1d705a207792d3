"""Checkpoint files: atomic writes; integrity checked before loading; no code in a checkpoint is ever executed."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from bsbr_pl.archive import read_archive
from bsbr_pl.utils.files import write_whole
from bsbr_pl.values import one_line

PARTS = ("state_dict", "hyper_parameters", "pytorch-lightning_version")  # every checkpoint has these
TYPES = {
    **dict.fromkeys(("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "callbacks", "loops"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    **dict.fromkeys(("epoch", "global_step"), int),
    "dropout_seed": int | None,
    "initial_weights": str | None,
}


def load_checkpoint(path: str | Path, with_tensors: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, in the memory of the CPU; see bsbr_pl.archive for what is checked.

    Args:
        path: of the file.
        with_tensors: otherwise only the plain values are read; every tensor is None.

    Raises:
        ValueError: naming the file, if it is missing, damaged, not a checkpoint, or has anything but tensors and
            plain values.
    """
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError("it is no regular file")  # of which the end may never come
        with open(path, "rb") as stream:
            checkpoint = read_archive(stream, with_tensors)
        missing = [part for part in PARTS if part not in checkpoint]
        if missing:
            raise ValueError(f"no {', no '.join(missing)}")
        for part, of in TYPES.items():
            if part in checkpoint and not isinstance(checkpoint[part], of):
                raise ValueError(f"{part} is of type {type(checkpoint[part]).__name__}")
    except Exception as error:  # damage can fail anywhere
        raise ValueError(f"{path} is not a readable checkpoint: {_reason(error)}") from error
    return checkpoint


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return f"it contains more than tensors and plain values ({one_line(error, 80)}), and code is never executed"
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    return f"it is damaged, or was not written by train.py ({one_line(error)})"


class CheckedCheckpointIO(TorchCheckpointIO):
    """Makes Lightning read local checkpoints with `load_checkpoint` and write them with `write_whole`.

    Lightning writes to the folder for temporary files and moves the file. From another disk that is not atomic: a full
    disk would lose the older checkpoint. The first checkpoint of a process is read before it is written: a callback
    may keep what `load_checkpoint` refuses.
    """

    def __init__(self) -> None:
        self._readable = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        if not self._readable:
            self._check(content, path)
        write_whole(Path(path), content.getbuffer())

    def _check(self, content: io.BytesIO, path: Any) -> None:
        try:
            read_archive(content, with_tensors=False)
        except (pickle.UnpicklingError, ValueError) as error:
            raise ValueError(
                f"{path} could not be read again ({one_line(error)}): a callback's state may have only dense tensors "
                "and plain values"
            ) from error
        self._readable = True

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(path)
