"""A small text, prepared once for the whole session, and tiny sources of every kind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bsbr_pl.data import TextData

WORDS = [
    "self",
    "return",
    "naïve",
    "日本語",
    "if x:\n        pass\n",
    "0x1F",
    "<|endoftext|>",
    "don't",
    "\U0001f600",
    "\t",
]


def write_text(lines: int, seed: int = 0) -> str:
    """Text with code, prose, several scripts and the name of a special token; the same for the same arguments."""
    return "\n".join(
        f"{seed}.{i} " + " ".join(WORDS[(i * 7 + j * j + seed) % len(WORDS)] for j in range(i % 9))
        for i in range(lines)
    )


@pytest.fixture(scope="session", name="some_text")
def some_text_fixture() -> Callable[..., str]:
    return write_text


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files of text, one of them empty."""
    root = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (root / f"{i % 3}").mkdir(exist_ok=True)
        (root / f"{i % 3}" / f"{i}.txt").write_bytes(write_text(10 + i, i).encode() if i else b"")
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_data(folder: Path, cache: str) -> TextData:
    """The folder as bytes: five batches of training windows and some to evaluate."""
    return TextData(
        str(folder), "bytes", context_length=64, batch_size=8, cache_dir=cache, val_fraction=0.15, test_fraction=0.1
    )
