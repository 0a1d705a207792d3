"""Damage a checkpoint and load it in every way that exists.

    python tests/faults/damage.py

Trains a tiny model, truncates copies of its checkpoint at 50 places, and flips one random bit in each of 200 copies.
Each of these 250 copies must be refused in one sentence that names the file, or hold exactly the content of the whole
checkpoint. Prints the counts for each way of loading; the exit code is 1 after any other outcome. Then flips every bit
of a checkpoint of 2 kB, most of which belong to the archive around the content.
"""

import collections
import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bsbr_pl.checkpoint import load_checkpoint  # noqa: E402
from bsbr_pl.evals.checkpoints import read  # noqa: E402
from bsbr_pl.module import LanguageModule  # noqa: E402


def damages(whole: bytes, cuts: int = 50, flips: int = 200, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(damage, copy of a file): truncated at places at equal distances, then with one random bit flipped."""
    for size in np.linspace(0, len(whole) - 1, cuts).astype(int):
        yield f"cut after {size} bytes", whole[:size]
    yield from flipped(whole, np.random.default_rng(seed).choice(8 * len(whole), flips, replace=False))


def flipped(whole: bytes, places: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """Copies of a file with one bit flipped each; a place counts the bits of all bytes."""
    for place in places:
        copy = bytearray(whole)
        copy[place // 8] ^= 1 << place % 8
        yield f"bit {place % 8} of byte {place // 8} flipped", bytes(copy)


def equal(one: Any, other: Any) -> bool:
    """Whether two checkpoints, or parts of them, hold exactly the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or one != one


def outcome(use: Callable[[Path], Any], path: Path, expected: Any) -> str:
    """`refused`, `equal`, or any other outcome of loading a damaged checkpoint."""
    try:
        found = use(path)
    except ValueError as error:
        sentence = str(error)
        return "refused" if str(path) in sentence and "\n" not in sentence else f"WRONG: {sentence}"
    except BaseException as error:
        return f"WRONG: {type(error).__name__}: {error}"
    return "equal" if equal(found, expected) else "WRONG: loaded without an error"


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def evaluated(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = read(path)
    if checkpoint.problem:
        raise ValueError(checkpoint.problem)
    return weights(checkpoint.module)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def tiny(folder: Path) -> list[str]:
    """Options of train.py for a run of a second, which reads and writes in `folder`."""
    (folder / "text.txt").write_text("".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(100)))
    data = {"source": folder / "text.txt", "tokenizer": "bytes", "context_length": 32, "batch_size": 4}
    sections = {
        "data": data | {"cache_dir": folder / "cache"},
        "trainer": {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "trainer.logger": {"save_dir": folder / "runs"},
        "model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2},
    }
    options = [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]
    return [f"--config={ROOT / 'configs/bsbr.yaml'}", *options]


def ways(folder: Path) -> tuple[Path, dict[str, Callable[[Path], Any]]]:
    """The checkpoint of a tiny model, trained in `folder`, and every way to load it; a way returns the content."""
    options = tiny(folder)

    def run(command: str, *more: str) -> dict[str, torch.Tensor]:
        with quiet():
            return weights(train.main([command, *options, *more]).model)

    run("fit")
    return next(folder.glob("runs/version_0/checkpoints/last.ckpt")), {
        "load_checkpoint": load_checkpoint,
        "LanguageModule.load": lambda path: weights(LanguageModule.load(path)),
        "evaluate.py": evaluated,
        "train.py fit": lambda path: run("fit", f"--ckpt_path={path}", "--weights_only=false"),  # ignored
        "train.py validate": lambda path: run("validate", f"--ckpt_path={path}"),
        "train.py test": lambda path: run("test", f"--ckpt_path={path}"),
    }


def main() -> int:
    sys.argv = sys.argv[:1]  # Lightning warns about other arguments
    with tempfile.TemporaryDirectory() as name:
        whole, uses = ways(Path(name))
        del uses["train.py fit"]  # the run is finished, so the whole checkpoint ends with exit code 0
        wrong = count(whole, damages(whole.read_bytes()), uses)
        small = Path(name) / "small.ckpt"
        parts = {"hyper_parameters": {"a": 1}, "pytorch-lightning_version": "2.6.6"}
        torch.save({"state_dict": {"a": torch.arange(5.0), "b": torch.ones(3, dtype=torch.bfloat16)}, **parts}, small)
        print(f"every bit of {small.stat().st_size} bytes:")
        wrong += count(
            small, flipped(small.read_bytes(), range(8 * small.stat().st_size)), {"load_checkpoint": load_checkpoint}
        )
    return int(wrong > 0)


def count(whole: Path, copies: Iterator[tuple[str, bytes]], uses: dict[str, Callable[[Path], Any]]) -> int:
    """Print the outcomes of damaged copies of a checkpoint; count those that are neither refused nor equal."""
    expected = {way: use(whole) for way, use in uses.items()}
    counts: dict[str, collections.Counter[str]] = {way: collections.Counter() for way in uses}
    damaged = whole.with_name("damaged.ckpt")
    for what, content in copies:
        damaged.write_bytes(content)
        for way, use in uses.items():
            found = outcome(use, damaged, expected[way])
            counts[way][found.split(":")[0]] += 1
            if found.startswith("WRONG"):
                print(f"{way}, {what}: {found}", flush=True)
    for way, found_by_way in counts.items():
        print(f"{way:<20} {', '.join(f'{found} {number}' for found, number in sorted(found_by_way.items()))}")
    return sum(found_by_way["WRONG"] for found_by_way in counts.values())


if __name__ == "__main__":
    sys.exit(main())
