"""Fair budgets: sizes at which architectures have as many parameters, operations, bytes of state or seconds a step.

    python -m bsbr_pl.evals.matching --match params --reference standard --tokens 512 --hidden_dim 128

What is turned follows from the quantity and from what an architecture has: see `WAYS`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.attention.parts import check_positive
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import model_class
from bsbr_pl.parsing import Parser
from bsbr_pl.utils.files import write_whole
from bsbr_pl.utils.timing import measure, undisturbed
from bsbr_pl.values import one_line

from .analysis import aligned
from .knobs import DEFAULTS, Arguments, choices, differences, plain, search, turned

#: Quantity -> ways to match it. A way is a list of knobs, turned one after another; those that an architecture does not
#: have, or that move nothing, are passed over. The first way that reaches past the reference and to within `TOLERANCE`
#: of it is taken, else the nearest.
#:
#: Parameters are matched by the feed-forward networks, which leaves the attention alone. FLOPs and time are matched by
#: the width, `ff_dim` in proportion: a cheaper attention buys a larger model of the same shape, and `ff_dim` makes up
#: for the coarse steps of the width. State is matched by what bounds it.
WAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "params": (("ff_dim",), ("hidden_dim", "ff_dim")),
    "flops": (("hidden_dim", "ff_dim"),),
    "state_bytes": (("window_size",), ("chunk_size",), ("num_heads", "hidden_dim")),
    "step_time": (("hidden_dim", "ff_dim"),),
}
TOLERANCE = 0.05  # share of the reference: chunks, heads and widths have coarse steps
NOISE = 0.02  # the same of a time: what is nearer cannot be told apart


@dataclass(frozen=True)
class Matched:
    """A model with the arguments at which it comes closest to the reference."""

    arguments: Arguments
    turned: Arguments  # those that differ from what was given
    value: float  # parameters, operations, bytes or seconds
    reference: float  # the same of the reference
    problem: str | None = None  # one sentence, where the reference lies outside what can be reached

    @property
    def mismatch_percent(self) -> float:
        return 100 * (self.value / self.reference - 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a record."""
        return {**vars(self), "arguments": plain(self.arguments), "mismatch_percent": self.mismatch_percent}


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
    """Turn the sizes of models until each comes as close as it can to the reference.

    Args:
        quantity: `params` (all, the embedding among them), `flops` (of a forward pass over `num_tokens`), `state_bytes`
            (the most that the decode state of one sequence holds up to `num_tokens`) or `step_time` (seconds of a
            training step, timed in the same rounds as the reference's).
        models: name -> arguments of `LanguageModel`; what is no knob of the quantity stays as it is.
        num_tokens: tokens T of a sequence.
        reference: whose value the others are to have, a name in `models`.
        batch_size: sequences of a training step, for `step_time`.
        rounds: samples of each time.
        device: where to take times.

    Returns:
        name -> what was found; the reference among them, as it was given.

    Raises:
        ValueError: an unknown quantity or reference, or an argument out of range.
    """
    if quantity not in WAYS:
        raise ValueError(f"match must be one of {', '.join(WAYS)}, got {quantity!r}")
    if reference not in models:
        raise ValueError(f"reference must be one of the models ({', '.join(models)}), got {reference!r}")
    check_positive(tokens=num_tokens, batch_size=batch_size, rounds=rounds)
    given = {name: DEFAULTS | one for name, one in models.items()}

    def values(of: Mapping[str, Arguments]) -> dict[str, float]:
        """Those of the reference and of others; times are of the same rounds."""
        of = {**of, reference: given[reference]}
        if quantity == "step_time":
            return step_times(of, num_tokens, batch_size, rounds, device)
        return {name: budgets(one, num_tokens)[quantity] for name, one in of.items()}

    def share(arguments: Arguments) -> float:
        found = values({"": arguments})
        return found[""] / found[reference]

    nearest = {name: _nearest(quantity, one, share, num_tokens) for name, one in given.items() if name != reference}
    nearest[reference] = Nearest(given[reference], 1.0)
    found = values({name: one.arguments for name, one in nearest.items()})
    return {
        name: Matched(
            arguments=nearest[name].arguments,
            turned=differences(given[name], nearest[name].arguments),
            value=found[name],
            reference=found[reference],
            problem=nearest[name].problem(f"{quantity} of {name}"),
        )
        for name in models
    }


def budgets(arguments: Arguments, num_tokens: int) -> dict[str, int]:
    """Every quantity that has a closed form, counted on a model without memory."""
    with torch.device("meta"):
        model = LanguageModel(**arguments)
    # The state of a chunk under way is dropped at its end: the most is held somewhere in the last chunk's length.
    period = max(getattr(attention, "chunk_size", 1) for attention in model.attentions)
    state = max(map(model.state_size, range(max(1, num_tokens - period + 1), num_tokens + 1)))
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "flops": model.flops(num_tokens),
        "state_bytes": state * model.embedding.weight.element_size(),
    }


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

    with undisturbed():
        timings = measure({name: step(one) for name, one in models.items()}, rounds, device=device)
    return {name: timing.median for name, timing in timings.items()}


