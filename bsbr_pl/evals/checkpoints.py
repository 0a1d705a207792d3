"""Trained checkpoints on disk: found, opened without running any code of theirs, and named."""

import glob
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import bsbr_pl.data
from bsbr_pl.attention import ARCHITECTURES, Attention
from bsbr_pl.data import TokenData
from bsbr_pl.module import LanguageModule
from bsbr_pl.spec import AttentionSpec, specs_of
from bsbr_pl.utils.records import one_line

from .runs import Run, describe_run, plain, read_record
from .saved_data import HERE, DataLocation, open_saved

#: What a model's size is, of the arguments of `LanguageModule`.
SIZES = ("vocab_size", "hidden_dim", "num_layers", "num_heads", "ff_dim")
_UNCHOSEN = ("seed", "eval_batch_size", "num_workers", "cache_dir")  # of data: what does not make another configuration
_WINDOWS = ("context_length", "eval_context_length", "batch_size")  # of text: what its fingerprint does not cover
_LENGTH = ("trainer.max_steps", "trainer.max_epochs")  # said by `Run.length`
_KEYS: dict[type[Attention], str] = {cls: key for key, cls in ARCHITECTURES.items()}


@dataclass
class Checkpoint:
    """One checkpoint: the trained module, and what its run recorded about itself.

    A file that cannot be used has a `problem`, one line, and no module.
    """

    name: str  # as its path is shown
    digest: str = ""  # sha256 of its weights and of what built them
    module: LanguageModule | None = None
    step: int = 0
    record: dict[str, Any] = field(default_factory=dict)  # of RunRecorder, up to this step; empty without one
    data_class: str | None = None
    data_arguments: dict[str, Any] = field(default_factory=dict)
    data_fingerprint: str | None = None
    problem: str | None = None
    run_record: dict[str, Any] = field(default_factory=dict)  # record.json beside it: may be of another run
    location: DataLocation = HERE

    @cached_property
    def run(self) -> Run:
        """What its run was asked for and did."""
        assert self.module is not None
        built = {f"model.{name}": value for name, value in self.module.hparams.items()}
        built |= {f"data.{name}": value for name, value in self.data_arguments.items() if name != "batch_size"}
        if self.data_fingerprint:
            built["data.fingerprint"] = self.data_fingerprint
        if self.module.initial_weights:
            built["initial_weights"] = self.module.initial_weights
        (length,) = self.train_lengths if len(self.train_lengths) == 1 else (None,)
        return describe_run(self.record, self.run_record, self.step, built, length)

    @property
    def train_lengths(self) -> dict[int, int]:
        """Tokens of the training windows or samples, and how many in a pass over the data, or 1, have each length."""
        found: dict[int, int] = {}
        try:
            segments = self.data_arguments.get("train_segments") or [(self.data_arguments["context_length"], 0, 1)]
            for length, _, count in segments:
                if int(length) > 0:
                    found[int(length)] = found.get(int(length), 0) + int(count)
        except (KeyError, TypeError, ValueError, OverflowError):
            return {}
        return found

    @property
    def training_flops(self) -> float | None:
        """Counted, not measured: 3 forward passes (one forward, two backward) over the tokens of its run."""
        assert self.module is not None
        lengths, tokens = self.train_lengths, self.run.tokens
        each_pass = sum(length * count for length, count in lengths.items())
        if tokens is None or not each_pass:
            return None
        try:
            flops = sum(count * self.module.model.flops(length) for length, count in lengths.items())
            return 3 * tokens * flops / each_pass
        except Exception:  # an attention of another package may have no closed form
            return None

    @property
    def config(self) -> dict[str, Any]:
        """All that was chosen for the run but its seed, as plain values by `part.name`; runs that agree are seeds."""
        assert self.module is not None
        covered = self.data_class == "TextData" and self.data_fingerprint  # by the fingerprint: a text may have moved
        chosen = {k: v for k, v in self.data_arguments.items() if k not in _UNCHOSEN and (not covered or k in _WINDOWS)}
        trained = {k: v for k, v in self.run.arguments.items() if k.startswith("trainer.") and k not in _LENGTH}
        return {
            "data": self.data_class,
            "checkpoint": Path(self.name).stem,
            "initial_weights": self.run.initial_weights,  # a healed model is no seed of one from its own start
            "length": self.run.length,
            "record": "this version" if "run" in self.record else "older version",  # which holds fewer arguments
            **{f"model.{key}": value for key, value in self.module.hparams.items()},
            **{f"data.{key}": value for key, value in chosen.items() if key[0] != "_"},
            **trained,
        }

    @property
    def seed(self) -> int | None:
        """Of the run's initialization and dropout; None where it was not recorded."""
        found = self.run.arguments.get("seed")
        return found if isinstance(found, int) else None

    @property
    def about_run(self) -> dict[str, Any]:
        """What a row of results says of the training."""
        return {
            **{name: getattr(self.run, name) for name in ("length", "finished", "steps", "planned_steps", "tokens")},
            **{name: getattr(self.run, name) for name in ("batch", "changes", "ended_by", "initial_weights")},
            "flops": self.training_flops,
            "data": self.data_class,
            "fingerprint": self.data_fingerprint,
            "tokenizer": self.tokenizer,
            "context_lengths": list(self.train_lengths),
        }

    @property
    def tokenizer(self) -> str | None:
        """`bytes`, `bpe (8192 ids)`, or the file it came from; None for data that is no text."""
        name = self.data_arguments.get("tokenizer")
        ids = self.data_arguments.get("bpe_vocab_size")
        return f"{name} ({ids} ids)" if name == "bpe" else name if isinstance(name, str) else None

    def open_data(self, **changes: Any) -> TokenData:
        """The data that the run was trained on, by the arguments it was trained with, but for `changes`.

        Raises:
            DataChangedError: the data is not what the checkpoint was trained on.
            ValueError: the checkpoint does not name its data, or the data is not there.
        """
        if self.data_class is None:
            raise ValueError("the checkpoint names no data set of bsbr_pl.data")
        return open_saved(self.data_class, self.data_arguments, self.data_fingerprint, self.location, changes)


