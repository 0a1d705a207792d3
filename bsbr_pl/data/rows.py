"""Rows of .jsonl and .parquet files and of data sets on the Hugging Face Hub, read through `datasets`."""

import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from .documents import BLOCK, SPLITS, HeldOut, Piece, read_pieces


class Rows:
    """Rows of a text column, read through `datasets`: local files, or a data set on the Hub.

    A row is a document; with `join_rows` the rows of a split are one running text (wikitext's rows are lines). A split
    that has no name of its own is held out of the training rows by the hash of the row's text, so that equal rows
    land on the same side.

    Args:
        arguments: what `datasets.load_dataset` is called with, less the split
        split_names: the data set's own name of each of our splits
        content: what decides the rows, for the fingerprint
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        split_names: dict[str, str],
        content: dict[str, Any],
        held_out: HeldOut,
        text_column: str,
        join_rows: bool,
        max_rows: int | None,
        total_bytes: int | None = None,
    ) -> None:
        missing = [split for split in SPLITS if split not in split_names]
        if join_rows and missing:
            raise ValueError(
                f"join_rows=True needs a split of its own for {' and '.join(missing)}: rows that are lines of one text "
                "cannot be held out one by one; set val_split and test_split"
            )
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows} is too small: at least 1, or null for all")
        held = {"val": held_out.val, "test": held_out.test}
        self.held_out = HeldOut(*(held[split] if split in missing else 0.0 for split in ("val", "test")))
        self.arguments, self.split_names, self.content = arguments, split_names, content
        self.text_column, self.join_rows, self.max_rows = text_column, join_rows, max_rows
        self.total_bytes = total_bytes

    def identity(self) -> dict[str, Any]:
        rule = {"column": self.text_column, "join": self.join_rows, "max_rows": self.max_rows}
        return {**self.content, **rule, "splits": self.split_names}

    def pieces(self) -> Iterator[Piece]:
        # Training comes last: a misspelt name of another split is noticed before the long one is read.
        for split in ("val", "test", "train"):
            if split not in self.split_names:
                continue
            own: str = split
            for text in self._texts(self.split_names[split]):
                if split == "train":
                    own = self.held_out.split_of(text.encode())
                for start in range(0, len(text), BLOCK):
                    yield Piece(own, text[start : start + BLOCK], not self.join_rows and start + BLOCK >= len(text))
            if self.join_rows:
                yield Piece(split, "", True)

    def _texts(self, split_name: str) -> Iterator[str]:
        for i, row in enumerate(load_rows(self.arguments, split_name)):
            if i == self.max_rows:
                return
            if self.text_column not in row:
                raise ValueError(
                    f"text_column={self.text_column!r} is not among the columns of {_label(self.arguments)}: "
                    f"{', '.join(map(repr, row))}"
                )
            text = row[self.text_column]
            if not isinstance(text, str | None):
                raise ValueError(
                    f"text_column={self.text_column!r} of {_label(self.arguments)} holds {type(text).__name__} in row "
                    f"{i}: a column of strings is needed"
                )
            if text:
                yield text


def load_rows(arguments: dict[str, Any], split_name: str) -> Iterator[dict[str, Any]]:
    """The rows that `datasets.load_dataset` finds.

    Raises:
        ValueError: they cannot be had, and what to do about it.
    """
    import datasets

    datasets.utils.logging.disable_progress_bar()
    files = arguments.get("data_files", [])
    try:
        if not files and not datasets.config.HF_HUB_OFFLINE:
            _check_hub_answers()
        yield from datasets.load_dataset(**arguments, split=split_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UnicodeDecodeError) and arguments["path"] == "json":
            for file in files:
                deque(read_pieces(Path(file), "train", 0, Path(file).stat().st_size), maxlen=0)  # says where it is
        advice = (
            ""
            if files
            else (
                ". If this machine is offline, set HF_HUB_OFFLINE=1 to use a data set that was downloaded before, or "
                "give the path of its .parquet, .jsonl or text files as source; source='stdlib' needs no download"
            )
        )
        raise ValueError(
            f"source={_label(arguments)!r} (split {split_name!r}) cannot be read: {error}{advice}"
        ) from error


def _check_hub_answers() -> None:
    """ConnectionError at once, where the Hub's own client would try again for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if "https" in getproxies():
        return  # only the proxy needs to be reachable from here
    host = urlsplit(ENDPOINT).hostname
    try:
        socket.create_connection((host, urlsplit(ENDPOINT).port or 443), timeout=5).close()
    except OSError as error:
        raise ConnectionError(f"{host} does not answer ({error})") from error


def _label(arguments: dict[str, Any]) -> str:
    """What the reader calls this data: the file, or the name on the Hub."""
    files = arguments.get("data_files")
    return files[0] if files else arguments["path"]