@dataclass
class Nearest:
    """The arguments that came nearest, their share of the reference, and what was tried."""

    arguments: Arguments
    share: float
    tried: list[float] = field(default_factory=list)  # shares
    ranges: dict[str, Sequence[int]] = field(default_factory=dict)  # of the knobs

    def problem(self, what: str) -> str | None:
        if abs(self.share - 1) <= TOLERANCE or min(self.tried) <= 1 <= max(self.tried):
            return None
        knobs = " and ".join(f"{knob} from {one[0]} to {one[-1]}" for knob, one in self.ranges.items())
        side = "above" if self.share > 1 else "below"
        return f"{what} stays {side} that of the reference with {knobs or 'nothing to turn'}: this is the nearest"


def _nearest(quantity: str, start: Arguments, share: Callable[[Arguments], float], num_tokens: int) -> Nearest:
    enough = NOISE if quantity == "step_time" else 0.0
    first = share(start)
    best = Nearest(start, first, [first])
    for way in WAYS[quantity]:
        at, at_share = start, first
        seen: list[float] = []
        for knob in way:
            settings = choices(at, knob, num_tokens)
            shares = search(at, knob, settings, share, enough) if settings else {}
            if len(set(shares.values())) > 1:  # it moves something
                best.ranges[knob] = settings
                seen += shares.values()
                setting = min(shares, key=lambda one: abs(shares[one] - 1))
                if abs(shares[setting] - 1) < abs(at_share - 1):
                    at, at_share = turned(at, knob, setting), shares[setting]
        best.tried += seen
        if abs(at_share - 1) < abs(best.share - 1):
            best.arguments, best.share = at, at_share
        if seen and min(seen) <= 1 <= max(seen) and abs(at_share - 1) <= TOLERANCE:
            break
    return best


def table(quantity: str, num_tokens: int, matched: Mapping[str, Matched], reference: str) -> str:
    """What remains of the mismatch, what was turned, and what the other quantities are as shares of the reference's."""
    counts = {name: budgets(one.arguments, num_tokens) for name, one in matched.items()}
    others = [other for other in counts[reference] if other != quantity]
    rows = [["", quantity, "mismatch", *others, "turned"]]
    for name, one in matched.items():
        value = f"{one.value:.4g} s" if quantity == "step_time" else f"{one.value:,}"
        mismatch = "reference" if name == reference else f"{one.mismatch_percent:+.2f} %"
        shares = [f"{counts[name][other] / counts[reference][other]:.2f}" for other in others]
        settings = ", ".join(f"{knob}={setting}" for knob, setting in one.turned.items())
        rows.append([name, value, mismatch, *shares, settings or "-"])
    return "\n".join([aligned(rows), *(one.problem for one in matched.values() if one.problem)])


def overlay(arguments: Arguments, comment: str) -> str:
    """A YAML for train.py with all that decides the model but `vocab_size`, which it takes from the data."""
    model = {name: value for name, value in plain(arguments).items() if name != "vocab_size"}
    return f"# {comment}\n{yaml.safe_dump({'model': model}, sort_keys=False)}"


def solve(
    quantity: str,
    reference: str = "standard",
    tokens: int = 512,
    architectures: list[str] = list(ARCHITECTURES),  # noqa: B006 - never changed; the command line shows the default
    vocab_size: int = 8192,
    hidden_dim: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    ff_dim: int | None = None,
    model_options: dict[str, dict[str, Any]] | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """Print the sizes at which architectures have the budget of a reference.

    Args:
        quantity: what is matched
        reference: whose value the others are to have: a key of ARCHITECTURES
        tokens: length of the sequence
        architectures: which to match
        vocab_size: token ids, as many as the data has that will be trained on
        hidden_dim: width of the reference, and of the others before anything is turned
        num_layers: number of layers
        num_heads: heads of each attention
        ff_dim: width of the feed-forward networks; 4 * hidden_dim where null, 0 for none
        model_options: "architecture -> its options: {bsbr: {chunk_size: 64}}"
        batch_size: sequences of a training step, for step_time
        rounds: samples of each time
        device: where to take times
        out: folder for one YAML an architecture, for train.py
    """
    sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers, "num_heads": num_heads, "ff_dim": ff_dim}
    options = model_options or {}
    models = {
        name: {"attention": model_class(name).factory(**options.get(name, {})), "vocab_size": vocab_size, **sizes}
        for name in dict.fromkeys([reference, *architectures, *options])
    }
    matched = match(quantity, models, tokens, reference, batch_size=batch_size, rounds=rounds, device=device)
    print(f"{quantity} to match: {reference} at {tokens} tokens; the other quantities as shares of the reference's\n")
    print(table(quantity, tokens, matched, reference))
    for name, one in matched.items() if out else ():
        comment = f"{quantity} at {tokens} tokens, {vocab_size} ids: {one.mismatch_percent:+.2f} % against {reference}"
        write_whole(Path(str(out)) / f"{name}.yaml", overlay(one.arguments, comment).encode())


def main(args: Sequence[str] | None = None) -> int:
    """Parse the command line and solve; the exit code."""
    parser = Parser(prog="matching", description=(solve.__doc__ or "").split("\n")[0])
    parser.add_argument("--match", choices=list(WAYS), required=True, help="what is matched")
    parser.add_function_arguments(solve, skip={"quantity"}, as_group=False)
    options = parser.parse_args(args).as_dict()
    try:
        solve(options.pop("match"), **options)
    except (ValueError, TypeError, OSError) as error:
        parser.error(one_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
