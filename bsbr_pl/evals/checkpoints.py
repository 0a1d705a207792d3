"""Finds, opens and describes trained checkpoints, without executing code in them."""

import glob
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from bsbr_pl.data import DATA_SETS, TokenData
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import check_about
from bsbr_pl.run import differences, in_words, kind, model_arguments
from bsbr_pl.schema import COUNT, check_form, check_plain
from bsbr_pl.utils.code import foreign_code
from bsbr_pl.utils.flops import forward_flops
from bsbr_pl.values import as_json, did_you_mean, finite, one_line

from .runs import RUN, Run, check_record, read_record, read_run
from .saved_data import HERE, DataLocation, check_lengths, open_saved
from .subject import Subject, describe_model, layer_names

_NO_CHOICE = ("seed", "eval_batch_size", "num_workers", "cache_dir")  # of data: what makes no other configuration
_LENGTH = ("trainer.max_steps", "trainer.max_epochs")  # which `Run.length` tells
#: Form of what a checkpoint says of its run and its data; `record` is the state of its RunRecorder.
SAVED = {
    "hyper_parameters?": {"*": object},
    "datamodule_hyper_parameters?": {"*": object},
    "global_step?": COUNT,
    "initial_weights?": str,
    "run?": RUN,
    "data_class": (NoneType, str),
    "data": {"fingerprint?": (NoneType, str), "*": object},
    "record": {"facts?": {"*": object}, "*": object},
}


@dataclass(frozen=True)
class Unreadable:
    """A file that cannot be used."""

    name: str  # its path as it was given
    problem: str  # why, in one line


