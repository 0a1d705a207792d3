"""TextData: real text, from the name of a source to windows of tokens."""

import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .base import IGNORED, Batch, TokenData, check_integer, cut
from .corpus import Corpus, default_cache_dir, prepare
from .files import is_table, read_rows, refuse_archives, sha256_of, suffix_of, total_bytes
from .hub import read_hub
from .sources import (
    DEFAULT_FRACTION,
    Files,
    HeldOut,
    Named,
    OwnFiles,
    Rows,
    Source,
    Texts,
    choose_splits,
    files_below,
    files_to_split,
    is_about,
    named_splits,
)
from .tokenizer import Tokenizer

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_OF_ROWS = ("text_column", "join_rows", "max_rows")
_OF_SPLITS = ("train_split", "val_split", "test_split")
_OF_THE_HUB = ("subset", "revision", "streaming")


@dataclass(frozen=True)
class Options:
    """The options of a source; see `TextData`. The defaults request nothing."""

    subset: str | None = None
    revision: str | None = None
    text_column: str = "text"
    train_split: str = "train"
    val_split: str | None = None
    test_split: str | None = None
    streaming: bool = False
    join_rows: bool = False
    max_rows: int | None = None

    def refuse(self, names: Iterable[str], because: str) -> None:
        """ValueError if one of these options was set."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name}={value!r} has no effect: {because}. Remove it")

    def splits(self) -> dict[str, str]:
        """The names that were asked for `train`, and for `val` and `test` if they were set.

        Raises:
            ValueError: there is none for training, or two splits would hold the same texts.
        """
        if not self.train_split:
            raise ValueError(f"train_split={self.train_split!r} is empty: remove it to use 'train'")
        names = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        given = {split: name for split, name in names.items() if name is not None}
        if len(set(given.values())) < len(given) or ("all" in given.values() and len(given) > 1):
            listed = ", ".join(f"{split}_split={name!r}" for split, name in given.items())
            raise ValueError(f"{listed} overlap: use each split once, and nothing else with 'all'")
        return given


class TextData(TokenData):
    """Language modelling on real text, prepared once and memory-mapped.

    Args:
        source: `stdlib` (the Python standard library's own source code), a file or folder of raw text or of rows
            (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow), also compressed (.gz, .bz2, .xz, .zst), or the
            name `owner/name` of a data set on the Hugging Face Hub. An option that does not apply to the source is an
            error
        tokenizer: `bpe` (byte-level, trained on the training split), `bytes`, or the path of a byte-level
            tokenizer.json
        bpe_vocab_size: ids of the trained BPE, the end of text included; other tokenizers have their own
        context_length: tokens of a training window
        eval_context_length: tokens of a validation or test window; that of training by default
        batch_size: windows in a training batch, over all processes
        eval_batch_size: windows in an evaluation batch, over all processes; that of training by default
        seed: of the order of the training windows
        num_workers: processes that prepare batches ahead
        cache_dir: where prepared text is kept; $XDG_CACHE_HOME/bsbr_pl or ~/.cache/bsbr_pl by default
        val_fraction, test_fraction: the shares that are held out if the source has no split of its own: of files by
            the hash of their path, of rows by the hash of their text, of a single file its end
        text_column: the column of rows that is read
        subset, revision: configuration and version of a Hub data set. Its prepared text is reused as long as these
            arguments stay the same
        train_split, val_split, test_split: names of splits, in a folder or on the Hub. A folder's own splits are found
            by the names of its files and folders (train, validation, valid, val, dev, test, eval); train_split="all"
            takes all its files without regard to names. On the Hub a split that is not named is held out
        streaming: read a Hub data set as it downloads, without a copy of it on disk
        join_rows: rows are lines of one running text rather than documents
        max_rows: read no more rows of each split
    """

    kind = "text"
    content_arguments: ClassVar[tuple[str, ...]] = (
        *("source", "tokenizer", "bpe_vocab_size", "val_fraction", "test_fraction"),
        *(field.name for field in fields(Options)),
    )

    def __init__(
        self,
        source: str = "stdlib",
        tokenizer: str = "bpe",
        bpe_vocab_size: int = 4096,
        context_length: int = 512,
        eval_context_length: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        val_fraction: float = DEFAULT_FRACTION,
        test_fraction: float = DEFAULT_FRACTION,
        text_column: str = "text",
        subset: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        streaming: bool = False,
        join_rows: bool = False,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(context_length, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)
        self.eval_context_length = context_length
        if eval_context_length is not None:
            self.eval_context_length = check_integer("eval_context_length", eval_context_length, 1)

    @property
    def validation_length(self) -> int:
        return self.eval_context_length

    @property
    def text_data(self) -> "TextData":
        return self

    def _test_length_arguments(self, length: int) -> dict[str, Any]:
        return {"eval_context_length": length}

    @cached_property
    def corpus(self) -> Corpus:
        """The prepared text; the first use prepares it."""
        h = self.hparams
        options = Options(**{field.name: h[field.name] for field in fields(Options)})
        source = open_source(h["source"], HeldOut(h["val_fraction"], h["test_fraction"]), options)
        cache_dir = Path(h["cache_dir"]).expanduser() if h["cache_dir"] else default_cache_dir()
        return prepare(source, h["source"], h["tokenizer"], h["bpe_vocab_size"], cache_dir)

    def prepare_data(self) -> None:
        _ = self.corpus

    @property
    def vocab_size(self) -> int:
        return self.corpus.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    def samples(self, split: str) -> "Windows":
        length = self.context_length if split == "train" else self.eval_context_length
        return Windows(self.corpus, split, length, self.seed)

    def text(self, split: str) -> bytes:
        """The split's raw text, documents joined."""
        return self.corpus.text(split)

    def documents(self, split: str) -> np.ndarray:
        """Offsets (documents + 1,) of documents in the split's tokens; document i ends before `offsets[i + 1]`."""
        return self.corpus.documents(split)

    def state_dict(self) -> dict[str, Any]:
        meta = self.corpus.meta
        return {"fingerprint": self.fingerprint, "source_sha256": meta["source_sha256"], "python": meta["python"]}


class Windows:
    """Windows of `context_length` tokens of one split. A sample's id is the offset of its first token.

    Raises:
        ValueError: the split holds no text, or a training split is shorter than a window.
    """

    def __init__(self, corpus: Corpus, split: str, context_length: int, seed: int) -> None:
        self.corpus, self.split, self.context_length, self.seed = corpus, split, context_length, seed
        self.length = len(corpus.tokens(split))
        if self.length < 2:
            without = "; or train without validation, with --trainer.limit_val_batches=0" if split == "val" else ""
            raise ValueError(
                f"the {split} split of source={corpus.meta['name']!r} is empty: set {split}_fraction above 0, or name "
                f"its {split}_split{without}"
            )

    def __getitem__(self, ids: np.ndarray) -> Batch:
        """input_ids, targets (B, T); num_bytes, index (B,). Positions behind the end of the stream are not counted."""
        tokens, size = self.corpus.tokens(self.split), self.corpus.tokenizer.token_bytes
        rows = np.full((len(ids), self.context_length + 1), IGNORED, np.int64)
        for row, start in zip(rows, ids, strict=True):
            piece = tokens[start : start + self.context_length + 1]
            row[: len(piece)] = piece
        inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        counted = targets != IGNORED
        inputs[inputs == IGNORED] = self.corpus.tokenizer.eos_id
        return {
            "input_ids": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "num_bytes": torch.from_numpy(np.where(counted, size[targets * counted], 0).sum(1)),
            "index": torch.from_numpy(ids.astype(np.int64)),
        }

    def train_batches(self, batch_size: int, epoch: int) -> np.ndarray:
        """(steps, batch_size) offsets of windows that do not overlap, in random order.

        Each epoch starts at another token. The number of steps is the same in every epoch.

        Raises:
            ValueError: the split has fewer windows than one batch.
        """
        count = max(self.length // self.context_length - 1, int(self.length > self.context_length))
        if count < batch_size:
            raise ValueError(
                f"context_length={self.context_length} leaves {count} windows of the {self.length} training tokens, "
                f"fewer than one batch of {batch_size} (batch_size times processes): lower either, or use more text"
            )
        random = np.random.default_rng([self.seed, epoch])
        shift = random.integers(min(self.context_length, self.length - count * self.context_length))
        offsets = shift + self.context_length * random.permutation(count)
        return offsets[: count // batch_size * batch_size].reshape(-1, batch_size)

    def eval_batches(self, batch_size: int) -> list[np.ndarray]:
        """Offsets of windows side by side, in order: every token but the first EOS is the target of one window."""
        return cut(np.arange(0, self.length - 1, self.context_length), batch_size)


def open_source(source: str, held_out: HeldOut, options: Options | None = None) -> Source:
    """`stdlib`, an existing file or folder, or the name `owner/name` of a data set on the Hub.

    Raises:
        ValueError: the source is none of these, or holds no text, or an option does not apply to it.
    """
    options = options or Options()
    path = _existing(source)
    if source == "stdlib":
        options.refuse(_OF_ROWS + _OF_SPLITS + _OF_THE_HUB, "source='stdlib' is raw text without splits")
        return stdlib(held_out)
    if path is None:
        return _hub(source, held_out, options)
    options.refuse(_OF_THE_HUB, f"source={source!r} is a path, not a data set on the Hub")
    if path.is_dir():
        return _folder(path, source, held_out, options)
    options.refuse(_OF_SPLITS, f"source={source!r} is one file without splits")
    if not path.is_file():
        raise ValueError(
            f"source={source!r} is not a regular file or folder (it must be readable twice): copy it to a file"
        )
    refuse_archives([path])
    if is_table(path):
        return _rows({"train": [path]}, source, held_out, options)
    options.refuse(_OF_ROWS, f"source={source!r} is raw text, not rows")
    return files_to_split({path.name: path}, held_out)


def stdlib(held_out: HeldOut) -> Files:
    """The source code of the Python standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_THE_LIBRARY]  # os.walk enters only these
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths}
    if not files:
        raise ValueError(f"source='stdlib' found no .py file in {root}: give a file or folder of text instead")
    return Files(files, held_out)


def _existing(source: str) -> Path | None:
    """The file or folder of this name as it is written, else with ~ as the home folder; None if there is neither."""
    path = Path(source)
    try:
        if not path.exists():
            path = path.expanduser()
        return path if source and path.exists() else None
    except (OSError, RuntimeError):  # no file can have this name, or ~name is no user
        return None


def _folder(path: Path, source: str, held_out: HeldOut, options: Options) -> Source:
    files = files_below(path)
    refuse_archives(files.values())
    tables = {name: file for name, file in files.items() if is_table(file)}
    if tables:
        raw = [name for name in files if name not in tables and not is_about(name)]
        if raw:
            raise ValueError(
                f"source={source!r} mixes raw text ({raw[0]!r}) and rows ({next(iter(tables))!r}): keep one kind in a "
                "folder"
            )
        files = tables
    else:
        options.refuse(_OF_ROWS, f"source={source!r} is raw text, not rows")
    splits = _splits_of_folder(path, source, files, bool(tables), options)
    if tables:
        return _rows({split: list(some.values()) for split, some in splits.items()}, source, held_out, options)
    held_out = held_out.without_own_splits(set(splits), source)
    if len(splits) == 1:
        return files_to_split(splits["train"], held_out)
    return OwnFiles(splits, held_out)


def _splits_of_folder(path: Path, source: str, files: Named, rows: bool, options: Options) -> dict[str, Named]:
    """The files of the folder's own splits; all are for training if it has none, or if train_split is `all`."""
    asked = options.splits()
    if asked["train"] == "all":
        return {"train": files}
    found = named_splits(path, list(files), rows)
    if not found:
        options.refuse(_OF_SPLITS, f"no file of source={source!r} has a split in its name")
        return {"train": files}
    if asked["train"] == "train":
        del asked["train"]  # the default: any word that means training
    chosen = choose_splits(found, asked, source)
    return {split: {name: files[name] for name in names} for split, names in chosen.items()}


def _rows(splits: dict[str, list[Path]], source: str, held_out: HeldOut, options: Options) -> Rows:
    own = set(splits) - {"train"}

    def content() -> dict[str, Any]:
        hashes = {split: [sha256_of(file) for file in files] for split, files in splits.items()}
        return {
            "rows": hashes if own else hashes["train"],
            "column": options.text_column,
            "splits": {split: split for split in splits},
        }

    texts: dict[str, Texts] = {split: partial(read_rows, files, options.text_column) for split, files in splits.items()}
    size = total_bytes(file for files in splits.values() for file in files)
    held_out = held_out.without_own_splits(own, source)
    return Rows(texts, content, held_out, options.join_rows, options.max_rows, size)


def _hub(source: str, held_out: HeldOut, options: Options) -> Rows:
    is_file_name = suffix_of(Path(source)) in (".txt", ".md") or is_table(Path(source))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or is_file_name:
        raise ValueError(
            f"source={source!r} does not exist: use 'stdlib', a file or folder, or the name 'owner/name' of a data set "
            "on the Hugging Face Hub"
        )
    splits = options.splits()
    content = {
        "hub": source,
        "subset": options.subset,
        "revision": options.revision,
        "column": options.text_column,
        "splits": splits,
    }
    version = {"name": options.subset, "revision": options.revision, "streaming": options.streaming}
    arguments = {"path": source, **version}
    texts: dict[str, Texts] = {
        split: partial(read_hub, arguments, name, options.text_column) for split, name in splits.items()
    }
    held_out = held_out.without_own_splits(set(splits), source)
    return Rows(texts, lambda: content, held_out, options.join_rows, options.max_rows)
