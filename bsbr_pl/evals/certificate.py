"""Certificates: a model is causal, and it decodes what it computes in training.

Everything is computed on a float64 copy, so that rounding can neither hide a leak nor look like one.
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

TOLERANCE = 1e-8  # of float64 logits, relative to the largest logit
STANDARD_ERRORS = 4.0  # how far below ln V chance may bring the loss on random tokens
MOST_TOKENS = 1 << 15
MOST_FLOPS = 1e14  # of one forward pass


@dataclass(frozen=True)
class Check:
    """One property: the measured value and its limit."""

    name: str
    measured: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit  # False for NaN


@dataclass(frozen=True)
class Certificate:
    """The checks of one model at one length. A model with a failed check is excluded from comparisons."""

    length: int
    checks: list[Check]
    noise: float  # standard deviation of what was added to the weights for the second and third measurement

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a record."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"passed": self.passed, "length": self.length, "noise": self.noise, "checks": checks}


def certify(model: LanguageModel, seed: int = 0) -> Certificate:
    """Check that a model is causal and decodes what it computes in training.

    Each check is measured with the model's own weights, and with noise of standard deviation D^-1/2 added to and
    subtracted from every parameter: a gate initialised at zero could hide a causal leak. The largest of the three
    counts. `random_tokens` has only the model's own weights.

    T = 2 C + 3 random tokens are used, or one token less than the model has learned positions, if that is fewer. C is
    the largest `reach` or `period` of the attentions, 64 without any. The tokens are cut at 0, 1, T - 1 and at E - 1, E
    and E + 1 for every reach or period E; for decoding also at T / 2. All positions are 0-based:

        suffix_K          for every cut K: the largest change of logits 0..K when all tokens after K change;
                          `suffix_T-1` compares with one more token at the end
        future_gradient   the largest |d logits_t / d embedding_s| over s > t, for t at every cut
        random_tokens     ln V minus the loss on uniformly random tokens, in standard errors: above 0 only by chance, or
                          by seeing the answer
        decode_step       the largest difference of logits between all tokens at once and one token after another
        decode_prefill    the same, one token after another from a prefilled state, for every cut
        continue          the same, all other tokens at once from a prefilled state, for every cut

    The first three find different leaks: of tokens, of smooth functions of them, and those that training has used. The
    last three are absent if an attention of the model cannot decode. Differences are relative to the largest logit.

    Args:
        model: on any device, in any precision; it is not changed.
        seed: of the random tokens.

    Raises:
        ValueError: a window or chunk, or the model's FLOPs, are too large.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model).to("cpu" if device.type == "mps" else device).double().eval()  # MPS has no float64
    reaches = {attention.reach for attention in model.attentions if attention.reach is not None}
    edges = reaches | {attention.period for attention in model.attentions if attention.period > 1} or {64}
    T = 2 * max(edges) + 3
    if model.max_length:
        T = min(T, model.max_length - 1)
    _check_size(model, T)
    near_edges = {edge + i for edge in edges for i in (-1, 0, 1)}
    cuts = sorted(({0, 1, T - 1} | near_edges) & set(range(T)))
    own = _measure(model, cuts, T, seed)
    others = [_measure(with_noise(model, sign), cuts, T, seed) for sign in (1, -1)]
    checks = []
    for name, (measured, limit) in own.items():
        worst = [measured, *(other[name][0] for other in others if name != "random_tokens")]
        checks.append(Check(name, float(torch.tensor(worst, dtype=torch.float64).max()), limit))  # keeps a NaN
    return Certificate(T, checks, noise_scale(model))


def _check_size(model: LanguageModel, length: int) -> None:
    """Reject models that take too long: their sizes may be those of a hostile checkpoint."""
    if length > MOST_TOKENS:
        raise ValueError(f"its windows and chunks need {length:,} tokens; certificates have at most {MOST_TOKENS:,}")
    try:
        flops = model.flops(length)
    except (AttributeError, NotImplementedError):  # an attention of another package may have no closed form
        return
    if flops > MOST_FLOPS:
        raise ValueError(f"it needs {flops:.1e} FLOPs for {length:,} tokens, more than {MOST_FLOPS:.0e}")


def noise_scale(model: LanguageModel) -> float:
    """D^-1/2, the standard deviation of `with_noise`."""
    return model.embedding.weight.shape[1] ** -0.5


