"""The checks of a certificate, measured on one set of weights."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from bsbr_pl.metrics import token_nats
from bsbr_pl.patches import TorchDispatchMode
from bsbr_pl.values import one_line

from .probes import OwnModel, Vectors

TOLERANCE = 1e-8  # of float64 outputs, relative to the largest output
GRADIENT_TOLERANCE = 1e-12  # of float64 gradients, relative to the largest gradient
ROUNDED = 1e-5  # of both, for a module that rounds to float32 inside
STANDARD_ERRORS = 4.0  # how far below ln V chance may bring the loss on random tokens
LENGTHS = (1, 37, 101, 197)  # not multiples of a chunk
MOST_TRAINED = 1024  # tokens of another text that is computed in training mode too
OTHER_PRECISION = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}  # largest change of the outputs, relative
PADDED = 128  # a padded length is a multiple of it


@dataclass(frozen=True)
class Check:
    """One property: the measured value and its limit.

    A check that is not `required` disqualifies no model: the property is only useful, or could not be measured, as
    `note` says. `token` is the first token whose output changed with later tokens.
    """

    name: str
    measured: float
    limit: float
    required: bool = True
    token: int | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit  # False for NaN

    def __str__(self) -> str:
        if self.passed:
            return "passed"
        words = self.note or ("" if self.token is None else f"the output of token {self.token} saw the future")
        return ": ".join(filter(None, ["FAILED" if self.required else "no", words]))


def impossible(name: str, limit: float, error: Exception) -> Check:
    """A check that a module cannot compute. It disqualifies no module."""
    return Check(name, math.nan, limit, False, note=f"{type(error).__name__}: {one_line(error, 120)}")


def worst(checks: list[Check]) -> Check:
    """The largest measured value of one check (NaN is larger than all), and the first token."""
    measured = torch.tensor([check.measured for check in checks], dtype=torch.float64)
    token = min((check.token for check in checks if check.token is not None), default=None)
    first = next((check for check in checks if check.note), checks[0])
    return replace(first, measured=float(measured.max()), token=token)


class Measurement:
    """The checks of a module in float64 and evaluation mode.

    Args:
        run: how to run it.
        cuts: positions after which tokens are changed.
        length: tokens T.
        seed: of the random inputs.

    Raises:
        ValueError: the module cannot be called, or does not give an output for each token.
    """

    def __init__(self, run: Vectors, cuts: list[int], length: int, seed: int) -> None:
        self.run, self.cuts, self.length = run, cuts, length
        self.random = Generator().manual_seed(seed)
        self.unused = copy.deepcopy(run)  # what keeps its last computation can be copied only before
        self.x = run.text(self.random, 1, length)
        rounding = _Rounding()
        name, given = type(run.module).__name__, tuple(self.x.shape)
        try:
            with torch.no_grad(), rounding:
                output = run(self.x)
        except (RuntimeError, LookupError, AttributeError, AssertionError) as error:
            raise ValueError(f"{name} cannot compute inputs of shape {given}: {one_line(error)}") from error
        if output.dim() != 3 or output.shape[:2] != self.x.shape[:2]:
            raise ValueError(f"{name} must give an output for each token of {given}, got shape {tuple(output.shape)}")
        if run.vocab_size is None and output.shape != self.x.shape:
            raise ValueError(f"{name} must map (B, T, D) to (B, T, D), got {tuple(output.shape)} for {given}")
        self.output = output[0]  # (T, F)
        self.size = float(self.output.abs().max()) or 1.0
        self.limit = ROUNDED if rounding.found else TOLERANCE
        self.gradient_limit = ROUNDED if rounding.found else GRADIENT_TOLERANCE

    @property
    def is_finite(self) -> bool:
        return bool(self.output.isfinite().all())

    def all(self) -> dict[str, Check]:
        """Every check by its name."""
        *before, last = self.cuts
        found = [self.suffix(cut) for cut in before]
        found.append(self._try(f"suffix_{last}", self.suffix, last))  # reads one token more
        found += [self.future_gradient(), self.training_suffix()]
        with torch.no_grad():
            found.append(self._try("repeat", self._read, self.x))
            found.append(self._try("batch", self._batch))
            if (padded := self._padded()) is not None:
                found.append(self._try("padding", self._read, padded))
            for n in LENGTHS:
                if n < self.length:
                    found.append(self._try(f"length_{n}", self._read, self.x[:, :n]))
            if self.run.can_decode:
                found += self.decoding()
        return {check.name: check for check in found}

    def suffix(self, cut: int) -> Check:
        """The largest change of outputs 0..cut when all tokens after the cut change."""
        if cut == self.length - 1:  # no token follows the last one: append one
            other = torch.cat((self.x, self.run.draw(self.random, 1, 1)), 1)
        else:
            other = self._other_after(cut)
        with torch.no_grad():
            return self._leak(f"suffix_{cut}", self.run(other)[:, : cut + 1], self.output[None], self.limit)

    def training_suffix(self) -> Check:
        """Like `suffix`, for all cuts before the last token, on two texts at once, in training mode with gradients."""
        run = copy.deepcopy(self.unused)  # batch norm keeps statistics
        run.module.train()
        return self._changes("training_suffix", run, self._two_texts(), self.cuts[:-1], self.limit, torch.enable_grad)

    def context(self, length: int) -> Check:
        """Like `suffix`, on a text of another length, in evaluation and, up to MOST_TRAINED tokens, training mode."""
        name = f"context_{length}"
        run, text = copy.deepcopy(self.unused), self.run.text(self.random, 1, length)

        def measure(training: bool) -> Check:
            run.module.train(training)
            return self._changes(name, run, text, sorted({(length - 1) // 2, length - 2}), self.limit)

        return self._in_modes(name, measure, (False, True) if length <= MOST_TRAINED else (False,))

    def precision(self, run: Vectors, dtype: torch.dtype) -> Check:
        """Like `suffix`, on two texts in the precision of `run`, whose mode is changed."""
        texts = self._two_texts()
        texts = texts.to(dtype) if texts.is_floating_point() else texts

        def measure(training: bool) -> Check:
            run.module.train(training)
            grad = torch.enable_grad if training else torch.no_grad
            return self._changes("precision", run, texts, self.cuts[:-1], OTHER_PRECISION[dtype], grad)

        return self._in_modes("precision", measure, (False, True))

    def _in_modes(self, name: str, measure: Callable[[bool], Check], modes: Iterable[bool]) -> Check:
        """The worst of all modes; one that a foreign module cannot compute hides no leak of another."""
        found = [self._try(name, measure, training) for training in modes]
        return worst([check for check in found if check.required] or found)

    def _changes(
        self,
        name: str,
        run: Vectors,
        texts: Tensor,
        cuts: Iterable[int],
        limit: float,
        grad: Callable[[], Any] = torch.no_grad,
    ) -> Check:
        """The largest change of outputs 0..cut of `texts` when all tokens after a cut change, with equal dropout."""
        devices = [self.x.device] if self.x.device.type == "cuda" else []

        def outputs(x: Tensor) -> Tensor:
            with grad(), torch.random.fork_rng(devices):
                torch.manual_seed(0)
                return run(x).detach()

        expected, found = outputs(texts), [Check(name, 0.0, limit)]
        for cut in cuts:
            changed = outputs(self._other_after(cut, texts))[:, : cut + 1]
            found.append(self._leak(name, changed, expected, limit))
        return worst(found)

    def future_gradient(self) -> Check:
        """The largest gradient of an output at a cut, in a random direction, by a later token; see `certify`."""
        with torch.enable_grad():
            leaf, output = self.run.from_leaf(self.x)
        direction = torch.randn(output.shape[-1], generator=Generator().manual_seed(0), dtype=torch.float64).to(output)
        future, past = [torch.zeros(())], [torch.zeros(())]
        for cut in self.cuts[:-1] if output.requires_grad else ():
            (gradient,) = torch.autograd.grad(output[0, cut] @ direction, leaf, retain_graph=True, allow_unused=True)
            if gradient is not None:
                future.append(gradient[0, cut + 1 :].abs().max().cpu())
                past.append(gradient[0, : cut + 1].abs().max().cpu())
        largest = float(torch.stack([*past, *future]).max()) or 1.0
        return Check("future_gradient", float(torch.stack(future).max()) / largest, self.gradient_limit)

    def below_chance(self) -> Check:
        """How many standard errors the mean loss on random tokens is below ln V."""
        V = self.run.vocab_size or 1
        ids = self.run.draw(self.random, 8, self.length + 1)
        with torch.no_grad():
            nats = torch.cat([token_nats(self.run(row[None, :-1]), row[None, 1:]).flatten() for row in ids])
        error = float(nats.std()) / math.sqrt(len(nats))
        below = math.log(V) - float(nats.mean())
        return Check("random_tokens", below / max(error, 1e-12), STANDARD_ERRORS)

    def decoding(self) -> list[Check]:
        """`decode_step`, `decode_prefill` and, where possible, `continue`."""
        cuts = sorted({*self.cuts, self.length // 2}) if self.run.can_continue else [0, self.length // 2]
        found: dict[str, list[Check]] = defaultdict(list)
        for cut in cuts:
            name = "decode_prefill" if cut else "decode_step"
            found[name].append(self._try(name, self._stepped, cut))
            if self.run.can_continue:
                found["continue"].append(self._try("continue", self._continued, cut))
        return [worst(checks) for checks in found.values()]

    def _read(self, x: Tensor) -> float:
        return self._change(self.run(x))

    def _state(self, cut: int) -> Any:
        return self.run.resume(self.x[:, :cut], None)[1] if cut else self.run.start()

    def _stepped(self, cut: int) -> float:
        state, outputs = self._state(cut), []
        for t in range(cut, self.length):
            output, state = self.run.step(self.x[:, t], state)
            outputs.append(output[0])
        return self._change(torch.stack(outputs)[None], cut)

    def _continued(self, cut: int) -> float:
        return self._change(self.run.resume(self.x[:, cut:], self._state(cut))[0], cut)

    def _batch(self) -> float:
        """The change in every row of a batch: the text is in two of four rows, then in the other two."""
        other = self.run.draw(self.random, 1, self.length)
        batch = torch.cat((self.x, other, self.x, other))
        outputs = self.run(batch)[::2], self.run(batch.roll(1, 0))[1::2]
        return max(self._change(row[None]) for row in torch.cat(outputs))

    def _padded(self) -> Tensor | None:
        """The inputs with zeros after them; None if there are not as many positions."""
        length = PADDED * (self.length // PADDED + 1)
        if self.run.max_length and length > self.run.max_length:
            return None
        zeros = self.x.new_zeros(1, length - self.length, *self.x.shape[2:])
        return torch.cat((self.x, zeros), 1)

    def _two_texts(self) -> Tensor:
        return torch.cat((self.x, self.run.text(self.random, 1, self.length)))

    def _other_after(self, cut: int, texts: Tensor | None = None) -> Tensor:
        x = self.x if texts is None else texts
        return torch.cat((x[:, : cut + 1], self.run.change(self.random, x[:, cut + 1 :]).to(x)), 1)

    def _change(self, output: Tensor, start: int = 0) -> float:
        """The largest difference of an output (1, t, F) of tokens `start`, ..., relative to the largest output."""
        tokens = min(output.shape[1], self.length - start)
        return float((output[0, :tokens] - self.output[start : start + tokens]).abs().max()) / self.size

    def _leak(self, name: str, outputs: Tensor, expected: Tensor, limit: float) -> Check:
        """Outputs (B, t, F) that must be the first ones of `expected`."""
        size = float(expected.abs().max()) or 1.0
        change = (outputs - expected[:, : outputs.shape[1]]).abs().amax((0, 2)) / size
        leaked = (change > limit).nonzero()
        return Check(name, float(change.max()), limit, token=int(leaked[0]) if len(leaked) else None)

    def _try(self, name: str, measure: Callable[..., float | Check], *of: Any) -> Check:
        """A check of a foreign module, which may not be able to compute it. A `LanguageModel` always is."""
        try:
            found = measure(*of)
            return found if isinstance(found, Check) else Check(name, found, self.limit)
        except Exception as error:
            if isinstance(self.run, OwnModel):
                raise
            return impossible(name, self.limit, error)


class _Rounding(TorchDispatchMode):
    """Notices that a float64 tensor becomes one of lower precision."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        low = isinstance(output, Tensor) and output.dtype in (torch.float32, torch.bfloat16, torch.float16)
        self.found |= low and any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in args)
        return output
