"""Memory: bytes of live tensors on a CPU, the allocator's own figures on CUDA, resident bytes of the process.

`LiveTensors` and `CudaMemory` are meters with one interface: `current` bytes, `peak` bytes since `reset`.
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB = 1_000_000  # bytes


class Meter(Protocol):
    """Something that knows how much memory is in use, and the most that was since its last reset."""

    @property
    def current(self) -> int: ...

    @property
    def peak(self) -> int: ...

    def reset(self) -> None: ...


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensor storages that are alive, while it is entered: `with LiveTensors(model) as live: ...`

    Every storage that an operator takes or gives is counted once, whatever views it, until it is freed, whoever holds
    it (a saved activation, a gradient, optimiser state). An input that was never seen before was there all along and
    raises the peak too. Scratch space that an operator frees before it returns is not seen. Results are unchanged;
    the cost is some 20 microseconds an operator. Only the thread that enters it is watched, which on a CPU also runs
    the backward pass.

    Args:
        held: modules, optimisers, tensors, or lists and dicts of them, whose storages are alive already.
    """

    def __init__(self, *held: Any) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # address of a storage -> its bytes
        self._watch: dict[int, weakref.ref[Any]] = {}
        for thing in held:
            self.hold(thing)

    def hold(self, thing: Any) -> None:
        """Count what is alive already."""
        if isinstance(thing, nn.Module):
            parameters = list(thing.parameters())
            thing = [*parameters, *thing.buffers(), *(p.grad for p in parameters)]
        elif isinstance(thing, torch.optim.Optimizer):
            thing = list(thing.state.values())
        self._see(thing, before=True)

    def reset(self) -> None:
        """Forget the peak: it starts again from what is alive."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), before=True)
        result = func(*args, **kwargs)
        self._see(result, before=False)
        return result

    def _see(self, tree: Any, before: bool) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.device.type == "meta":
                continue
            storage = leaf.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            grown = size - self._sizes.get(key, 0)
            if key not in self._sizes:
                self._watch[key] = weakref.ref(storage, self._forget(key))
            if grown:
                self._sizes[key] = size
                self.current += grown
                self.peak = max(self.peak + max(grown, 0) if before else self.peak, self.current)

    def _forget(self, key: int) -> Callable[[Any], None]:
        own = weakref.ref(self)  # a storage that lives on must not keep the counter

        def forget(_: Any) -> None:
            live = own()
            if live is not None:
                live.current -= live._sizes.pop(key, 0)
                live._watch.pop(key, None)

        return forget


class CudaMemory:
    """The CUDA allocator's figures: bytes in tensors now, and at the most since `reset`.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @property
    def current(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class PhasePeaks:
    """The peak of each phase of a step (forward, backward, optimizer), from a meter that can be reset.

    Args:
        meter: what to read.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.bytes: dict[str, int] = {}
        self._phase: str | None = None

    def enter(self, phase: str | None) -> None:
        """The phase so far ends and another begins; None ends it only."""
        if self._phase is not None:
            self.bytes[self._phase] = max(self.bytes.get(self._phase, 0), self.meter.peak)
        self.meter.reset()
        self._phase = phase

    def read(self) -> dict[str, int]:
        """Peak bytes by phase since the last call."""
        found, self.bytes = self.bytes, {}
        return found


def peak_resident_bytes() -> int | None:
    """The most physical memory the process has had since it started; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure_memory(run: Callable[[], object], device: str | torch.device, held: Any = ()) -> dict[str, int]:
    """Bytes while `run` runs: `peak_bytes` at the most, `current_bytes` after it, `held_bytes` before it.

    CUDA: what the allocator handed out. CPU: the bytes of live tensors, among them those of `held`.

    Args:
        run: its result is kept until the figures are read, as a caller would keep it.
        device: where it computes.
        held: what is alive already: modules, optimisers, tensors, or a list of them.
    """
    if torch.device(device).type == "cuda":
        meter = CudaMemory(device)
        torch.cuda.synchronize(device)
        meter.reset()
        before = meter.current
        result = run()
        torch.cuda.synchronize(device)
        found = {"held_bytes": before, "peak_bytes": meter.peak, "current_bytes": meter.current}
        del result
        return found
    live = LiveTensors(*(held if isinstance(held, list | tuple) else [held]))
    live.reset()
    before = live.current
    with live:
        result = run()
    found = {"held_bytes": before, "peak_bytes": live.peak, "current_bytes": live.current}
    del result
    return found


def analyze_memory_usage(model: nn.Module, input_ids: Tensor, backward: bool = False) -> dict[str, float]:
    """Where the memory of one forward pass (and one backward pass) of `model(input_ids)` goes, in MB of 10^6 bytes.

    On CUDA these are the allocator's figures, on a CPU the bytes of live tensors. The model's mode is kept (so a model
    in training mode drops out), its gradients and the random state are left as they were.

    Args:
        model: maps ids (B, T) to a tensor.
        input_ids: ids (B, T), on the model's device.
        backward: also compute the gradient of the output's sum; otherwise nothing is kept for it.

    Returns:
        peak_memory: the most at any time; current_memory: at the end, the result still held (the output, or the
        gradients); parameters: the model's own, gradients that it carried and buffers included; activations: the peak
        less what was held before.
    """
    device = input_ids.device
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> object:
        if not backward:
            with torch.no_grad():
                return model(input_ids)
        with torch.enable_grad():
            return torch.autograd.grad(model(input_ids).sum(), parameters)

    own = LiveTensors(model).current
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = measure_memory(run, device, [model, input_ids])
    return {
        "peak_memory": found["peak_bytes"] / MB,
        "current_memory": found["current_bytes"] / MB,
        "parameters": own / MB,
        "activations": (found["peak_bytes"] - found["held_bytes"]) / MB,
    }


def profile_memory_usage(model: nn.Module, input_ids: Tensor, backward: bool = False) -> dict[str, float]:
    """{'peak_memory': MB, 'current_memory': MB} of one pass of `model(input_ids)`; see `analyze_memory_usage`."""
    found = analyze_memory_usage(model, input_ids, backward)
    return {name: found[name] for name in ("peak_memory", "current_memory")}