@dataclass
class Checkpoint:
    """One checkpoint: the trained module, and what its run recorded about itself."""

    name: str  # its path as it was given
    digest: str  # sha256 of its weights and of what built them
    module: LanguageModule
    step: int = 0
    record: dict[str, Any] = field(default_factory=dict)  # of RunRecorder, up to this step; empty without one
    data_class: str | None = None
    data_arguments: dict[str, Any] = field(default_factory=dict)
    data_fingerprint: str | None = None
    run_record: dict[str, Any] = field(default_factory=dict)  # record.json beside it: may be of another run
    location: DataLocation = HERE
    trusted: bool = False  # whether paths and Hub names in the file are read
    problem = ""  # of a file that can be used

    @cached_property
    def data(self) -> TokenData | None:
        """The data set of the training, not prepared; None if the checkpoint does not name it."""
        with suppress(Exception):  # the arguments may be hostile
            return DATA_SETS[self.data_class or ""](**self.data_arguments)
        return None

    @cached_property
    def run(self) -> Run:
        """The arguments and the progress of its run."""
        built = {f"model.{name}": value for name, value in self.module.hparams.items()}
        built |= {f"data.{name}": value for name, value in self.data_arguments.items() if name != "batch_size"}
        if self.data_fingerprint:
            built["data.fingerprint"] = self.data_fingerprint
        if self.module.initial_weights:
            built["initial_weights"] = self.module.initial_weights
        lengths = list(self.data.train_lengths) if self.data else []
        return read_run(self.record, self.run_record, self.step, built, lengths[0] if len(lengths) == 1 else None)

    @property
    def training_flops(self) -> float | None:
        """Counted, not measured: 3 forward passes (one forward, two backward) over the tokens of its run."""
        if self.data is None or self.run.tokens is None:
            return None
        with suppress(Exception):  # a foreign attention may have no closed form, nor be counted
            lengths, model = self.data.train_lengths, self.module.model
            flops = sum(count * forward_flops(model, length) for length, count in lengths.items())  # type: ignore[operator, misc]
            return 3 * self.run.tokens * flops / sum(length * count for length, count in lengths.items())
        return None

    @property
    def config(self) -> dict[str, Any]:
        """All arguments of the run except its seed, as plain values by `part.name`."""
        covered = DATA_SETS[self.data_class or ""].content_arguments if self.data and self.data_fingerprint else ()
        chosen = {k: v for k, v in self.data_arguments.items() if k not in (*_NO_CHOICE, *covered)}
        return {
            "data.class": self.data_class,
            "checkpoint": Path(self.name).stem,
            "initial_weights": self.run.initial_weights,  # a healed model is no seed of one from random weights
            "length": self.run.length,
            **{f"model.{key}": value for key, value in self.module.hparams.items()},
            "model.attention": layer_names(self.module.hparams["attention"]),
            **{f"data.{key}": value for key, value in chosen.items()},
            **{k: v for k, v in self.run.arguments.items() if k.startswith("trainer.") and k not in _LENGTH},
        }

    @property
    def seed(self) -> int | None:
        """The seed of the run's initialization and dropout; None if it was not recorded."""
        found = self.run.arguments.get("seed")
        return found if type(found) is int else None

    @property
    def tokenizer(self) -> str | None:
        """`bytes`, `bpe (8192 ids)`, or the file it came from; None for data that is no text."""
        name = self.data_arguments.get("tokenizer")
        if name == "bpe":
            return f"bpe ({self.data_arguments.get('bpe_vocab_size')} ids)"
        return name if isinstance(name, str) else None

    @cached_property
    def about(self) -> dict[str, Any]:
        """`about` of its rows: see bsbr_pl.results."""
        facts = {
            **describe_model(self.name, self.digest, self.module.hparams, self.module.model),
            "seed": self.seed,
            "step": self.step,
            "data": self._about_data(),
            "run": {**self.run.about, "flops": self.training_flops},
            "config": self.config,
        }
        return json.loads(as_json(facts))  # whatever a hostile file put into them, these are values of JSON

    def _about_data(self) -> dict[str, Any] | None:
        if self.data is None:
            return None
        lengths = self.data.train_lengths
        return {
            "class": self.data_class,
            "kind": self.data.kind,
            "arguments": self.data_arguments,
            "fingerprint": self.data_fingerprint,
            "tokenizer": self.tokenizer,
            "train_lengths": lengths,
            "validation_length": self.data.validation_length,
            "trained_length": max(lengths),
        }

    def subject(self, command: str = "") -> Subject:
        """The checkpoint as a subject of this command's measurements."""
        return Subject(self.module.model, self.about | {"command": command}, self.open_data, record=self.record)

    def open_data(self, **changes: Any) -> TokenData:
        """Open the data of the training, with its arguments except `changes`.

        Raises:
            DataChangedError: the data is not what the checkpoint was trained on.
            ValueError: the checkpoint does not name its data, or the data is not there.
        """
        if self.data_class is None:
            raise ValueError(
                "the checkpoint's data is of no class in bsbr_pl.data.DATA_SETS: register the class in the file that "
                "defines it, and trust its package (--trust=PACKAGE)"
            )
        saved = (self.data_class, self.data_arguments, self.data_fingerprint)
        return open_saved(*saved, self.location, changes, self.trusted)


