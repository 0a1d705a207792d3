"""Prepared text: documents become one memory-mapped file of tokens, once, in a folder named by a fingerprint.

A folder holds `tokens.bin` (the three splits one after another), `documents.npy` (where documents start),
`tokenizer.json` unless the tokens are bytes, and `meta.json`, whose checksums tell a whole folder from a damaged one.
A split's stream is `EOS document EOS document EOS ... document EOS`: every token of the text follows another one, so
each is predicted exactly once.
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
from typing import Any

import numpy as np

from .documents import SPLITS, Piece, Source, file_sha256
from .tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_identity, train_bpe

FORMAT = 2  # changes whenever the same source would give another folder
BATCH_BYTES = 2 << 20  # text tokenized at once
BPE_SAMPLE_BYTES = 64 << 20  # training text that merges are learnt from: bounds the memory they take
HASH_EVERY_TIME = 256 << 20  # larger files are hashed again only if their modification time has changed


class Corpus:
    """A prepared folder, opened lazily, so that it can be sent to other processes.

    Raises:
        ValueError: the folder is missing, cut short or altered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
            intact = self.meta.pop("sha256") == _json_sha256(self.meta)
            intact = intact and all(_is_whole(folder / name, sums) for name, sums in self.meta["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} is no prepared corpus ({error})") from error
        if not intact:
            raise ValueError(f"{folder} was cut short or altered")
        self.fingerprint: str = self.meta["fingerprint"]
        self.vocab_size: int = self.meta["vocab_size"]

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path]]:
        return Corpus, (self.folder,)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        file = self.folder / "tokenizer.json"
        return load_tokenizer(str(file)) if file.exists() else ByteTokenizer()

    @cached_property
    def _all_tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=self.meta["dtype"], mode="r")

    def tokens(self, split: str) -> np.ndarray:
        """The split's stream of tokens, EOS first and EOS after every document; (L,), memory-mapped."""
        start, stop = self._split(split)["tokens"]
        return self._all_tokens[start:stop]

    def documents(self, split: str) -> np.ndarray:
        """Offsets (documents + 1,) in `tokens(split)`: document i and its EOS are `[offsets[i], offsets[i + 1])`."""
        start, stop = self._split(split)["documents"]
        offsets = np.load(self.folder / "documents.npy", mmap_mode="r")[start:stop]
        return np.append(offsets, len(self.tokens(split)))

    def text(self, split: str) -> bytes:
        """The split's raw text, documents joined."""
        return self.tokenizer.decode_bytes(self.tokens(split))

    def num_bytes(self, split: str) -> int:
        """Bytes of the split's raw text."""
        return int(self._split(split)["bytes"])

    def _split(self, split: str) -> dict[str, Any]:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown: one of {', '.join(SPLITS)}")
        return self.meta["splits"][split]


