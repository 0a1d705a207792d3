"""Certifies models, measures accuracy and costs, draws attention maps, and saves each result as a row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from bsbr_pl.data import TokenData
from bsbr_pl.data.files import compressed_bits_per_byte
from bsbr_pl.model import LanguageModel
from bsbr_pl.results import Job, NotKeptError, Results, Row, on_own_data
from bsbr_pl.utils.records import environment, git_commit
from bsbr_pl.utils.timing import timing_lock, timing_problem
from bsbr_pl.values import digest, one_line

from .accuracy import recall_accuracy, text_accuracy
from .certificate import certify, copied
from .costs import PASSES, measure_costs
from .pictures import course, draw_map
from .retrieval import retrieval
from .saved_data import DataChangedError
from .subject import Subject

#: Of each kind of row; increase it when the measurement changes its meaning.
VERSIONS: dict[str, int] = {"certificate": 7, "text": 2, "recall": 3, "cost": 3, "map": 1, "training": 1}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
MULTIPLES = (1, 2, 4, 8)
ENVIRONMENT = ("cpu", "instructions", "threads", "device", "gpu", "cuda")  # what decides values, of `environment`


@dataclass
class Evaluation:
    """Measures subjects on one device in one precision. Existing results are reused.

    Processes with the same results file divide the work; each ends with all rows. An error of one subject becomes a
    row of kind `problem`, and the others continue.

    Args:
        results: where rows are kept, as soon as they are measured.
        device: where to compute.
        dtype: float32, bfloat16 or float64; of the weights and the computation.
        rounds: samples of each time.
        seed: of the tokens that are timed.
    """

    results: Results
    device: str | torch.device = "cpu"
    dtype: str = "float32"
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        facts = environment(self.device)
        self.environment = {
            **{name: facts[name] for name in ENVIRONMENT if name in facts},
            **{name: facts["versions"][name] for name in ("torch", "bsbr_pl", "python")},
            "dtype": self.dtype,
            "commit": git_commit(),
        }
        self._problems: set[str] = set()  # digests of the identities of those that this evaluation met
        self._changed: set[str] = set()  # digests of subjects whose data changed since training
        self._compressed: dict[tuple[str, str], dict[str, float]] = {}  # by data and split

    def run(
        self,
        subjects: Sequence[Subject],
        split: str = "val",
        multiples: Sequence[int] = MULTIPLES,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        """Certify trained subjects and draw their maps; measure accuracy and costs of those that pass.

        Args:
            subjects: with data.
            split: of the data: `val` or `test`.
            multiples: context lengths to predict text at, in lengths of training; a recall task has its own.
            lengths: tokens, to measure costs at.
        """
        self.courses(subjects)
        certified = self.certify(subjects)
        self.accuracy([(subject, _own_lengths(subject, multiples)) for subject in certified], split)
        self.maps(subjects)
        self.costs(certified, lengths)

    def certify(self, subjects: Sequence[Subject]) -> list[Subject]:
        """Certify each subject; return those that passed."""
        jobs = [self._job(subject, "certificate", self._certificate) for subject in subjects]
        self._run_all("certificates", jobs)
        found = [self.results.get(job.identity) for job in jobs]
        return [subject for subject, values in zip(subjects, found, strict=True) if values and values["passed"]]

    def accuracy(self, wanted: Iterable[tuple[Subject, Sequence[int | None]]], split: str) -> None:
        """Measure how well each subject predicts the data of its training.

        Args:
            wanted: subjects, with the lengths (tokens) of the samples; None for the length of its validation.
                Lengths that its data or the model cannot have are left out.
            split: `val` or `test`.
        """
        jobs = []
        for subject, lengths in wanted:
            with self._attempt({"kind": "data"}, subject.digest, subject.about):
                data = self._open_data(subject)
                found = [self._accuracy_job(subject, data, split, length) for length in lengths]
                jobs += [job for job in found if job is not None]
        self._run_all("accuracy", jobs)

    def costs(
        self,
        subjects: Sequence[Subject],
        lengths: Sequence[int],
        passes: Sequence[str] = PASSES,
        memory: bool = True,
    ) -> None:
        """The costs of each architecture and size at each length (tokens), all timed in the same rounds.

        If times cannot be locked, nothing is measured, and a problem says why.
        """
        if not subjects or not lengths:
            return
        words = timing_problem()
        self.problem({"kind": "cost"}, "costs", {"checkpoint": {"name": "costs"}}, words)
        if words:
            return
        first: dict[str, Subject] = {}
        for subject in subjects:
            first.setdefault(subject.architecture_digest, subject)
        for length in tqdm(lengths, "costs", disable=None):
            self._costs([s for s in first.values() if s.can_read(length + 1)], length, passes, memory)

    def maps(self, subjects: Sequence[Subject]) -> None:
        """The attention map of the first subject of each configuration, of those that have maps."""
        first: dict[str, Subject] = {}
        for subject in subjects:
            if not all(attention.has_map for attention in subject.model.attentions):
                continue
            config = subject.about.get("config", {})
            first.setdefault(digest([config, (subject.about.get("data") or {}).get("fingerprint")]), subject)
        self._run_all("attention maps", [self._job(subject, "map", self._map) for subject in first.values()])

    def courses(self, subjects: Sequence[Subject]) -> None:
        """The recorded curves of each training; written again if the run was continued."""
        jobs = [self._job(subject, "training", lambda one: course(one.record)) for subject in subjects]
        self.results.share(jobs, self._run)
        known = {digest(row["identity"]): row["about"] for row in self.results.rows}
        for job in jobs:
            before = known.get(digest(job.identity), {})
            about = before | job.about  # keeps what others have added, such as the study that it belongs to
            if about | {"command": None} != before | {"command": None}:  # another command alone changes nothing
                self._run(Job(job.identity, about, job.measure))

    def rows(self, subjects: Sequence[Subject]) -> list[Row]:
        """The rows of these subjects, in all environments, and the problems that this evaluation met.

        `about` is the present one: an older row may be from before the end of its run.
        """
        self.results.read()
        by_digest = {subject.digest: subject for subject in subjects}
        by_architecture = {subject.architecture_digest: subject for subject in reversed(subjects)}
        found = []
        for row in self.results.rows:
            identity = row["identity"]
            kind, checkpoint = identity["kind"], identity["checkpoint"]
            subject = (by_architecture if kind == "cost" else by_digest).get(checkpoint)
            if subject is None or identity.get("version") != VERSIONS.get(kind) or not on_own_data(row, subject.about):
                continue
            if kind in ("text", "recall") and checkpoint in self._changed:
                continue
            about = row["about"] | subject.about | {"command": row["about"].get("command", "")}
            found.append(row | {"about": about})
        return found + self.problems

    @property
    def problems(self) -> list[Row]:
        """Rows of the problems that this evaluation met."""
        return [row for row in self.results.rows if digest(row["identity"]) in self._problems]

    def identity(self, subject: Subject, kind: str, **facts: Any) -> dict[str, Any]:
        """The identity of a row: everything that decides its values."""
        place = {} if kind in ("map", "training") else {"environment": self.environment}
        checkpoint = subject.architecture_digest if kind == "cost" else subject.digest
        return {"kind": kind, "checkpoint": checkpoint, **facts, **place, "version": VERSIONS[kind]}

    def problem(self, of: Mapping[str, Any], checkpoint: str, about: Mapping[str, Any], words: str) -> None:
        """Save why the row with the facts `of` could not be measured; `words` are "" if the problem is solved."""
        identity = {"kind": "problem", "checkpoint": checkpoint, "of": dict(of)}
        known = self.results.get(identity) or {"problem": ""}
        if words:
            self._problems.add(digest(identity))
        if known["problem"] != words:
            self.results.add(identity, {"problem": words}, about)

    def _job(self, subject: Subject, kind: str, measure: Callable[..., dict[str, Any]], *of: Any, **facts: Any) -> Job:
        """A row with further `facts` in its identity; its values are `measure(subject, *of)`."""
        return Job(self.identity(subject, kind, **facts), subject.about, partial(measure, subject, *of))

    def _run_all(self, title: str, jobs: Sequence[Job]) -> None:
        with tqdm(total=len(jobs), desc=title, disable=None) as bar:
            missing = [job for job in jobs if self.results.get(job.identity) is None]
            bar.update(len(jobs) - len(missing))

            def run(job: Job) -> None:
                self._run(job)
                bar.update()

            self.results.share(missing, run)

    def _run(self, job: Job) -> None:
        of = {name: value for name, value in job.identity.items() if name in ("kind", "split", "length")}
        with self._attempt(of, job.identity["checkpoint"], job.about):
            self.results.add(job.identity, job.measure(), job.about)

    @contextmanager
    def _attempt(self, of: Mapping[str, Any], checkpoint: str, about: Mapping[str, Any]) -> Iterator[None]:
        """Record an error as the subject's problem and continue with the others; an error of the results file stops."""
        words = ""
        try:
            yield
        except NotKeptError:
            raise
        except ValueError as error:  # its message is a sentence
            words = one_line(error, 800)
        except Exception as error:
            words = f"{type(error).__name__}: {one_line(error)}"
        self.problem(of, checkpoint, about, words)

    def _model(self, subject: Subject) -> LanguageModel:
        """A copy of the model on this device in this precision, in evaluation mode."""
        model = copied(subject.model)
        return model.to(self.device, getattr(torch, self.dtype)).eval()

    def _certificate(self, subject: Subject) -> dict[str, Any]:
        return certify(self._model(subject), contexts=_contexts(subject), quiet=True).as_dict()

    def _open_data(self, subject: Subject) -> TokenData:
        if subject.open_data is None:
            raise ValueError(f"{subject.name} has no data to predict")
        try:
            return subject.open_data()
        except DataChangedError:
            self._changed.add(subject.digest)
            raise

    def _accuracy_job(self, subject: Subject, data: TokenData, split: str, length: int | None) -> Job | None:
        own = data.validation_length if data.kind == "text" else None
        length = own if length is None else length
        changes: dict[str, Any] = {}
        if length is not None and length != own:
            try:
                changes = data.at_length(length)
            except ValueError:  # says what is impossible at this length
                return None
            changes["eval_batch_size"] = max(1, data.eval_batch_size * data.validation_length // length)
        if not subject.can_read(length or data.validation_length):
            return None
        facts: dict[str, Any] = {"split": split, "data": data.fingerprint}
        if length is not None:
            facts["length"] = length
        return self._job(subject, data.kind, self._accuracy, data, split, changes, **facts)

    def _accuracy(self, subject: Subject, data: TokenData, split: str, changes: dict[str, Any]) -> dict[str, Any]:
        model = self._model(subject)
        if changes:
            assert subject.open_data is not None
            data = subject.open_data(**changes)
        if data.kind == "text":
            found = text_accuracy(model, data, split)  # type: ignore[arg-type]
            return found if changes else found | {"compressed": self._compress(data, split)}
        found = recall_accuracy(model, data, split)
        if not changes and data.answers_in_context and any(a.routes_chunks for a in model.attentions):
            found["retrieval"] = retrieval(model, data, split)
        return found

    def _compress(self, data: TokenData, split: str) -> dict[str, float]:
        """Bits per byte to which compressors reduce a split's text; each text is compressed once."""
        key = data.fingerprint, split
        if key not in self._compressed:
            assert data.text_data is not None
            self._compressed[key] = compressed_bits_per_byte(data.text_data.text(split))
        return self._compressed[key]

    def _map(self, subject: Subject) -> dict[str, Any]:
        assert subject.open_data is not None
        return draw_map(subject.model, subject.open_data(eval_batch_size=1, num_workers=0), subject.name)

    def _costs(self, subjects: Sequence[Subject], length: int, passes: Sequence[str], memory: bool) -> None:
        """Measure the missing costs at one length, in the same rounds."""

        def missing() -> list[Subject]:
            return [s for s in subjects if self.results.get(self._cost_identity(s, length)) is None]

        if not missing():
            return
        with timing_lock():
            self.results.read()
            models = {subject.name: self._model(subject) for subject in missing()}
            found, words = {}, ""
            try:
                found = measure_costs(models, length, self.rounds, passes, memory, self.seed) if models else {}
            except Exception as error:  # probably out of memory: continue with the other lengths
                words = f"costs at {length} tokens: {one_line(error, 300)}"
            for subject in subjects:
                if subject.name in found:
                    about = subject.about | {"timed_with": sorted(models)}
                    self.results.add(self._cost_identity(subject, length), found[subject.name], about)
                if subject.name in models:
                    self.problem({"kind": "cost", "length": length}, subject.architecture_digest, subject.about, words)

    def _cost_identity(self, subject: Subject, length: int) -> dict[str, Any]:
        return self.identity(subject, "cost", length=length, rounds=self.rounds)


def _contexts(subject: Subject) -> list[int] | None:
    """Lengths to certify a model at besides its own: that of its training, and the longest that text is predicted at,
    or the longest of a recall task; None where there is no data."""
    data = subject.about.get("data")
    if data is None:
        return None
    longest = max(MULTIPLES) * data["trained_length"] if data["kind"] == "text" else data["validation_length"]
    return [data["trained_length"], longest]


def _own_lengths(subject: Subject, multiples: Sequence[int]) -> list[int | None]:
    """The lengths of samples to predict: multiples of the training length of a text, and None, that of its validation,
    with the multiple 1; of a recall task None alone."""
    data = subject.about["data"]
    if data is None or data["kind"] != "text":
        return [None]
    lengths: list[int | None] = [None] if 1 in multiples else []
    lengths += [multiple * data["trained_length"] for multiple in multiples]
    return list(dict.fromkeys(None if length == data["validation_length"] else length for length in lengths))
