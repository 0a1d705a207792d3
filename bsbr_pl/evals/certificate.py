"""A model's certificate: it never sees the future, and it decodes what it was trained to say.

Everything is computed on a copy in float64, so that rounding cannot hide a leak, nor look like one.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bsbr_pl.metrics import token_nats
from bsbr_pl.model import LanguageModel

TOLERANCE = 1e-8  # of float64 logits, relative to the largest
STANDARD_ERRORS = 4.0  # by which the loss on random tokens may lie below ln V by chance


@dataclass(frozen=True)
class Check:
    """One property: what was measured, the limit it must not exceed, and whether it did not."""

    name: str
    measured: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit  # False for NaN


@dataclass(frozen=True)
class Certificate:
    """The checks of one model at one length; a model with a check that failed is not to be compared with others."""

    length: int
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a record."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"passed": self.passed, "length": self.length, "checks": checks}


def certify(model: LanguageModel, seed: int = 0) -> Certificate:
    """Whether a model is causal and decodes what it computes in training, on its own weights.

    With C the largest chunk or window of its attentions, T = 2 C + 3 random tokens (one less than it has
    learned positions, if those are fewer), all 0-based:

        suffix_K          for K in {0, 1, C-1, C, C+1, T-1}: the largest change of logits 0..K when all tokens after K
                          are others; `suffix_T-1` compares one more token at the end
        future_gradient   the largest |d logits_t / d embedding_s| over s > t, for the same t
        random_tokens     ln V less the loss on uniformly random tokens, in standard errors: nobody can guess those,
                          unless by looking
        decode_step       largest difference of logits: all at once, against one token after another from nothing
        decode_prefill    the same, from a prefilled half

    The first three find different leaks: of tokens, of what is smooth in them, and of what training made use of.

    Args:
        model: on any device, in any precision; it is not changed.
        seed: of the random tokens.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model).to("cpu" if device.type == "mps" else device).double().eval()  # MPS has no float64
    device = next(model.parameters()).device
    reach = [getattr(a, name) for a in model.attentions for name in ("chunk_size", "window_size") if hasattr(a, name)]
    C = max(reach, default=64)
    T = 2 * C + 3
    if model.max_length:
        T = min(T, model.max_length - 1)
    random = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(model.vocab_size, shape, generator=random).to(device)

    ids = tokens(1, T)
    places = sorted({0, 1, C - 1, C, C + 1, T - 1} & set(range(T)))
    with torch.no_grad():
        logits = model(ids)[0]
        size = float(logits.abs().max()) or 1.0
        checks = [Check(f"suffix_{t}", _suffix_change(model, ids, tokens, logits, t) / size, TOLERANCE) for t in places]
    checks.append(Check("future_gradient", _future_gradient(model, ids, places[:-1]), 0.0))
    with torch.no_grad():
        checks.append(Check("random_tokens", _below_chance(model, tokens, T), STANDARD_ERRORS))
        for name, start in (("decode_step", 0), ("decode_prefill", T // 2)):
            difference = float((_decoded(model, ids, start) - logits[start:]).abs().max())
            checks.append(Check(name, difference / size, TOLERANCE))
    return Certificate(T, checks)


def _suffix_change(
    model: LanguageModel, ids: Tensor, tokens: Callable[..., Tensor], logits: Tensor, place: int
) -> float:
    """The largest change of logits up to `place` when all tokens after it are others."""
    if place == ids.shape[1] - 1:
        other = torch.cat((ids, tokens(1, 1)), 1)  # there is nothing after the last token: append some
    else:
        later = ids.shape[1] - place - 1
        shifted = 1 + tokens(1, later) % max(1, model.vocab_size - 1)  # never 0: every later token becomes another
        other = torch.cat((ids[:, : place + 1], (ids[:, place + 1 :] + shifted) % model.vocab_size), 1)
    return float((model(other)[0, : place + 1] - logits[: place + 1]).abs().max())


def _future_gradient(model: LanguageModel, ids: Tensor, places: list[int]) -> float:
    """The largest gradient of logits at `places`, in a random direction, to the embedding of a later token."""
    embedded: list[Tensor] = []

    def cut(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.embedding.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            hidden = model.hidden(ids)[0]
    finally:
        hook.remove()
    worst = 0.0
    direction = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(hidden)
    for place in places:
        (gradient,) = torch.autograd.grad(hidden[place] @ direction, embedded[0], retain_graph=True)
        worst = torch.maximum(gradient[0, place + 1 :].abs().max(), torch.tensor(worst)).item()  # keeps a NaN
    return worst


def _below_chance(model: LanguageModel, tokens: Callable[..., Tensor], length: int) -> float:
    """How many standard errors the mean loss on random tokens lies below ln V."""
    ids = tokens(8, length + 1)
    nats = torch.cat([token_nats(model(row[None, :-1]), row[None, 1:]).flatten() for row in ids])
    error = float(nats.std()) / math.sqrt(len(nats))
    below = math.log(model.vocab_size) - float(nats.mean())
    return below / max(error, 1e-12)


def _decoded(model: LanguageModel, ids: Tensor, start: int) -> Tensor:
    """The logits (T - start, V) at positions start, ..., T - 1, decoded one by one after `start` prefilled tokens."""
    states = model.prefill(ids[:, :start])[1] if start else model.init_state(1)
    found = []
    for t in range(start, ids.shape[1]):
        logits, states = model.step(ids[:, t], states)
        found.append(logits[0])
    return torch.stack(found)
