"""Trained checkpoints on disk: found, opened without running any code of theirs, and named."""

import glob
import hashlib
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import bsbr_pl.data
from bsbr_pl.attention import ARCHITECTURES, Attention
from bsbr_pl.data import TokenData
from bsbr_pl.description import build
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.records import one_line

#: What a model's size is, of the arguments of `LanguageModel`.
SIZES = ("vocab_size", "hidden_dim", "num_layers", "num_heads", "ff_dim")
_UNCHOSEN = ("seed", "eval_batch_size", "num_workers", "cache_dir")  # of data: what does not make another configuration
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

    @property
    def config(self) -> dict[str, Any]:
        """All that was chosen for the run but its seed, as plain values by `part.name`; runs that agree are seeds."""
        assert self.module is not None
        flat = {"data": self.data_class, "checkpoint": Path(self.name).stem}
        flat["initial_weights"] = self.module.initial_weights  # a healed model is no seed of one from its own start
        for part, values in (
            ("model", dict(self.module.hparams)),
            ("data", {k: v for k, v in self.data_arguments.items() if k not in _UNCHOSEN}),
            ("training", self.record.get("training", {})),
        ):
            flat |= {f"{part}.{key}": value for key, value in values.items() if key[0] != "_"}
        return flat

    @property
    def seed(self) -> int | None:
        """Of the run's initialization and dropout; None where no RunRecorder kept it."""
        return self.record.get("seed")

    def open_data(self, **changes: Any) -> TokenData:
        """The data that the run was trained on, by the arguments it was trained with, but for `changes`.

        Raises:
            ValueError: where the checkpoint does not say, or the data cannot be had.
        """
        if self.data_class is None:
            raise ValueError("the checkpoint names no data set of bsbr_pl.data")
        data = getattr(bsbr_pl.data, self.data_class)(**self.data_arguments | changes)
        data.prepare_data()
        return data


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


def read(path: Path) -> Checkpoint:
    """Open one checkpoint; whatever is wrong with it becomes its `problem`."""
    name = path.as_posix()
    try:
        module, saved = LanguageModule.open(path)
        kept = [c for n, c in saved.get("callbacks", {}).items() if n.split("{")[0] == "RunRecorder"]
        data_class = next((n for n in bsbr_pl.data.__all__ if n in saved and n.endswith("Data")), None)
        arguments = saved.get("datamodule_hyper_parameters", {})
        return Checkpoint(
            name=name,
            digest=_digest(module),
            module=module,
            step=int(saved.get("global_step", 0)),
            record=_record(kept[0]) if kept else {},
            data_class=data_class,
            data_arguments={key: value for key, value in arguments.items() if key[0] != "_"} if data_class else {},
            data_fingerprint=saved[data_class].get("fingerprint") if data_class else None,
        )
    except Exception as error:  # hostile files can fail anywhere
        return Checkpoint(name=name, problem=one_line(error))


def read_all(paths: Iterable[str | Path]) -> list[Checkpoint]:
    """Every checkpoint under `paths`; of several with the same weights, the first."""
    found: dict[str, Checkpoint] = {}
    for path in find(paths):
        checkpoint = read(path)
        found.setdefault(checkpoint.digest or checkpoint.name, checkpoint)
    return list(found.values())


def labels(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """A short name for each checkpoint that has a module, by digest; seeds of one configuration share it.

    The architecture and its options, and whatever else of the configuration differs between those of one architecture.
    """
    usable = [c for c in checkpoints if c.module is not None]
    own = {c.digest: architecture(c) for c in usable}
    names = {}
    for checkpoint in usable:
        alike = [c.config for c in usable if own[c.digest] == own[checkpoint.digest]]
        config = checkpoint.config
        varied = [key for key in config if any(other.get(key) != config[key] for other in alike)]
        shown = ", ".join(f"{key.split('.')[-1]}={config[key]}" for key in varied if key != "model.attention")
        names[checkpoint.digest] = own[checkpoint.digest] + (f" [{shown}]" if shown else "")
    return names


def architecture(checkpoint: Checkpoint) -> str:
    """The attention's registry key with the options that are not its defaults: `bsbr(chunk_size=64)`; all, joined."""
    assert checkpoint.module is not None
    described = checkpoint.module.hparams["attention"]
    names = []
    for one in described if isinstance(described, list) else [described]:
        cls = build(one).func  # type: ignore[attr-defined]
        defaults = {key: parameter.default for key, parameter in inspect.signature(cls).parameters.items()}
        chosen = {key: value for key, value in one["init_args"].items() if value != defaults[key]}
        options = ", ".join(f"{key}={value}" for key, value in chosen.items())
        names.append(_KEYS.get(cls, cls.__name__) + (f"({options})" if options else ""))
    return " + ".join(dict.fromkeys(names))


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
