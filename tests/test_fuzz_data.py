"""Random texts, documents, tasks and measurements: nothing is lost or counted twice, no NaN comes out in silence."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import SEEDS, attempt

from bsbr_pl.data import InductionData, MQARData, SelectiveCopyData
from bsbr_pl.data.base import SPLITS, Steps
from bsbr_pl.data.corpus import prepare
from bsbr_pl.data.files import Piece
from bsbr_pl.data.sources import HeldOut
from bsbr_pl.data.tasks import draw, needle
from bsbr_pl.data.tokenizer import BPETokenizer, ByteTokenizer, train_bpe
from bsbr_pl.data.windows import Windows
from bsbr_pl.values import bootstrap_interval, crossover, exponent

SPECIAL = st.sampled_from(["<|endoftext|>", "\r\n \t", "\x00\x7f", "\U0001f468\u200d\U0001f469", "        return"])
TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | SPECIAL, max_size=4).map("".join)


@given(st.lists(TEXT, max_size=4), st.integers(257, 300), TEXT, st.binary(max_size=30), SEEDS)
def test_tokenizers_keep_every_byte(lessons, vocab_size, text, raw, seed):
    """Whatever a BPE learnt from; ids that no text has, which a model may write, are bytes of the lengths it says."""
    assert ByteTokenizer().decode_bytes(ByteTokenizer().encode(raw.decode("latin-1"))).decode() == raw.decode("latin-1")
    assert ByteTokenizer().decode_bytes(list(raw)) == raw
    for tokenizer in (ByteTokenizer(), BPETokenizer(train_bpe(lessons, vocab_size))):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.eos_id not in ids
        assert tokenizer.encode_batch([text, *lessons])[0].tolist() == ids
        ids = np.random.default_rng(seed).integers(tokenizer.vocab_size, size=20)
        assert len(tokenizer.decode_bytes(ids)) == tokenizer.token_bytes[ids].sum()


class Documents:
    """A source of given documents: (split, its pieces)."""

    total_bytes = None
    held_out = HeldOut(0.1, 0.1)
    left_out: ClassVar[dict[str, int]] = {}

    def __init__(self, documents: list[tuple[str, list[str]]]) -> None:
        self.documents = documents

    def identity(self) -> dict[str, Any]:
        return {"documents": self.documents}

    def pieces(self) -> Iterator[Piece]:
        for split, texts in self.documents:
            for text in texts:
                yield Piece(split, text, False)
            yield Piece(split, "", True)


@given(
    st.lists(st.tuples(st.sampled_from(SPLITS), st.lists(TEXT, max_size=3)), max_size=6),
    st.sampled_from(["bytes", "bpe"]),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 3),
    SEEDS,
)
def test_windows_count_every_token_once(documents, tokenizer, context_length, batch_size, world_size, seed):
    of = {split: ["".join(texts) for name, texts in documents if name == split] for split in SPLITS}
    with TemporaryDirectory() as folder:
        make = partial(prepare, Documents(documents), "documents", tokenizer, 260, Path(folder))
        if not any(of["train"]):
            with pytest.raises(ValueError, match="source='documents' has no training text"):
                make()
            return
        corpus = make()
        for split in SPLITS:
            stream, offsets = np.array(corpus.tokens(split)), corpus.documents(split)
            decode = corpus.tokenizer.decode_bytes
            assert [decode(stream[a:b]).decode() for a, b in pairwise(offsets)] == of[split]
            assert corpus.meta["splits"][split]["bytes"] == len("".join(of[split]).encode())
            if not of[split]:
                with pytest.raises(ValueError, match=f"the {split} split of source='documents' is empty"):
                    Windows(corpus, split, context_length, seed)
                continue
            windows = Windows(corpus, split, context_length, seed)
            plan = windows.eval_batches(batch_size * world_size)
            shares = [Steps(windows, plan, rank, world_size) for rank in range(world_size)]
            batches = [share[step] for step in range(len(plan)) for share in shares]
            targets = torch.cat([batch["targets"].flatten() for batch in batches])
            assert targets[targets >= 0].tolist() == stream[1:].tolist()
            assert sum(int(batch["num_bytes"].sum()) for batch in batches) == corpus.meta["splits"][split]["bytes"]
        check_training(Windows(corpus, "train", context_length, seed), batch_size)


def check_training(windows: Windows, batch_size: int) -> None:
    """No token is the target of two windows of an epoch, and none is missing from a window."""
    epochs = attempt(
        lambda: [windows.train_batches(batch_size, epoch) for epoch in range(3)],
        f"context_length={windows.context_length} leaves ",
    )
    if epochs is None:
        assert windows.length <= windows.context_length * (batch_size + 1)
        return
    for plan in epochs:
        assert plan.shape == epochs[0].shape
        starts = np.sort(plan.ravel())
        assert (np.diff(starts) >= windows.context_length).all()
        assert starts[0] >= 0
        assert starts[-1] + windows.context_length < windows.length
        assert (windows[plan[0]]["targets"] >= 0).all()


@st.composite
def tasks(choose: st.DrawFn) -> Any:
    """A recall task of any size, possible or not, as a call that makes its first batch of each split."""
    length = choose(st.sampled_from([8, 16, 32]) | st.integers(-2, 40))
    count, vocab_size = (
        choose(st.integers(1, 4) | st.integers(-1, 12)),
        choose(st.integers(40, 90) | st.integers(-2, 90)),
    )
    seed, split = choose(SEEDS), choose(st.sampled_from(SPLITS))
    sizes = {"seed": seed, "batch_size": choose(st.sampled_from([1, 2, 3, 0]))}
    depth = choose(st.none() | st.floats(0, 1) | st.floats())
    kind = choose(st.sampled_from(["mqar", "induction", "selective_copy", "needle"]))

    def make() -> tuple[np.ndarray, np.ndarray]:
        if kind == "needle":
            text = np.arange(max(0, vocab_size - 1))
            task = partial(needle, text=lambda: text, length=length, vocab_size=vocab_size, depth=depth)
            task = partial(task, needles=count, value_length=choose(st.integers(-1, 3)))
            return draw(task, seed, split, 0, np.arange(3))
        if kind == "mqar":
            data = MQARData(vocab_size, [(length, count, 9)], [(length, count, 9)], **sizes)
        elif kind == "induction":
            data = InductionData(vocab_size, length, [length], 9, 9, **sizes)
        else:
            data = SelectiveCopyData(vocab_size, length, count, 9, 9, **sizes)
        batch = next(iter(data.loader(split)))
        return batch["input_ids"].numpy(), batch["targets"].numpy()

    return make, length, vocab_size


OTHERS = ("induction needs context_length=", "the task has too few distinct samples")


@given(tasks())
def test_a_recall_task_is_possible_or_says_why_not(task):
    make, length, vocab_size = task
    found = attempt(
        make,
        "segment ",
        "vocab_size=",
        "context_length=",
        "num_copied=",
        "batch_size=",
        "depth=",
        "num_needles=",
        *OTHERS,
    )
    if found is None:
        return
    inputs, targets = found
    assert inputs.shape == targets.shape == (len(inputs), length)
    assert 0 <= inputs.min() <= inputs.max() < vocab_size
    assert (targets >= 0).any(1).all()
    assert targets.max() < vocab_size


VALUES = st.floats(-1e300, 1e300) | st.floats(1e-9, 1e9) | st.sampled_from([math.nan, math.inf, -math.inf])
CURVES = st.dictionaries(
    st.integers(0, 10**6) | st.sampled_from([256, 512, 1024]), st.lists(VALUES, max_size=4), max_size=5
)
COSTS = st.floats(1e-9, 1e9)
GOOD = st.dictionaries(st.integers(1, 10**6), st.lists(COSTS, min_size=1, max_size=4), min_size=2, max_size=5)


@given(st.lists(VALUES | st.integers(-5, 5), max_size=8), st.sampled_from([np.median, np.mean]), VALUES, SEEDS)
def test_an_interval_lies_among_its_samples(samples, statistic, confidence, seed):
    found = attempt(lambda: bootstrap_interval(samples, statistic, confidence, 50, seed), "samples ", "confidence=")
    assert (found is None) == (not samples or not np.isfinite(samples).all() or not 0 <= confidence <= 1)
    if found is None:
        return
    low, high = found
    slack = 1e-9 * max(map(abs, samples))
    assert min(samples) - slack <= low <= high <= max(samples) + slack


def good(curve: dict[int, list[float]]) -> bool:
    return all(length >= 1 and np.isfinite(values).all() for length, values in curve.items())


@given(CURVES, CURVES)
def test_no_nan_comes_of_any_curve(curve, other):
    words = "samples must map lengths of at least 1 to finite numbers"
    for question, asked in (
        (lambda: [exponent(curve, resamples=20)], [curve]),
        (lambda: [crossover(curve, other, 20)], [curve, other]),
    ):
        answer = attempt(question, words)
        assert (answer is None) == (not all(map(good, asked)))
        found = answer[0] if answer else None
        numbers = [] if found is None else [found.get("exponent"), *(found["interval"] or [])]
        assert all(math.isfinite(number) for number in numbers if number is not None)


@given(GOOD, st.floats(-3, 3), COSTS, SEEDS)
def test_exponents_and_crossovers_obey_their_laws(curve, power, factor, seed):
    lengths = sorted(curve)
    found = exponent({n: [factor * n**power] for n in lengths}, resamples=20)
    assert found["exponent"] == pytest.approx(power, abs=1e-6)
    assert found["lengths"] == [lengths[0], lengths[-1]]
    found, scaled = (exponent({n: [c * v for v in curve[n]] for n in lengths}, resamples=20) for c in (1, factor))
    assert found["interval"][0] <= found["interval"][1]
    assert scaled["exponent"] == pytest.approx(found["exponent"], rel=1e-6, abs=1e-6)

    random = np.random.default_rng(seed)
    other = {n: [factor * v for v in random.permutation(curve[n])] for n in lengths}
    for n in random.choice(lengths, 2):
        other[int(n)] = [float(v) for v in random.lognormal(size=3)]
    below, above = crossover(curve, other, 20), crossover(other, curve, 20)
    assert below["longest"] == above["longest"] == lengths[-1]
    assert below["length"] is None or above["length"] is None
    for passed, (ours, theirs) in ((below, (curve, other)), (above, (other, curve))):
        at_end = np.median(ours[lengths[-1]]) < np.median(theirs[lengths[-1]])
        assert (passed["length"] is not None) == at_end
        ends = [end for end in (passed["length"], *passed["interval"]) if end is not None]
        assert all(lengths[0] <= end <= lengths[-1] for end in ends)
        low, high = passed["interval"]
        assert high is None or low <= high
