"""Files that are written completely or not at all, and folders that nobody else can write to."""

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from bsbr_pl.values import finite


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a value as JSON; numbers that are not finite become null."""
    write_whole(path, json.dumps(finite(value), default=str, allow_nan=False).encode())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a temporary file, then rename it: a reader sees the old file or the new one, also after a full disk or a
    power cut.

    Raises:
        OSError: naming the file; the old file is unchanged.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def own_folder(path: Path) -> Path:
    """Make a folder that belongs to this user and that nobody else can read or write (mode 700).

    Raises:
        OSError: naming the folder; it cannot be made, is a link or a file, or belongs to another user.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "it is a link, not a folder")
        if hasattr(os, "getuid") and status.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
        if status.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return path


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/bsbr_pl, or ~/.cache/bsbr_pl.

    Raises:
        OSError: this user has no home folder.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "bsbr_pl"
    try:
        return Path.home() / ".cache" / "bsbr_pl"
    except RuntimeError:
        raise OSError("there is no home folder to keep files in: set HOME or XDG_CACHE_HOME") from None