def find(paths: Iterable[str | Path]) -> list[Path]:
    """The checkpoints (`*.ckpt`) in folders, at any depth; files as they are; the matches of patterns. Each once.

    Raises:
        ValueError: naming a path that holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        names = [path] if Path(path).exists() else sorted(glob.glob(str(path), recursive=True))
        matches = [Path(name) for name in names]
        files = [f for match in matches for f in (sorted(match.rglob("*.ckpt")) if match.is_dir() else [match])]
        if not files:
            raise ValueError(f"{path} holds no checkpoint (*.ckpt): a folder, file or pattern with one is needed")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read(path: Path, location: DataLocation = HERE) -> Checkpoint:
    """Open one checkpoint; whatever is wrong with it becomes its `problem`."""
    name = path.as_posix()
    try:
        module, saved = LanguageModule.open(path)
        kept = [c for n, c in saved.get("callbacks", {}).items() if n.split("{")[0] == "RunRecorder"]
        data_class = next((n for n in bsbr_pl.data.__all__ if n in saved and n.endswith("Data")), None)
        arguments = saved.get("datamodule_hyper_parameters", {})
        fingerprint = saved[data_class].get("fingerprint") if data_class else None
        record = _record(kept[0]) if kept else {}
        checkpoint = Checkpoint(
            name=name,
            digest=_digest(module),
            module=module,
            step=int(saved.get("global_step", 0)),
            record=record | ({"run": saved["run"]} if "run" in saved else {}),
            data_class=data_class,
            data_arguments={key: value for key, value in arguments.items() if key[0] != "_"} if data_class else {},
            data_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
            run_record=read_record(path),
            location=location,
        )
        plain([checkpoint.about_run, checkpoint.config])  # whatever a hostile file breaks in them, it breaks here
        return checkpoint
    except Exception as error:  # hostile files can fail anywhere
        return Checkpoint(name=name, problem=one_line(error))


def read_all(paths: Iterable[str | Path], location: DataLocation = HERE) -> list[Checkpoint]:
    """Every checkpoint under `paths`; of several with the same weights, the first whose run's end is known."""
    found: dict[str, Checkpoint] = {}
    for path in find(paths):
        checkpoint = read(path, location)
        key = checkpoint.digest or checkpoint.name
        if key not in found or (_ending_known(checkpoint) and not _ending_known(found[key])):
            found[key] = checkpoint
    return list(found.values())