def with_noise(model: LanguageModel, sign: int = 1) -> LanguageModel:
    """A copy with Gaussian noise added to every parameter, or subtracted; the noise is always the same."""
    model, random = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random) * noise_scale(model)
            parameter.add_(noise.to(parameter), alpha=sign)
    return model


def _measure(model: LanguageModel, cuts: list[int], length: int, seed: int) -> dict[str, tuple[float, float]]:
    """Check -> measured value, limit; of one set of weights, in float64."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(model.vocab_size, shape, generator=random).to(device)

    ids = tokens(1, length)
    found = {}
    with torch.no_grad():
        logits = model(ids)[0]
        size = float(logits.abs().max()) or 1.0
        for cut in cuts:
            found[f"suffix_{cut}"] = _suffix_change(model, ids, tokens, logits, cut) / size, TOLERANCE
    found["future_gradient"] = _future_gradient(model, ids, cuts[:-1]), 0.0
    with torch.no_grad():
        found["random_tokens"] = _below_chance(model, tokens, length), STANDARD_ERRORS
        if all(attention.has_decode for attention in model.attentions):
            differences = _decoding_differences(model, ids, logits, sorted({*cuts, length // 2}))
            found |= {name: (difference / size, TOLERANCE) for name, difference in differences.items()}
    return found


def _suffix_change(model: LanguageModel, ids: Tensor, tokens: Callable[..., Tensor], logits: Tensor, cut: int) -> float:
    """The largest change of logits 0..cut when all tokens after the cut change."""
    if cut == ids.shape[1] - 1:
        other = torch.cat((ids, tokens(1, 1)), 1)  # no token follows the last one: append one
    else:
        later = ids.shape[1] - cut - 1
        shifted = 1 + tokens(1, later) % max(1, model.vocab_size - 1)  # never 0: every later token changes
        other = torch.cat((ids[:, : cut + 1], (ids[:, cut + 1 :] + shifted) % model.vocab_size), 1)
    return float((model(other)[0, : cut + 1] - logits[: cut + 1]).abs().max())


def _future_gradient(model: LanguageModel, ids: Tensor, cuts: list[int]) -> float:
    """The largest gradient of logits at a cut, in a random direction, by the embedding of a later token."""
    embedded: list[Tensor] = []

    def detach(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.embedding.register_forward_hook(detach)
    try:
        with torch.enable_grad():
            hidden = model.hidden(ids)[0]
    finally:
        hook.remove()
    worst = 0.0
    direction = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(hidden)
    for cut in cuts:
        (gradient,) = torch.autograd.grad(hidden[cut] @ direction, embedded[0], retain_graph=True)
        worst = torch.maximum(gradient[0, cut + 1 :].abs().max(), torch.tensor(worst)).item()  # keeps a NaN
    return worst


def _below_chance(model: LanguageModel, tokens: Callable[..., Tensor], length: int) -> float:
    """How many standard errors the mean loss on random tokens is below ln V."""
    ids = tokens(8, length + 1)
    nats = torch.cat([token_nats(model(row[None, :-1]), row[None, 1:]).flatten() for row in ids])
    error = float(nats.std()) / math.sqrt(len(nats))
    below = math.log(model.vocab_size) - float(nats.mean())
    return below / max(error, 1e-12)


def _decoding_differences(model: LanguageModel, ids: Tensor, logits: Tensor, cuts: list[int]) -> dict[str, float]:
    """The largest differences from `logits` (T, V) of the checks `decode_step`, `decode_prefill` and `continue`."""
    found: dict[str, list[Tensor]] = {"decode_step": [], "decode_prefill": [], "continue": []}
    for cut in cuts:
        states = model.prefill(ids[:, :cut])[1] if cut else model.init_state(1)
        stepped = (_stepped(model, ids[0, cut:], states) - logits[cut:]).abs().max()
        found["decode_prefill" if cut else "decode_step"].append(stepped)
        continued = model.head(model.decode(ids[:, cut:], states)[0])[0]
        found["continue"].append((continued - logits[cut:]).abs().max())
    return {name: float(torch.stack(differences).max()) for name, differences in found.items() if differences}


def _stepped(model: LanguageModel, ids: Tensor, states: list[Any]) -> Tensor:
    """The logits (T, V) of ids (T,), one token after another from `states`."""
    logits = []
    for token in ids:
        next_logits, states = model.step(token[None], states)
        logits.append(next_logits[0])
    return torch.stack(logits)
