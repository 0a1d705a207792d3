"""Prepared text: documents are tokenized once, into a memory-mapped file in a folder named by a fingerprint.

A folder holds `tokens.bin` (the three splits one after another), `documents.npy` (where documents start),
`tokenizer.json` unless the tokens are bytes, and `meta.json` with checksums, which reveal a damaged folder.
The stream of a split is `EOS document EOS document EOS ... document EOS`: every token of the text has a token before
it, so each token is predicted exactly once.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .base import SPLITS
from .corpora import RELEASED
from .files import Piece
from .sources import Source
from .tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, read_spec, tokenizer_identity, train_bpe

FORMAT = 2  # increase it when the same source gives a different folder
BATCH_BYTES = 2 << 20  # text tokenized at once
BPE_SAMPLE_BYTES = 64 << 20  # training text that merges are learnt from: bounds the memory they take
HASH_EVERY_TIME = 256 << 20  # bytes; larger files are hashed again only if their times have changed


class Corpus:
    """A prepared folder. Its files are opened when they are used, so that it can be sent to other processes.

    Raises:
        ValueError: the folder is missing, cut short or altered, or its parts contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
            self.fingerprint: str = self.meta["fingerprint"]
            self.vocab_size: int = self.meta["vocab_size"]
            intact = self._is_whole() and self._is_consistent()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{folder} is not a prepared corpus ({error})") from error
        if not intact:
            raise ValueError(f"{folder} is truncated or damaged")

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path]]:
        return Corpus, (self.folder,)

    def _is_whole(self) -> bool:
        """Whether the files and the index are as they were written."""
        checksum, files = self.meta.pop("sha256"), self.meta["files"]
        return (
            checksum == _json_sha256(self.meta)
            and {"tokens.bin", "documents.npy"} <= files.keys() <= {"tokens.bin", "documents.npy", "tokenizer.json"}
            and all(_has_checksums(self.folder / name, sums) for name, sums in files.items())
        )

    def _is_consistent(self) -> bool:
        """Whether the index is that of these files: ids, and where splits and documents start and end."""
        parts = [self.meta["splits"][split] for split in SPLITS]
        return (
            self.fingerprint == self.folder.name
            and self.meta["dtype"] == _dtype(self.vocab_size).name
            and self.vocab_size == self.tokenizer.vocab_size > int(self._all_tokens[:HASH_EVERY_TIME].max(initial=0))
            and (self._starts.ndim, self._starts.dtype) == (1, np.int64)
            and _are_joined([part["tokens"] for part in parts], len(self._all_tokens))
            and _are_joined([part["documents"] for part in parts], len(self._starts))
            and all(map(self._is_stream, SPLITS))
        )

    def _is_stream(self, split: str) -> bool:
        """Whether the documents of a split are in order, with an EOS before the first and at the end of each."""
        tokens, offsets = self.tokens(split), self.documents(split)
        in_order = offsets[0] == 1 and bool((np.diff(offsets) > 0).all())
        return in_order and bool((tokens[offsets - 1] == self.tokenizer.eos_id).all())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        name = "tokenizer.json"
        return load_tokenizer(str(self.folder / name)) if name in self.meta["files"] else ByteTokenizer()

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.load(self.folder / "documents.npy", mmap_mode="r")

    @cached_property
    def _all_tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=_dtype(self.vocab_size), mode="r")

    def tokens(self, split: str) -> np.ndarray:
        """The split's stream of tokens, EOS first and EOS after every document; (L,), memory-mapped."""
        start, stop = self._split(split)["tokens"]
        return self._all_tokens[start:stop]

    def documents(self, split: str) -> np.ndarray:
        """Offsets (documents + 1,) in `tokens(split)`: document i and its EOS are `[offsets[i], offsets[i + 1])`."""
        start, stop = self._split(split)["documents"]
        return np.append(self._starts[start:stop], len(self.tokens(split)))

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Documents, tokens and bytes of each split."""
        return {
            split: {
                "documents": len(self.documents(split)) - 1,
                "tokens": len(self.tokens(split)),
                "bytes": self.meta["splits"][split]["bytes"],
            }
            for split in SPLITS
        }

    def text(self, split: str) -> bytes:
        """The split's raw text, documents joined."""
        return self.tokenizer.decode_bytes(self.tokens(split))

    def _split(self, split: str) -> dict[str, Any]:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown: one of {', '.join(SPLITS)}")
        return self.meta["splits"][split]


