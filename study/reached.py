"""What a run that counts reached: quality on both splits, whether it has learned the task, and what it cost."""

import math
from collections.abc import Mapping
from contextlib import suppress
from statistics import fmean, median
from typing import Any

from bsbr_pl.data import TokenData
from bsbr_pl.evals.costs import state_bytes
from bsbr_pl.evals.evaluation import Evaluation
from bsbr_pl.evals.subject import Subject
from bsbr_pl.report.study_runs import quality
from bsbr_pl.utils.flops import forward_flops

ERRORS = 3  # an accuracy this many standard errors above the plateau is not chance
_plateaus: dict[str, float | None] = {}  # by fingerprint: the runs of a task share their data


def reached(subject: Subject, evaluation: Evaluation, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`values.result` of a run's row; bsbr_pl/results.py describes it.

    The model is certified and predicts the test split; these become rows of their own. A model that fails its
    certificate, or whose data has changed, has no test result.

    Args:
        subject: of the run.
        evaluation: which measures it.
        metrics: of its training.
    """
    found: dict[str, Any] = {"val": quality(metrics)[0], **_costs(subject)}
    evaluation.accuracy([(one, [None]) for one in evaluation.certify([subject])], "test")
    for row in evaluation.results.rows:
        identity, values = row["identity"], row["values"]
        if (identity["checkpoint"], identity.get("split")) != (subject.digest, "test"):
            continue
        assert subject.open_data is not None
        if identity["kind"] == "text":
            samples, found["test"] = None, values["bits_per_byte"]
        else:
            samples, found["test"] = values["samples"], fmean(one["accuracy"] for one in values["slices"])
        plateau = _plateau(subject.open_data())
        found["plateau"] = plateau
        if plateau is not None:
            found["learned"] = has_learned(found["test"], plateau, samples)
    return found


def has_learned(test: float, plateau: float, samples: int | None) -> bool:
    """Whether a run is better than the plateau of its task.

    Args:
        test: bits per byte of a text, or accuracy on a recall task, which must be above the plateau by 3 standard
            errors.
        plateau: `TokenData.plateau`.
        samples: number of samples of the recall task; None for a text.
    """
    if samples is None:
        return test < plateau
    return test > plateau + ERRORS * math.sqrt(plateau * (1 - plateau) / samples)


def _costs(subject: Subject) -> dict[str, Any]:
    """FLOPs, of the closed form or counted; the state, if the architecture has its size; the speed of training."""
    found: dict[str, Any] = {}
    length = (subject.about["data"] or {}).get("trained_length")
    if flops := forward_flops(subject.model, length):
        found["flops_per_token"] = flops / length
    with suppress(AttributeError, NotImplementedError):  # an attention of another package may have no closed form
        found["state_bytes"] = state_bytes(subject.model, length)
    course = (subject.record.get("metrics") or {}).get("step/tokens_per_second")
    if course and course["value"]:
        found["tokens_per_second"] = median(course["value"])
    return found


def _plateau(data: TokenData) -> float | None:
    if data.fingerprint not in _plateaus:
        _plateaus[data.fingerprint] = data.plateau()
    return _plateaus[data.fingerprint]
