"""How the cost of models grows with the length of the sequence: time, memory, FLOPs, decode state.

The cost is that of a model from the embedding to the last norm, for one sequence. The head is excluded: its cost per
token is equal for all architectures and would hide the differences.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.flops import forward_flops
from bsbr_pl.utils.macs import count_macs
from bsbr_pl.utils.memory import measure_memory
from bsbr_pl.utils.timing import measure, one_more_token

#: What is timed: the forward pass, forward and backward, and one more token after T of them.
PASSES = ("forward", "training", "decode")
SHORT = 256  # tokens with which operators without a formula are looked for


def measure_costs(
    models: Mapping[str, LanguageModel],
    length: int,
    rounds: int = 5,
    passes: Sequence[str] = PASSES,
    memory: bool = True,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The cost of every model at one length, batch size 1, all timed in the same interleaved rounds.

    Args:
        models: by name, on one device; they are put into evaluation mode; their gradients do not change.
        length: tokens T of the sequence.
        rounds: samples of each time.
        passes: which of `forward`, `training` and `decode` to time.
        memory: also measure peak memory, by one more forward and training pass.
        seed: of the random tokens.

    Returns:
        for each name: forward, training, decode -> {"seconds": median, "interval": [low, high], "samples"};
        forward_bytes, training_bytes -> peak beyond what the model and its input hold; forward_flops (2 a
        multiply-add, by the closed form); state_bytes of the decode state in the model's dtype. If an attention cannot
        decode, decode and state_bytes are absent. If one has no closed form, forward_flops are counted by torch's
        counter, and `uncounted` names the operators that fvcore has no formula for.
    """
    device = next(iter(models.values())).embedding.weight.device
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    ids = {}
    for name, model in models.items():
        random = torch.Generator().manual_seed(seed)
        ids[name] = torch.randint(model.eval().vocab_size, (1, length + 1), generator=random).to(device)
    for which in passes:
        calls = {}
        for name, model in models.items():
            if which != "decode" or can_decode(model):
                calls[name] = call(model, ids[name], which)
        shortest = 0.02 if which == "decode" else 0.0  # a decoded token is too quick for one reading of the clock
        timings = measure(calls, rounds, warmup=1, min_seconds=shortest, device=device) if calls else {}
        for name, timing in timings.items():
            found[name][which] = timing.as_dict()
    for name, model in models.items():
        if memory:
            for which in ("forward", "training"):
                used = measure_memory(call(model, ids[name], which), device, [model, ids[name]])
                found[name][f"{which}_bytes"] = used["peak_bytes"] - used["held_bytes"]
        found[name] |= _counted(model, length)
    return found


def can_decode(model: LanguageModel) -> bool:
    return all(attention.has_decode for attention in model.attentions)


def _counted(model: LanguageModel, length: int) -> dict[str, Any]:
    """Counts FLOPs and bytes of the decode state, which are not measured; an unknown one is absent."""
    weight, found = model.embedding.weight, dict[str, Any]()
    if can_decode(model):
        found["state_bytes"] = state_bytes(model, length)
    try:
        flops: int | None = model.flops(length)
    except NotImplementedError:
        flops = forward_flops(model, length)
        with suppress(Exception):  # a foreign module may be impossible to trace
            ids = weight.new_zeros((1, min(length, SHORT)), dtype=torch.long)
            found["uncounted"] = sorted(count_macs(model, ids).uncounted)
    if flops is not None:
        found["forward_flops"] = flops - 2 * length * weight.numel()
    return found


@torch.no_grad()
def state_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of the decode state of one sequence after `length` tokens.

    In a precision below float32, a state is made: what adds up over all tokens is kept in float32.
    """
    weight = model.embedding.weight
    if weight.element_size() >= torch.float32.itemsize:
        return model.state_size(length) * weight.element_size()
    return _bytes(model.prefill(weight.new_zeros((1, length), dtype=torch.long))[1])


def _bytes(state: Any) -> int:
    """Of the tensors in nested lists and tuples."""
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(map(_bytes, state)) if isinstance(state, list | tuple) else 0


def call(model: LanguageModel, ids: Tensor, which: str) -> Callable[[], object]:
    """One of the `PASSES` over ids (1, T + 1): over the first T tokens, or over the last one after them."""

    @torch.no_grad()
    def forward() -> object:
        return model.hidden(ids[:, :-1])

    def training() -> object:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(model.hidden(ids[:, :-1]).sum(), parameters, allow_unused=True)

    if which == "forward":
        return forward
    if which == "training":
        return training
    if which != "decode":
        raise ValueError(f"passes must be among {', '.join(PASSES)}, got {which!r}")
    return one_more_token(model, ids)