def prepare(source: Source, name: str, tokenizer: str, bpe_vocab_size: int, cache_dir: Path) -> Corpus:
    """Open the prepared folder of this source and tokenizer; make it first if it is not there or damaged.

    Several processes may call this at once: one works, the others wait for it.

    Args:
        source: the documents
        name: what messages call the source
        tokenizer: `bpe` (trained on the training split), `bytes` or the path of a tokenizer.json
        bpe_vocab_size: ids of the trained BPE, the end of text included
        cache_dir: the folder that prepared folders lie in

    Raises:
        ValueError: text that is empty or no UTF-8, a missing column, a tokenizer that loses bytes.
        OSError: a file cannot be read, or the disk is full; nothing half-written is left.
    """
    from filelock import FileLock

    identity = {
        "format": FORMAT,
        "source": source.identity(),
        "held_out": [source.held_out.val, source.held_out.test],
        "tokenizer": tokenizer_identity(tokenizer, bpe_vocab_size),
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
            shutil.rmtree(stale, ignore_errors=True)
        partial = cache_dir / f".{fingerprint}-{os.getpid()}"
        partial.mkdir()
        try:
            _write(partial, source, tokenizer, bpe_vocab_size, {"fingerprint": fingerprint, "name": name})
            if source.identity() != identity["source"]:
                raise ValueError(f"source={name!r} was changed while it was prepared: run again when it stays as it is")
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no room in {cache_dir} to prepare source={name!r} ({error.strerror}); nothing was kept. Free some "
                f"space (about half the size of the text), or set cache_dir to another disk",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    corpus = Corpus(folder)
    _say_left_out(corpus)
    return corpus


def _say_left_out(corpus: Corpus) -> None:
    """On standard error, which split lost how many documents to another one."""
    for split, count in corpus.meta["left_out"].items():
        if count:
            source, documents = corpus.meta["name"], "1 document" if count == 1 else f"{count} documents"
            print(
                f"source={source!r}: {documents} left out of {split}: another split has the same text", file=sys.stderr
            )


def find_prepared(fingerprint: str, cache_dir: Path) -> Corpus | None:
    """The corpus with this fingerprint that an earlier `prepare` left in `cache_dir`, without its source; or None."""
    if not re.fullmatch("[0-9a-f]{32}", fingerprint):  # it becomes a part of a path
        return None
    with contextlib.suppress(ValueError):
        corpus = Corpus(cache_dir / fingerprint)
        return corpus if corpus.fingerprint == fingerprint else None
    return None


def _write(folder: Path, source: Source, tokenizer_name: str, bpe_vocab_size: int, meta: dict[str, Any]) -> None:
    """Fill the folder: tokenizer, tokens, document offsets, and last the meta data with all checksums."""
    tokenizer = _make_tokenizer(folder, source, tokenizer_name, bpe_vocab_size, meta["name"])
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    content = hashlib.sha256()
    starts = {split: array("q") for split in SPLITS}
    length = dict.fromkeys(SPLITS, 1)
    size = dict.fromkeys(SPLITS, 0)
    with contextlib.ExitStack() as stack:
        # Training goes where it stays, the other splits are appended to it at the end.
        streams = {
            split: stack.enter_context((folder / ("tokens.bin" if split == "train" else f"{split}.part")).open("wb"))
            for split in SPLITS
        }
        eos = np.array([tokenizer.eos_id], dtype)
        for stream in streams.values():
            stream.write(eos.data)
        inside = dict.fromkeys(SPLITS, False)
        for batch in _batches(_progress(source, "tokenizing")):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                split, raw = piece.split, piece.text.encode()
                if tokenizer.token_bytes[ids].sum() != len(raw):
                    raise ValueError(f"tokenizer={tokenizer_name!r} loses or adds bytes in {piece.text[:40]!r}...")
                if not inside[split]:
                    starts[split].append(length[split])
                streams[split].write(ids.astype(dtype).data)
                content.update(raw)
                if piece.end:
                    streams[split].write(eos.data)
                    content.update(b"\0")
                inside[split] = not piece.end
                length[split] += len(ids) + piece.end
                size[split] += len(raw)
        if not size["train"]:
            left_out = source.left_out.get("train")
            why = "all of it is in validation or test, too" if left_out else "it is empty, or too small to split"
            raise ValueError(f"source={meta['name']!r} holds no text to train on: {why}")
        for split in SPLITS[1:]:
            streams[split].close()
            with (folder / f"{split}.part").open("rb") as part:
                shutil.copyfileobj(part, streams["train"])
            (folder / f"{split}.part").unlink()
    np.save(folder / "documents.npy", np.concatenate([np.frombuffer(starts[split], np.int64) for split in SPLITS]))
    ends = np.cumsum([0, *length.values()]).tolist()
    document_ends = np.cumsum([0, *map(len, starts.values())]).tolist()
    meta |= {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "source_sha256": content.hexdigest(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("numpy", "tokenizers", "datasets")},
        "splits": {
            split: {"tokens": ends[i : i + 2], "documents": document_ends[i : i + 2], "bytes": size[split]}
            for i, split in enumerate(SPLITS)
        },
        "left_out": source.left_out,
        "files": {file.name: _checksums(file) for file in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": _json_sha256(meta)}, indent=1))


def _make_tokenizer(folder: Path, source: Source, name: str, bpe_vocab_size: int, source_name: str) -> Tokenizer:
    """The tokenizer by name; a BPE is trained here, and any tokenizer.json is kept in the folder."""
    if name == "bytes":
        return ByteTokenizer()
    file = folder / "tokenizer.json"
    if name == "bpe":
        file.write_text(train_bpe(_training_texts(source), bpe_vocab_size), encoding="utf-8")
    else:
        shutil.copyfile(name, file)
    return load_tokenizer(str(file))


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


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about BATCH_BYTES characters, to be tokenized on all cores."""
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text)
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _checksums(file: Path) -> dict[str, str | int]:
    status = file.stat()
    return {"sha256": file_sha256(file), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_whole(file: Path, sums: dict[str, Any]) -> bool:
    status = file.stat()
    if status.st_size != sums["size"]:
        return False
    if status.st_size > HASH_EVERY_TIME and status.st_mtime_ns == sums["mtime_ns"]:
        return True
    return file_sha256(file) == sums["sha256"]


def _json_sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/bsbr_pl, or ~/.cache/bsbr_pl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bsbr_pl"
