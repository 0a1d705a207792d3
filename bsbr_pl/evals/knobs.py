"""What can be turned of a model's arguments, how far, and the setting of it that comes closest to a target."""

from collections.abc import Callable, Sequence
from typing import Any

from bsbr_pl.models import SIZES
from bsbr_pl.spec import AttentionSpec, plain_specs, specs_of

Arguments = dict[str, Any]  # of LanguageModel
DEFAULTS = {size.name: size.default for size in SIZES if size.default is not size.empty}
FACTOR = 4  # sizes are turned down to a quarter and up to four times


def choices(arguments: Arguments, knob: str, num_tokens: int) -> Sequence[int]:
    """What a knob can be set to, in order; nothing where the model has no such knob."""
    value = get(arguments, knob)
    if not value:
        return ()
    if knob == "window_size":
        return range(1, num_tokens + 1)
    if knob == "chunk_size":
        return range(1, num_tokens // 2 + 1)  # a chunk alone has no earlier one to remember
    if knob == "num_heads":
        width = arguments["hidden_dim"]
        heads = range(-(-value // FACTOR), FACTOR * value + 1)
        return [one for one in heads if width % (2 * one) == 0]
    step = 2 * arguments["num_heads"] if knob == "hidden_dim" else 1  # whole heads, of even width for rotary positions
    lowest = value - (value + -value // FACTOR) // step * step
    return range(lowest, FACTOR * value + 1, step)


def get(arguments: Arguments, knob: str) -> int:
    """What a knob is set to; 0 where the model has no such knob."""
    if knob == "ff_dim" and _replaces_feed_forward(arguments):
        return 0
    if knob == "ff_dim" and arguments[knob] is None:
        return 4 * arguments["hidden_dim"]
    return arguments[knob] if knob in arguments else options(arguments).get(knob, 0)


def turned(arguments: Arguments, knob: str, value: int) -> Arguments:
    """The arguments with a knob set to a value; `ff_dim` keeps its proportion to `hidden_dim`."""
    if knob not in arguments:
        spec = AttentionSpec.of(arguments["attention"])
        return {**arguments, "attention": AttentionSpec(spec.cls, {**spec.options, knob: value})}
    if knob == "hidden_dim" and arguments["ff_dim"]:
        arguments = {**arguments, "ff_dim": round(arguments["ff_dim"] * value / arguments["hidden_dim"])}
    return {**arguments, knob: value}


def _replaces_feed_forward(arguments: Arguments) -> bool:
    specs = specs_of(arguments["attention"])
    return isinstance(specs, AttentionSpec) and specs.cls.replaces_feed_forward


def options(arguments: Arguments) -> dict[str, Any]:
    """The options of the architecture, those left to their defaults among them; none where layers have their own."""
    specs = specs_of(arguments["attention"])
    return specs.settings if isinstance(specs, AttentionSpec) else {}


def differences(before: Arguments, after: Arguments) -> Arguments:
    """The arguments and options that are set to something else."""
    old, new = ({**options(one), **one} for one in (before, after))
    return {name: new[name] for name in new if name != "attention" and new[name] != old[name]}


def plain(arguments: Arguments) -> Arguments:
    """The arguments as plain values, for a file."""
    return {**arguments, "attention": plain_specs(arguments["attention"])}


def search(
    start: Arguments, knob: str, settings: Sequence[int], share: Callable[[Arguments], float], enough: float
) -> dict[int, float]:
    """Look for the setting at which `share` is closest to 1.

    With a size, the share rises all along: it steps along the settings for as long as they help, then takes steps of
    half the length. With an option of the attention it may fall and rise again, as the state of BSBR does, which is
    large with small chunks and with large ones: all settings are tried.

    Args:
        start: the other arguments, and where the search begins.
        knob: what is turned.
        settings: what it can be set to, in order.
        share: of the target, at some arguments.
        enough: the search ends at this distance from 1.

    Returns:
        setting -> share, for all that were tried and that the model can have.
    """
    shares: dict[int, float] = {}

    def miss(i: int) -> float:
        if settings[i] not in shares:
            try:
                shares[settings[i]] = share(turned(start, knob, settings[i]))
            except ValueError:  # of a model that cannot be built so
                return float("inf")
        return abs(shares[settings[i]] - 1)

    if knob not in start:
        for i in range(len(settings)):
            miss(i)
        return shares
    at = min(range(len(settings)), key=lambda i: abs(settings[i] - get(start, knob)))
    step = max(1, len(settings) // 8)
    while step and miss(at) > enough:
        nearest = min((i for i in (at, at - step, at + step) if 0 <= i < len(settings)), key=miss)
        step = step // 2 if nearest == at else step
        at = nearest
    return shares