def prepare(source: Source, name: str, tokenizer: str, bpe_vocab_size: int, cache_dir: Path) -> Corpus:
    """Open the prepared folder of this source and tokenizer; make it first if it is missing or damaged.

    Several processes may call this at once: one prepares the text, the others wait for it.

    Args:
        source: the documents
        name: what messages call the source
        tokenizer: `bpe` (trained on the training split), `bytes` or the path of a tokenizer.json
        bpe_vocab_size: ids of the trained BPE, the end of text included
        cache_dir: the folder of all prepared folders

    Raises:
        ValueError: text that is empty, not UTF-8 or changes while it is read, a missing column, a tokenizer that loses
            bytes.
        OSError: a file cannot be read, or the disk is full; no partial folder is left.
    """
    from filelock import FileLock

    spec = None if tokenizer in ("bpe", "bytes") else read_spec(tokenizer)
    identity = {
        "format": FORMAT,
        "source": source.identity(),
        "held_out": [source.held_out.val, source.held_out.test],
        "tokenizer": tokenizer_identity(tokenizer, bpe_vocab_size, spec),
    }
    fingerprint = _json_sha256(identity)[:32]
    folder = cache_dir / fingerprint
    with contextlib.suppress(ValueError):
        return Corpus(folder)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{fingerprint}.lock"):
        with contextlib.suppress(ValueError):
            return Corpus(folder)  # another process made it while this one waited
        for stale in [folder, *cache_dir.glob(f".{fingerprint}-*")]:
            _remove(stale)
        partial = cache_dir / f".{fingerprint}-{os.getpid()}"
        partial.mkdir()
        try:
            _write(partial, source, tokenizer, bpe_vocab_size, spec, {"fingerprint": fingerprint, "name": name})
            source.identity()  # reads the files once more: they must not change before the text is kept
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"not enough disk space in {cache_dir} to prepare source={name!r} ({error.strerror}). Free some space "
                "(about half the size of the text), or set cache_dir to another disk",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    corpus = Corpus(folder)
    _say(corpus)
    return corpus


