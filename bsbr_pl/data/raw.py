"""Raw text: files that are read as they are, because text loaders rewrite line ends and the bytes are counted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .compressed import decompressed, is_compressed
from .documents import BLOCK, HeldOut, Piece, read_pieces, read_stretch, text_sha256


class Files:
    """Files, one document each, split by the hash of their relative path.

    Files of equal content are in one split: that of the first of them.

    Args:
        files: by relative path
        held_out: what is not trained on
    """

    def __init__(self, files: dict[str, Path], held_out: HeldOut) -> None:
        self.files = dict(sorted(files.items()))
        self.held_out = held_out
        self.total_bytes = total_bytes(list(files.values()))
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        hashes = sha256_of(self.files)
        splits = self._splits(hashes)
        moved = {name: split for name, split in splits.items() if split != self._split_of(name)}
        return {"files": hashes, "moved": moved} if moved else {"files": hashes}

    def pieces(self) -> Iterator[Piece]:
        splits = self._splits(sha256_of(self.files))
        for name, file in self.files.items():
            yield from read_pieces(file, splits[name])

    def _split_of(self, name: str) -> str:
        return self.held_out.split_of(name.encode("utf-8", "surrogateescape"))

    def _splits(self, hashes: dict[str, str]) -> dict[str, str]:
        first: dict[str, str] = {}
        return {name: first.setdefault(content, self._split_of(name)) for name, content in hashes.items()}


class OneFile:
    """One file, cut by position: the start to train on, then validation, then test, a document each."""

    def __init__(self, file: Path, held_out: HeldOut) -> None:
        self.file = file
        self.held_out = held_out
        self.total_bytes = total_bytes([file])
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        return {"file": text_sha256(self.file)}

    def pieces(self) -> Iterator[Piece]:
        size = _text_size(self.file)
        test = self._character_start(round(size * (1 - self.held_out.test)))
        val = self._character_start(round(size * (1 - self.held_out.test - self.held_out.val)))
        with decompressed(self.file) as stream:
            for split, start, stop in (("train", 0, val), ("val", val, test), ("test", test, size)):
                yield from read_stretch(stream, self.file, split, start, stop)

    def _character_start(self, offset: int) -> int:
        """The first byte from offset on that does not continue a UTF-8 character."""
        with decompressed(self.file) as stream:
            if is_compressed(self.file):
                _skip(stream, offset)
            else:
                stream.seek(offset)
            after = stream.read(4)
        return offset + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)


class OwnFiles:
    """Files, one document each, in splits of their own.

    A text that stands in two splits is kept in one: test before validation before training. A split that is missing is
    held out of the training files.

    Args:
        splits: the files of `train` and of `val`, `test` or both, by relative path
        held_out: what is held out of the training files
    """

    def __init__(self, splits: dict[str, dict[str, Path]], held_out: HeldOut) -> None:
        self.splits = {split: dict(sorted(files.items())) for split, files in splits.items()}
        self.held_out = held_out
        self.total_bytes = total_bytes([file for files in splits.values() for file in files.values()])
        self.left_out: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        return {"own_files": {split: sha256_of(files) for split, files in self.splits.items()}}

    def pieces(self) -> Iterator[Piece]:
        seen: set[str] = set()
        for split in ("test", "val", "train"):
            if split not in self.splits:
                continue
            hashes = sha256_of(self.splits[split])
            files = {name: file for name, file in self.splits[split].items() if hashes[name] not in seen}
            self.left_out[split] = len(hashes) - len(files)
            seen |= set(hashes.values())
            if split == "train":
                yield from files_to_split(files, self.held_out).pieces()
            else:
                for file in files.values():
                    yield from read_pieces(file, split)


def files_to_split(files: dict[str, Path], held_out: HeldOut) -> Files | OneFile:
    """Files to hold validation and test out of: several by their paths, a single one by position."""
    if len(files) == 1:
        return OneFile(next(iter(files.values())), held_out)
    return Files(files, held_out)


def sha256_of(files: dict[str, Path]) -> dict[str, str]:
    return {name: text_sha256(file) for name, file in files.items()}


def total_bytes(files: list[Path]) -> int | None:
    """The bytes of text in files; None if some are compressed, because those would have to be read for it."""
    return None if any(map(is_compressed, files)) else sum(file.stat().st_size for file in files)


def _text_size(file: Path) -> int:
    """Bytes of a file's text; a compressed file is read for them."""
    if not is_compressed(file):
        return file.stat().st_size
    with decompressed(file) as stream:
        return _skip(stream, None)


def _skip(stream: Any, size: int | None) -> int:
    """Read so many bytes of a stream, or all, and forget them; how many they were."""
    read = 0
    while block := stream.read(BLOCK if size is None else min(BLOCK, size - read)):
        read += len(block)
    return read
