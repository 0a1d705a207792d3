"""Memory: bytes of live tensors on a CPU, the allocator's own numbers on CUDA, resident bytes of the process.

`LiveTensors` and `CudaMemory` have one interface: `current` bytes, `peak` bytes since `reset`.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..patches import TorchDispatchMode
from .timing import synchronize

MB = 1_000_000  # bytes


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensor storages: `with LiveTensors(model) as live: ...; live.peak`

    Every storage that an operator reads or returns is counted once, however many views it has, until it is freed. An
    input that was not counted before existed before, so it raises the peak too. Scratch memory that an operator frees
    before it returns is not counted. Results are unchanged; an operator takes some 20 microseconds longer. Only the
    thread that enters the context is observed, which on a CPU also runs the backward pass.

    Args:
        held: modules, optimisers, tensors, or lists and dicts of them, whose storages are alive already.
    """

    def __init__(self, *held: Any) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # id of a storage -> its bytes
        self._references: dict[int, weakref.ref[Any]] = {}
        self.hold(held)

    def hold(self, thing: Any) -> None:
        """Count the storages that are already alive."""
        if isinstance(thing, list | tuple):
            for one in thing:
                self.hold(one)
        elif isinstance(thing, nn.Module):
            parameters = list(thing.parameters())
            self._count([*parameters, *thing.buffers(), *(p.grad for p in parameters)], before=True)
        else:
            self._count(thing.state if isinstance(thing, torch.optim.Optimizer) else thing, before=True)

    def reset(self) -> None:
        """Restart the peak from the current bytes."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._count((args, kwargs), before=True)
        result = func(*args, **kwargs)
        self._count(result, before=False)
        return result

    def _count(self, values: Any, before: bool) -> None:
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()  # one Python object for each storage, as long as the storage lives
            key, size = id(storage), storage.nbytes()
            grown = size - self._sizes.get(key, 0)
            if key not in self._sizes:
                self._references[key] = weakref.ref(storage, self._subtract(key))
            if grown:
                self._sizes[key] = size
                self.current += grown
                if before and grown > 0:
                    self.peak += grown
                self.peak = max(self.peak, self.current)

    def _subtract(self, key: int) -> Callable[[Any], None]:
        """The function that is called when a storage is freed."""
        counter = weakref.ref(self)  # a storage that outlives the counter must not keep it

        def subtract(_: Any) -> None:
            live = counter()
            if live is not None:
                live.current -= live._sizes.pop(key, 0)
                live._references.pop(key, None)

        return subtract


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors with a storage in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        if values.layout is torch.strided and values.device.type != "meta":
            yield values
    elif isinstance(values, list | tuple | Mapping):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


class CudaMemory:
    """The CUDA allocator's numbers: bytes in tensors now, and at most since `reset`.

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

    def __init__(self, meter: LiveTensors | CudaMemory) -> None:
        self.meter = meter
        self.bytes: dict[str, int] = {}
        self._phase: str | None = None

    def enter(self, phase: str | None) -> None:
        """End the current phase and begin another one; None only ends it."""
        if self._phase is not None:
            self.bytes[self._phase] = max(self.bytes.get(self._phase, 0), self.meter.peak)
        self.meter.reset()
        self._phase = phase

    def read(self) -> dict[str, int]:
        """Peak bytes by phase since the last call."""
        found, self.bytes = self.bytes, {}
        return found


def peak_resident_bytes() -> int | None:
    """The most physical memory of the process since it started; None on a system that does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure_memory(run: Callable[[], object], device: str | torch.device, held: Any = ()) -> dict[str, int]:
    """Bytes while `run` runs: `peak_bytes` at most, `current_bytes` after it, `held_bytes` before it.

    CUDA: what the allocator handed out. CPU: the bytes of live tensors, those of `held` included.

    Args:
        run: its result is kept until the numbers are read, as a caller would keep it.
        device: where it computes.
        held: what is alive already: modules, optimisers, tensors, or a list of them.
    """
    meter = CudaMemory(device) if torch.device(device).type == "cuda" else LiveTensors(held)
    synchronize(device)
    meter.reset()
    before = meter.current
    with meter if isinstance(meter, LiveTensors) else nullcontext():
        result = run()
    synchronize(device)
    found = {"held_bytes": before, "peak_bytes": meter.peak, "current_bytes": meter.current}
    del result
    return found


def analyze_memory_usage(model: nn.Module, input_ids: Tensor, backward: bool = False) -> dict[str, float]:
    """The memory of one forward pass (and one backward pass) of `model(input_ids)`, in MB of 10^6 bytes.

    On CUDA these are the allocator's numbers, on a CPU the bytes of live tensors. The model's mode is kept (a model in
    training mode applies dropout); its gradients and the random state do not change.

    Args:
        model: maps ids (B, T) to a tensor.
        input_ids: ids (B, T), on the model's device.
        backward: also compute the gradient of the output's sum; otherwise no activation is kept.

    Returns:
        peak_memory: the most at any time; current_memory: at the end, with the result still held (the output, or the
        gradients); parameters: the model's, with its gradients and buffers; activations: the peak minus what was held
        before.
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