def _remove(path: Path) -> None:
    """Delete a folder, or a file or link that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _say(corpus: Corpus) -> None:
    """Print to standard error what a built-in text is, and how many documents each split lost to another split."""
    meta, source = corpus.meta, corpus.meta["name"]
    if source in RELEASED:
        documents, num_bytes = (sum(sizes[what] for sizes in corpus.sizes.values()) for what in ("documents", "bytes"))
        print(RELEASED[source].about(source, documents, num_bytes, meta["source_sha256"]), file=sys.stderr)
    for split, count in meta["left_out"].items():
        if count:
            lost = "1 document" if count == 1 else f"{count} documents"
            print(f"source={source!r}: removed {lost} from {split}: the same text is in another split", file=sys.stderr)


def find_prepared(fingerprint: str, cache_dir: Path) -> Corpus | None:
    """The corpus in `cache_dir` that has this fingerprint, found without its source; or None."""
    if not re.fullmatch("[0-9a-f]{32}", fingerprint):  # it becomes part of a path
        return None
    with contextlib.suppress(ValueError):
        return Corpus(cache_dir / fingerprint)
    return None


class _Stream:
    """Writes the tokens of a split: EOS document EOS document EOS ... document EOS."""

    def __init__(self, file: BinaryIO, eos: np.ndarray) -> None:
        self.file, self.eos = file, eos
        self.tokens, self.bytes, self.starts, self.inside = 1, 0, array("q"), False
        file.write(eos.data)

    def add(self, ids: np.ndarray, num_bytes: int, end: bool) -> None:
        """Append a piece of a document, and EOS if the document ends with it."""
        if not self.inside:
            self.starts.append(self.tokens)
        self.file.write(ids.astype(self.eos.dtype).data)
        if end:
            self.file.write(self.eos.data)
        self.inside = not end
        self.tokens += len(ids) + end
        self.bytes += num_bytes


def _write(
    folder: Path, source: Source, name: str, bpe_vocab_size: int, spec: str | None, meta: dict[str, Any]
) -> None:
    """Fill the folder: tokenizer, tokens, document offsets, and last the meta data with all checksums."""
    if name == "bpe":
        spec = train_bpe(_training_texts(source), bpe_vocab_size)
    if spec is not None:
        (folder / "tokenizer.json").write_text(spec, encoding="utf-8")
    tokenizer = ByteTokenizer() if spec is None else BPETokenizer(spec)
    dtype = _dtype(tokenizer.vocab_size)
    eos = np.array([tokenizer.eos_id], dtype)
    content = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        # Training is written to its final place, the other splits are appended to it at the end.
        files = {split: folder / ("tokens.bin" if split == "train" else f"{split}.part") for split in SPLITS}
        streams = {split: _Stream(stack.enter_context(file.open("wb")), eos) for split, file in files.items()}
        for piece, ids in _tokenized(source, tokenizer):
            raw = piece.text.encode()
            if tokenizer.token_bytes[ids].sum() != len(raw):
                raise ValueError(f"tokenizer={name!r} loses or adds bytes in {piece.text[:40]!r}...")
            streams[piece.split].add(ids, len(raw), piece.end)
            content.update(raw + b"\0" * piece.end)
        if not streams["train"].bytes:
            left_out = source.left_out.get("train")
            why = "all of it is also in validation or test" if left_out else "it is empty, or too small to split"
            raise ValueError(f"source={meta['name']!r} has no training text: {why}")
        for split in SPLITS[1:]:
            streams[split].file.close()
            with files[split].open("rb") as part:
                shutil.copyfileobj(part, streams["train"].file)
            files[split].unlink()
    starts = [streams[split].starts for split in SPLITS]
    np.save(folder / "documents.npy", np.concatenate([np.frombuffer(one, np.int64) for one in starts]))
    ends = np.cumsum([0, *(streams[split].tokens for split in SPLITS)]).tolist()
    document_ends = np.cumsum([0, *map(len, starts)]).tolist()
    meta |= {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "source_sha256": content.hexdigest(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("numpy", "tokenizers", "datasets")},
        "splits": {
            split: {"tokens": ends[i : i + 2], "documents": document_ends[i : i + 2], "bytes": streams[split].bytes}
            for i, split in enumerate(SPLITS)
        },
        "left_out": source.left_out,
        "files": {file.name: _checksums(file) for file in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": _json_sha256(meta)}, indent=1))


def _training_texts(source: Source) -> Iterator[str]:
    """The first BPE_SAMPLE_BYTES of the training split."""
    seen = 0
    for piece in _progress(source, "learning BPE"):
        if piece.split == "train":
            yield piece.text
            seen += len(piece.text)
            if seen >= BPE_SAMPLE_BYTES:
                return


def _progress(source: Source, what: str) -> Iterator[Piece]:
    """The source's pieces, with a progress bar in bytes on a terminal."""
    from tqdm import tqdm

    with tqdm(total=source.total_bytes, unit="B", unit_scale=True, desc=what, disable=None, leave=False) as bar:
        for piece in source.pieces():
            yield piece
            bar.update(len(piece.text))


def _tokenized(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its ids."""
    for batch in _batches(_progress(source, "tokenizing")):
        yield from zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about BATCH_BYTES characters, to be tokenized at once on all cores."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _are_joined(parts: list[list[int]], size: int) -> bool:
    """Whether parts [start, stop) follow each other from 0 to `size`."""
    starts, stops = zip(*parts, strict=True)
    edges = [0, *stops]
    return [*starts, size] == edges == sorted(edges) and all(type(edge) is int for edge in edges)


def _checksums(file: Path) -> dict[str, str | int]:
    status = file.stat()
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def _has_checksums(file: Path, sums: dict[str, Any]) -> bool:
    status = file.stat()
    times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    if status.st_size != sums["size"]:
        return False
    if status.st_size > HASH_EVERY_TIME and times.items() <= sums.items():
        return True
    return _checksums(file)["sha256"] == sums["sha256"]


def _json_sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