def find(paths: Iterable[str | Path]) -> list[Path]:
    """The checkpoints (`*.ckpt`) in folders, at any depth; files as they are; the matches of patterns. Each once.

    Raises:
        ValueError: naming a path that holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        names = [path] if Path(path).exists() else sorted(glob.glob(str(path), recursive=True))
        files: list[Path] = []
        for name in map(Path, names):
            files += sorted(name.rglob("*.ckpt")) if name.is_dir() else [name]
        if not files:
            beside = {one.name: str(one) for one in Path(path).parent.glob("*")}
            meant = did_you_mean(Path(path).name, beside, 0.75) if not names else ""
            problem = "has no checkpoint (*.ckpt)" if names else "is not there"
            raise ValueError(f"{path} {problem}{meant or ': give a folder, file or pattern with checkpoints'}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read(path: Path, location: DataLocation = HERE, trusted: bool = False) -> Checkpoint | Unreadable:
    """Open one checkpoint; whatever is wrong with it becomes its `problem`."""
    name = path.as_posix().encode(errors="backslashreplace").decode()
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        module, saved = LanguageModule.open(path)
        facts = _facts(saved)
        data_class = facts["data_class"]
        arguments = facts.get("datamodule_hyper_parameters", {}) if data_class else {}
        if not trusted:
            check_lengths(arguments)
        record = _record(facts["record"])
        if "run" in facts:
            record["run"] = facts["run"]
        checkpoint = Checkpoint(
            name=name,
            digest=_digest(module),
            module=module,
            step=facts.get("global_step", 0),
            record=record,
            data_class=data_class,
            data_arguments={key: value for key, value in arguments.items() if key[:1] != "_"},
            data_fingerprint=facts["data"].get("fingerprint"),
            run_record=read_record(path),
            location=location,
            trusted=trusted,
        )
        _check_agreement(checkpoint)
        check_about(checkpoint.about)
        return checkpoint
    except Exception as error:  # hostile files can fail anywhere
        return Unreadable(name, one_line(error) or type(error).__name__)


def _check_agreement(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose parts are of several runs: arguments of the model or the data, steps or tokens.

    Raises:
        ValueError: naming what is in contradiction.
    """
    run, data = checkpoint.record.get("run", {}), checkpoint.data
    built = model_arguments(checkpoint.module.hparams)
    built |= {f"data.{name}": value for name, value in checkpoint.data_arguments.items()}
    recorded, built = json.loads(as_json(run.get("arguments", {}))), json.loads(as_json(built))
    if found := [change for change in differences(recorded, built) if kind(change[0]) != "free"]:
        raise ValueError(f"it contradicts the arguments of its run: {in_words(found)}")
    step, tokens = run.get("step", checkpoint.step), run.get("tokens")
    if step != checkpoint.step:
        raise ValueError(f"it contradicts itself: it is of step {checkpoint.step:,}, but its run is of step {step:,}")
    if tokens and data and checkpoint.run.batch:
        most = step * checkpoint.run.batch * max(data.train_lengths)
        if tokens > most:
            raise ValueError(f"it contradicts itself: {step:,} steps read at most {most:,} tokens, not {tokens:,}")


def _facts(saved: dict[str, Any]) -> dict[str, Any]:
    """The facts of a checkpoint about its run and its data, as plain values of the form `SAVED`."""
    data_class = next((name for name in DATA_SETS if name in saved), None)
    states = [state for name, state in saved.get("callbacks", {}).items() if str(name).split("{")[0] == "RunRecorder"]
    facts: dict[str, Any] = {}
    for field_name in SAVED:
        name = field_name.removesuffix("?")
        if name != field_name and saved.get(name) is not None:
            facts[name] = saved[name]
    facts |= {
        "data_class": data_class,
        "data": saved[data_class] if data_class else {},
        "record": states[0] if states else {},
    }
    check_plain(facts, "the checkpoint")
    facts = finite(facts)
    check_form(facts, SAVED, "the checkpoint")
    check_record(_record(facts["record"]))
    return facts


def read_all(
    paths: Iterable[str | Path], location: DataLocation = HERE, trusted: bool = False
) -> list[Checkpoint | Unreadable]:
    """Every checkpoint under `paths`; of several with the same weights, the first whose run's end is known."""
    found: dict[str, Checkpoint | Unreadable] = {}
    for path in find(paths):
        one = read(path, location, trusted)
        key = one.digest if isinstance(one, Checkpoint) else one.name
        if key not in found or (_ending_known(one) and not _ending_known(found[key])):
            found[key] = one
    return list(found.values())


def open_checkpoint(path: str | Path, location: DataLocation = HERE, trusted: bool = False) -> Checkpoint:
    """A checkpoint; the global random state is left alone.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    with torch.random.fork_rng([]):  # a model is built at random before it gets its weights
        checkpoint = read(Path(path), location, trusted)
    if isinstance(checkpoint, Unreadable):
        problem = str(checkpoint.problem)
        raise ValueError(problem if problem.startswith(str(path)) else f"{path}: {problem}")
    return checkpoint


def _ending_known(one: Checkpoint | Unreadable) -> bool:
    return isinstance(one, Checkpoint) and one.run.finished is not None


def _record(kept: dict[str, Any]) -> dict[str, Any]:
    """The facts that RunRecorder kept, with its metrics and seconds."""
    measured = {name: kept[name] for name in ("metrics", "seconds") if name in kept}
    return {**kept.get("facts", {}), **measured}


def _digest(module: LanguageModule) -> str:
    content = hashlib.sha256(repr(sorted(module.hparams.items())).encode())
    for code in foreign_code(module):
        content.update(code.encode())
    for name, tensor in module.state_dict().items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:16]
