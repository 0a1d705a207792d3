"""Fair budgets: sizes at which architectures have equal parameters, FLOPs, state bytes or step times."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bsbr_pl.attention import Attention
from bsbr_pl.attention.parts import check_choice, check_positive
from bsbr_pl.feed_forward import default_ff_dim
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import SIZES
from bsbr_pl.spec import AttentionSpec, plain_specs, specs_of
from bsbr_pl.utils.flops import forward_flops
from bsbr_pl.utils.timing import measure, timing_lock

from .analysis import aligned
from .costs import can_decode

Arguments = dict[str, Any]  # of LanguageModel
DEFAULTS = {size.name: size.default for size in SIZES if size.default is not size.empty}

REACH = "reach"  # replaced by the option that sets how many tokens are seen exactly: chunk_size, window_size
#: Quantity -> ways to match it. A way is a list of sizes that are changed one after another. A size that an
#: architecture does not have, or that has no effect, is skipped. The first way that passes the reference and comes
#: within `TOLERANCE` of it is used, otherwise the nearest.
#:
#: Parameters are matched by the feed-forward networks, which leaves the attention alone. FLOPs and time are matched by
#: the width, `ff_dim` in proportion: a cheaper attention buys a larger model of the same shape, and `ff_dim` makes up
#: for the coarse steps of the width. State is matched by what bounds it.
WAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "params": (("ff_dim",), ("hidden_dim", "ff_dim")),
    "flops": (("hidden_dim", "ff_dim"),),
    "state_bytes": ((REACH,), ("num_heads", "hidden_dim")),
    "step_time": (("hidden_dim", "ff_dim"),),
}
TOLERANCE = 0.05  # share of the reference: chunks, heads and widths have coarse steps
NOISE = 0.02  # the same for times: a smaller difference cannot be measured
FACTOR = 4  # sizes go down to a quarter and up to four times


@dataclass(frozen=True)
class Matched:
    """A model with the arguments at which it comes closest to the reference."""

    arguments: Arguments
    changed: Arguments  # those that differ from what was given
    value: float  # parameters, operations, bytes or seconds
    reference: float  # the same of the reference
    problem: str | None = None  # one sentence, if no size reaches the reference

    @property
    def mismatch_percent(self) -> float:
        return 100 * (self.value / self.reference - 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {**vars(self), "arguments": plain(self.arguments), "mismatch_percent": self.mismatch_percent}


def plain(arguments: Mapping[str, Any]) -> Arguments:
    """Arguments with the attention as plain values."""
    return {**arguments, "attention": plain_specs(arguments["attention"])}


def match(
    quantity: str,
    models: Mapping[str, Arguments],
    num_tokens: int,
    reference: str,
    *,
    batch_size: int = 1,
    rounds: int = 5,
    device: str | torch.device = "cpu",
) -> dict[str, Matched]:
    """Change the sizes of models until each comes as close as it can to the reference.

    Args:
        quantity: `params` (all, the embedding among them), `flops` (of a forward pass over `num_tokens`), `state_bytes`
            (the most that the decode state of one sequence holds up to `num_tokens`) or `step_time` (seconds of a
            training step, timed in the same rounds as the reference's).
        models: name -> arguments of `LanguageModel`; those that do not decide the quantity stay as they are.
        num_tokens: tokens T of a sequence.
        reference: the name of the reference model in `models`.
        batch_size: sequences of a training step, for `step_time`.
        rounds: samples of each time.
        device: where to measure times.

    Returns:
        name -> what was found; the reference is included, unchanged.

    Raises:
        ValueError: an unknown quantity or reference, or an argument out of range.
    """
    check_choice(WAYS, match=quantity)
    if reference not in models:
        raise ValueError(f"reference must be one of the models ({', '.join(models)}), got {reference!r}")
    check_positive(tokens=num_tokens, batch_size=batch_size, rounds=rounds)
    given = {name: DEFAULTS | one | {"attention": specs_of(one["attention"])} for name, one in models.items()}

    def values(others: Mapping[str, Arguments]) -> dict[str, float]:
        """The quantity of the reference and of others; times are of the same rounds."""
        every = {**others, reference: given[reference]}
        if quantity == "step_time":
            with timing_lock():
                return step_times(every, num_tokens, batch_size, rounds, device)
        found = {name: budgets(arguments, num_tokens) for name, arguments in every.items()}
        for name, known in found.items():
            if quantity not in known:
                spec = every[name]["attention"]
                raise ValueError(f"match={quantity}: {spec} does not say its {quantity}: match params or step_time")
        return {name: known[quantity] for name, known in found.items()}

    def share(arguments: Arguments) -> float:
        found = values({"": arguments})
        return found[""] / found[reference]

    nearest: dict[str, tuple[Arguments, str | None]] = {reference: (given[reference], None)}
    for name in models:
        if name != reference:
            nearest[name] = closest(share, given[name], quantity, num_tokens)
    found = values({name: arguments for name, (arguments, _) in nearest.items()})
    matched = {}
    for name in models:
        arguments, why = nearest[name]
        problem = why and f"{quantity} of {name} {why}"
        changed = differences(given[name], arguments)
        matched[name] = Matched(arguments, changed, found[name], found[reference], problem)
    return matched


def budgets(arguments: Arguments, num_tokens: int) -> dict[str, int]:
    """Every quantity that the model tells, counted on a model without memory."""
    with torch.device("meta"):
        model = LanguageModel(**arguments)
    found = {"params": sum(parameter.numel() for parameter in model.parameters())}
    if flops := forward_flops(model, num_tokens):
        found["flops"] = flops
    if can_decode(model):
        # The state of an unfinished chunk is dropped at its end: the largest one occurs within the last chunk's length.
        period = max(attention.period for attention in model.attentions)
        state = max(map(model.state_size, range(max(1, num_tokens - period + 1), num_tokens + 1)))
        found["state_bytes"] = state * model.embedding.weight.element_size()
    return found


def step_times(
    models: Mapping[str, Arguments], num_tokens: int, batch_size: int, rounds: int, device: str | torch.device
) -> dict[str, float]:
    """Seconds of an optimiser step of each model, the median of interleaved rounds."""

    def step(arguments: Arguments) -> Callable[[], None]:
        with torch.random.fork_rng([]):
            model = LanguageModel(**arguments).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (batch_size, num_tokens + 1), generator=random).to(device)

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()

        return run

    timings = measure({name: step(one) for name, one in models.items()}, rounds, device=device)
    return {name: timing.median for name, timing in timings.items()}


def closest(
    share: Callable[[Arguments], float], start: Arguments, quantity: str, num_tokens: int
) -> tuple[Arguments, str | None]:
    """The sizes at which `share`, the value divided by the reference's, comes closest to 1.

    Returns:
        the arguments; why no size matches, as the end of a sentence, None if the reference lies within the range that
        was tried.
    """
    first = share(start)
    best, best_share, tried = start, first, [first]
    ranges: dict[str, Sequence[int]] = {}  # of the sizes that change something
    for way in WAYS[quantity]:
        arguments, own_share, seen = start, first, list[float]()
        for name in way:
            size = reach_option(arguments) if name == REACH else name
            if size is None:
                continue
            shares = _shares(share, arguments, size, quantity, num_tokens)
            if len(set(shares.values())) < 2:
                continue  # the size changes nothing
            ranges[size] = size_values(arguments, size, num_tokens)
            seen += shares.values()
            value = min(shares, key=lambda value: abs(shares[value] - 1))
            if abs(shares[value] - 1) < abs(own_share - 1):
                arguments, own_share = set_size(arguments, size, value), shares[value]
        tried += seen
        if abs(own_share - 1) < abs(best_share - 1):
            best, best_share = arguments, own_share
        if seen and min(seen) <= 1 <= max(seen) and abs(own_share - 1) <= TOLERANCE:
            break
    if abs(best_share - 1) <= TOLERANCE or min(tried) <= 1 <= max(tried):
        return best, None
    changed = " or ".join(f"{size} from {values[0]} to {values[-1]}" for size, values in ranges.items())
    side = "above" if best_share > 1 else "below"
    return best, f"stays {side} that of the reference with {changed or 'no size to change'}: this is the nearest"


def _shares(
    share: Callable[[Arguments], float], start: Arguments, size: str, quantity: str, num_tokens: int
) -> dict[int, float]:
    """Share by value of a size, of all values that were tried and that the model can have.

    The share rises with a size of the model: the search steps along the values while that helps, then halves its
    step. With an option of the attention it may fall and rise again, as the state of BSBR does, which is large with
    small chunks and with large ones: all values are tried.
    """
    values, shares = size_values(start, size, num_tokens), dict[int, float]()

    def miss(i: int) -> float:
        if values[i] not in shares:
            try:
                shares[values[i]] = share(set_size(start, size, values[i]))
            except ValueError:  # the model cannot have this size
                return float("inf")
        return abs(shares[values[i]] - 1)

    if size not in start:
        for i in range(len(values)):
            miss(i)
        return shares
    enough = NOISE if quantity == "step_time" else 0.0
    now = get_size(start, size)
    at = min(range(len(values)), key=lambda i: abs(values[i] - now), default=0)
    step = max(1, len(values) // 8) if values else 0
    while step and miss(at) > enough:
        nearest = min((i for i in (at, at - step, at + step) if 0 <= i < len(values)), key=miss)
        step = step // 2 if nearest == at else step
        at = nearest
    return shares


def size_values(arguments: Arguments, size: str, num_tokens: int) -> Sequence[int]:
    """The values that a size can have, in order; empty if the model does not have this size."""
    value = get_size(arguments, size)
    if not value:
        return ()
    if size not in arguments:
        in_chunks = _bounds(set_size(arguments, size, 2 * value))[1] != _bounds(arguments)[1]
        return range(1, (num_tokens // 2 if in_chunks else num_tokens) + 1)  # one chunk has no earlier one to remember
    smallest = math.ceil(value / FACTOR)
    if size == "num_heads":
        return [n for n in range(smallest, FACTOR * value + 1) if arguments["hidden_dim"] % (2 * n) == 0]
    step = 2 * arguments["num_heads"] if size == "hidden_dim" else 1  # whole heads, of even width for rotary positions
    steps_down = (value - smallest) // step
    return range(value - steps_down * step, FACTOR * value + 1, step)


def get_size(arguments: Arguments, size: str) -> int:
    """The value of an argument or of an option of the attention; 0 if the model does not have it."""
    spec = arguments["attention"]
    if size not in arguments:
        return spec.settings[size]
    if size == "ff_dim" and isinstance(spec, AttentionSpec) and spec.replaces_feed_forward:
        return 0
    if size == "ff_dim" and arguments[size] is None:
        return default_ff_dim(arguments["hidden_dim"], arguments["ff_activation"])
    return arguments[size]


def set_size(arguments: Arguments, size: str, value: int) -> Arguments:
    """The arguments with a size set to a value; `ff_dim` keeps its proportion to `hidden_dim`."""
    if size not in arguments:
        spec = arguments["attention"]
        return {**arguments, "attention": AttentionSpec(spec.cls, {**spec.options, size: value})}
    if size == "hidden_dim" and arguments["ff_dim"]:
        arguments = {**arguments, "ff_dim": round(arguments["ff_dim"] * value / arguments["hidden_dim"])}
    return {**arguments, size: value}


def reach_option(arguments: Arguments) -> str | None:
    """The option that sets how many tokens an attention sees exactly: chunk_size, window_size; None without one.

    It is found by trying: it is the integer option that changes `reach` of the attention.
    """
    spec = arguments["attention"]
    options = spec.settings if isinstance(spec, AttentionSpec) and issubclass(spec.cls, Attention) else {}
    for name, value in options.items():
        if type(value) is int:
            with suppress(ValueError):  # an option may allow some values only
                if _bounds(set_size(arguments, name, 2 * value))[0] != _bounds(arguments)[0]:
                    return name
    return None


def _bounds(arguments: Arguments) -> tuple[int | None, int]:
    """`reach` and `period` of an attention."""
    with torch.device("meta"):
        attention = arguments["attention"](arguments["hidden_dim"], arguments["num_heads"])
    return attention.reach, attention.period


def differences(before: Arguments, after: Arguments) -> Arguments:
    """The arguments and options that have another value."""

    def settings(arguments: Arguments) -> Arguments:
        spec = arguments["attention"]
        return (spec.settings if isinstance(spec, AttentionSpec) else {}) | arguments

    old, new = settings(before), settings(after)
    return {name: new[name] for name in new if name != "attention" and new[name] != old[name]}


def unmatched(quantity: str, matched: Mapping[str, Matched]) -> list[str]:
    """A sentence about each model that is not within `TOLERANCE` of the reference."""
    found = []
    for name, one in matched.items():
        if one.problem:
            found.append(one.problem)
        elif abs(one.mismatch_percent) > 100 * TOLERANCE:
            found.append(f"{quantity} of {name} differs from that of the reference by {one.mismatch_percent:+.1f} %")
    return found


def table(quantity: str, num_tokens: int, matched: Mapping[str, Matched], reference: str) -> str:
    """The remaining mismatch, the changed sizes, and the other quantities as shares of the reference's."""
    counts = {name: budgets(one.arguments, num_tokens) for name, one in matched.items()}
    others = [other for other in counts[reference] if other != quantity]
    rows = [["", quantity, "mismatch", *others, "changed"]]
    for name, one in matched.items():
        value = f"{one.value:.4g} s" if quantity == "step_time" else f"{one.value:,}"
        mismatch = "reference" if name == reference else f"{one.mismatch_percent:+.2f} %"
        shares = []
        for other in others:
            known = other in counts[name]
            shares.append(f"{counts[name][other] / counts[reference][other]:.2f}" if known else "-")
        sizes = ", ".join(f"{size}={value}" for size, value in one.changed.items())
        rows.append([name, value, mismatch, *shares, sizes or "-"])
    problems = [one.problem for one in matched.values() if one.problem]
    return "\n".join([aligned(rows), *problems])
