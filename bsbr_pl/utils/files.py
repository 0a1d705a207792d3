"""Files that are written completely or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from bsbr_pl.values import finite


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a value as JSON; numbers that are not finite become null."""
    write_whole(path, json.dumps(finite(value), default=str, allow_nan=False).encode())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a temporary file, then rename it: a reader sees the old file or the new one, also after a full disk or a
    power cut.

    Raises:
        OSError: naming the file; the old file is unchanged.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