def _ending_known(checkpoint: Checkpoint) -> bool:
    return checkpoint.module is not None and checkpoint.run.finished is not None


def labels(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """A short name for each checkpoint that has a module, by digest; only seeds of one configuration share it.

    The architecture and its options, and in brackets what differs from others that were trained on the same data:
    arguments of the model, if they differ between those of one architecture; anything else (windows, budget, precision,
    ...) if it differs between any two; that a run did not finish, and what was changed in it. Runs that did not finish
    share no name: they are not seeds of any other.
    """
    usable = sorted((c for c in checkpoints if c.module is not None), key=lambda c: (c.name, c.digest))
    own = {c.digest: architecture(c) for c in usable}
    configs = {c.digest: c.config for c in usable}

    def among(c: Checkpoint, key: str) -> tuple[str | None, str, str]:
        """Where the values of an argument are compared: among those of the architecture, or among all."""
        return c.data_fingerprint, own[c.digest] if key.startswith("model.") else "", key

    values: dict[tuple[str | None, str, str], set[str]] = defaultdict(set)
    for c in usable:
        for key, value in configs[c.digest].items():
            values[among(c, key)].add(plain(value))
    names: dict[str, str] = {}
    for c in usable:
        varied = [key for key in configs[c.digest] if len(values[among(c, key)]) > 1]
        shown = [_in_words(key, configs[c.digest][key]) for key in varied if key not in ("model.attention", "length")]
        if "length" in varied and c.run.finished:
            shown.append(c.run.length)
        names[c.digest] = _bracketed(own[c.digest], [*shown, *c.run.marks])
    return names | _told_apart([c for c in usable if not c.run.finished], names)


def _in_words(key: str, value: Any) -> str:
    return f"{key.rpartition('.')[2]}={value}"


def _bracketed(name: str, words: Sequence[str]) -> str:
    return name + (f" [{', '.join(words)}]" if words else "")


def _told_apart(unfinished: Sequence[Checkpoint], names: Mapping[str, str]) -> dict[str, str]:
    """Names for runs that did not finish and would share one: with their seeds, and numbers if seeds are equal."""
    found: dict[str, str] = {}
    for c in unfinished:
        name = names[c.digest]
        alike = [other for other in unfinished if names[other.digest] == name]
        if len(alike) > 1:
            name = f"{name[:-1]}, seed={c.seed}]"
            number = sum(taken.startswith(name) for taken in found.values())
            name += f" ({number + 1})" * (number > 0)
        found[c.digest] = name
    return found


def architecture(checkpoint: Checkpoint) -> str:
    """The attention's registry key with the options that are not its defaults: `bsbr(chunk_size=64)`; all, joined."""
    assert checkpoint.module is not None
    specs = specs_of(checkpoint.module.hparams["attention"])
    return " + ".join(dict.fromkeys(map(str, [specs] if isinstance(specs, AttentionSpec) else specs)))


def kind(label: str) -> str:
    """The architecture's key of a label, without options: `bsbr` of `bsbr(chunk_size=64) [hidden_dim=128]`."""
    return re.split(r"[( \[]", label)[0]


def _record(kept: dict[str, Any]) -> dict[str, Any]:
    return {"metrics": kept["metrics"], "seconds": kept["seconds"], **kept.get("facts", {})}


def _digest(module: LanguageModule) -> str:
    content = hashlib.sha256(repr(sorted(module.hparams.items())).encode())
    for name, tensor in module.state_dict().items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:16]
