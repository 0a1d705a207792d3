"""Who takes part in a comparison: models built by name or taken from checkpoints, if they pass their certificate."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from bsbr_pl.attention import Attention, BSBRAttention, GAUAttention, SlidingWindowAttention
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import model_class

from .certificate import certify
from .checkpoints import SIZES, Checkpoint

#: Which option bounds what an architecture attends to exactly.
REACH: dict[type[Attention], str] = {
    BSBRAttention: "chunk_size",
    GAUAttention: "chunk_size",
    SlidingWindowAttention: "window_size",
}


def check_among(argument: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{argument}: {name!r} is unknown; there are {', '.join(known)}")


def sizes(*values: int | None) -> dict[str, int | None]:
    return dict(zip(SIZES, values, strict=True))


def builders(
    models: Sequence[str],
    given: Collection[str],
    sizes: Mapping[str, Any],
    reach: int,
    options: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, dict[str, Any]]:
    """Name -> what `LanguageModel` and `LanguageModule` are built from, for the models that are not given."""
    if isinstance(models, str):
        raise ValueError(f"models must be a list of names, got {models!r}")
    options = options or {}
    check_among("model_options", options, models)
    found = {}
    for name in models:
        if name not in given:
            cls = model_class(name)
            reached = {REACH[cls.architecture]: reach} if cls.architecture in REACH else {}
            found[name] = {"attention": cls.factory(**reached | dict(options.get(name, {}))), **sizes}
    return found


def build_model(source: Checkpoint | Mapping[str, Any], seed: int) -> LanguageModel:
    """The model of a checkpoint, or one with the random weights of a seed; the global random state is left alone."""
    if isinstance(source, Checkpoint):
        assert source.module is not None
        return source.module.model
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LanguageModel(**source)


def keep_certified(models: dict[str, LanguageModel], trained: Collection[str], results: dict[str, Any]) -> None:
    """Take out of both what fails its certificate."""
    for name in list(models):
        certificate = certify(models[name] if name in trained else _stirred(models[name]))
        if not certificate.passed:
            failed = [check.name for check in certificate.checks if not check.passed]
            warnings.warn(f"{name} is left out of the comparison: it fails {', '.join(failed)}", stacklevel=3)
            results["disqualified"][name] = failed
            results["models"].remove(name)
            del models[name], results[name]
    if not models:
        raise ValueError(f"models: none is left, all fail their certificate: {results['disqualified']}")


def _stirred(model: LanguageModel) -> LanguageModel:
    """A copy with every parameter moved, so that none that starts at 0 hides a branch that leaks."""
    model, random = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random) * model.embedding.weight.shape[1] ** -0.5
            parameter.add_(noise.to(parameter))
    return model
