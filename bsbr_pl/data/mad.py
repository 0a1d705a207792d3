"""The MAD tasks of mad_tasks.py as a data module, with their published sizes.

The public code averages the accuracy over the classes of each batch (and counts 0 for a class that was predicted but
not asked for). Here accuracy is the share of asked positions that are right.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from .mad_tasks import Samples, compression, fuzzy_recall, in_context_recall, memorization, selective_copying
from .recall import RecallData, Segment

#: Task -> its function, and the published arguments.
TASKS: dict[str, tuple[Callable[..., Samples], dict[str, Any]]] = {
    "compression": (compression, {"context_length": 64, "vocab_size": 16, "num_train": 12_800}),
    "in_context_recall": (in_context_recall, {"context_length": 128, "vocab_size": 16, "num_train": 12_800}),
    "fuzzy_recall": (
        fuzzy_recall,
        {"context_length": 128, "vocab_size": 16, "num_train": 12_800, "motif_size": 3},
    ),
    "noisy_recall": (
        in_context_recall,
        {"context_length": 128, "vocab_size": 32, "num_train": 12_800, "noise_vocab_size": 16, "noise_share": 0.2},
    ),
    "selective_copying": (
        selective_copying,
        {"context_length": 256, "vocab_size": 16, "num_train": 12_800, "num_copied": 16},
    ),
    "memorization": (memorization, {"context_length": 32, "vocab_size": 256, "num_train": 256}),
}


class MADData(RecallData):
    """A task of the MAD suite, trained on a fixed set of samples for many epochs. None stands for the published value.

    Args:
        task: compression, in_context_recall, fuzzy_recall, noisy_recall, selective_copying or memorization
        vocab_size: all ids, those of marks and noise included
        context_length: tokens of a sample; of compression, twice the published length
        num_train: samples of the training set, which every epoch repeats in another order
        num_test: samples for validation, and as many others for testing
        noise_vocab_size, noise_share: of noisy_recall
        motif_size: of fuzzy_recall
        num_copied: of selective_copying

    Raises:
        ValueError: an unknown task, an argument that the task does not have, or an impossible size.
    """

    def __init__(
        self,
        task: Literal[
            "compression", "in_context_recall", "fuzzy_recall", "noisy_recall", "selective_copying", "memorization"
        ] = "memorization",
        vocab_size: int | None = None,
        context_length: int | None = None,
        num_train: int | None = None,
        num_test: int = 1_280,
        noise_vocab_size: int | None = None,
        noise_share: float | None = None,
        motif_size: int | None = None,
        num_copied: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}")
        function, sizes = TASKS[task]
        given: dict[str, Any] = {"vocab_size": vocab_size, "context_length": context_length, "num_train": num_train}
        given |= {"noise_vocab_size": noise_vocab_size, "noise_share": noise_share}
        given |= {"motif_size": motif_size, "num_copied": num_copied}
        given = {name: value for name, value in given.items() if value is not None}
        for name in given.keys() - sizes:
            raise ValueError(f"{name}={given[name]} is no argument of {task}: leave it out")
        sizes = sizes | given
        length, size = sizes.pop("context_length"), sizes.pop("num_train")
        super().__init__(length, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)
        self.answers_in_context = task.endswith("recall")
        if task == "memorization":
            sizes["seed"] = seed
        test = train = partial(function, length=length, **sizes)
        if self.answers_in_context:
            train, test = partial(train, training=True), partial(test, training=False)
        name = f"{task}_T{length}"
        self._set_segments(sizes["vocab_size"], [Segment(name, train, size)], [Segment(name, test, num_test)])

    def plateau(self) -> float:
        """Of compression, what a guess gets that knows where the mark is asked for; of recall and copying, the most
        frequent answer of the context."""
        if self.hparams["task"] == "memorization":
            return self.chance()
        if self.hparams["task"] != "compression":
            return self._most_frequent()
        half = self.context_length // 2
        return (1 + (half - 1) / (self.vocab_size - 1)) / half
