"""Certificates: a model is causal, and it decodes what it computes in training.

Everything is computed on a float64 copy, so that rounding can neither hide a leak nor look like one.
"""

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from bsbr_pl.attention.parts import check_positive
from bsbr_pl.compiled import check_compiler
from bsbr_pl.foreign import shared_state_kept

from .analysis import aligned
from .checks import Check, impossible, worst
from .measurement import OTHER_PRECISION, Measurement
from .probes import OwnModel, Vectors, probe

LOW_PRECISION = 0.1  # difference of bf16, relative to the root mean square of the output
COMPILED = 1e-3  # the same of torch.compile in float32
COMPILE_SECONDS = 60
TOKENS = 256  # of a module that does not tell its windows and chunks
MOST_TOKENS = 1 << 15
MOST_FLOPS = 1e14  # of one forward pass
CONTEXT = 1024  # tokens of another text, unless lengths are given
MOST_CONTEXT = 4096  # tokens
CONTEXT_FLOPS = 5e10  # of one forward pass over another text

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Certificate:
    """The checks of one model at one length. A model with a failed check is excluded from comparisons."""

    length: int
    checks: list[Check]
    noise: float  # standard deviation of what was added to the weights for the second and third measurement
    name: str = "the model"

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks if check.required)

    @property
    def first_leak(self) -> int | None:
        """The first token whose output changed with later tokens; None without one."""
        return min((check.token for check in self.checks if check.token is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a record."""
        names = ("name", "measured", "limit", "passed")
        checks = [{name: getattr(check, name) for name in names} for check in self.checks]
        return {"passed": self.passed, "length": self.length, "noise": self.noise, "checks": checks}

    def __str__(self) -> str:
        rows = [[one.name, f"{one.measured:.1e}", f"{one.limit:.1e}"] for one in self.checks]
        lines = aligned([["check", "measured", "limit"], *rows]).split("\n")
        table = "\n".join([lines[0], *(f"{line}  {one}" for line, one in zip(lines[1:], self.checks, strict=True))])
        leak = "" if self.first_leak is None else f"; token {self.first_leak} is the first that saw the future"
        return f"{table}\n\n{self.name}, {self.length} tokens: {'passed' if self.passed else 'FAILED'}{leak}"


def certify(
    module: nn.Module,
    hidden_dim: int | None = None,
    *,
    vocab_size: int | None = None,
    length: int | None = None,
    contexts: Sequence[int] | None = None,
    compile: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> Certificate:
    """Check that a module is causal, and that it decodes what it computes in training. Print the certificate.

    Three kinds are certified: any module (B, T, D) -> (B, T, D), by its `hidden_dim`; any language model ids (B, T) ->
    logits (B, T, V) with an `nn.Embedding`, Hugging Face's among them; a `LanguageModel`.

    Each check is measured with the model's own weights, and with noise of standard deviation D^-1/2 added to and
    subtracted from every parameter: a gate initialised at zero could hide a causal leak. The largest of the three
    counts. Noise is left out if it makes outputs that are not finite. `every_suffix` is measured without and with added
    noise; `random_tokens` and all checks after it have only the model's own weights.

    T tokens are used, of which every second repeats the one before it, or one token less than there are positions, if
    that is fewer: T = 2 C + 3 for an Attention or a language model, 256 for other modules. C is the largest `reach` or
    `period` of the attentions, 64 without any. Tokens are cut at 0, 1, T - 1 and at E - 1, E and E + 1 for every reach
    or period E; where a foreign module has none, for 32 and 64. Decoding is also cut at T / 2. Positions are 0-based:

        suffix_K          for every cut K: the largest change of outputs 0..K when all tokens after K change;
                          `suffix_T-1` compares with one more token at the end
        future_gradient   the largest |d output_t / d input_s| over s > t, for t at every cut, relative to the largest
        training_suffix   as suffix_K for all K < T - 1, of two texts at once, in training mode with gradients and the
                          same dropout (batch norm over time)
        every_suffix      of foreign modules, which do not tell where their chunks end: as suffix_K for each of the
                          first 130 tokens K, and for 16 later ones that the seed draws
        random_tokens     ln V minus the loss on uniformly random tokens, in standard errors: above 0 only by chance, or
                          by seeing the answer
        repeat            the largest change when the same is computed twice
        batch             the largest change when other texts are in the batch, in each of four rows
        padding           the largest change when zeros (token 0) follow, up to a multiple of 128
        length_N          the largest change when only the first N tokens are read, for N = 1, 37, 101 and 197
        decode_step       the largest difference of outputs between all tokens at once and one token after another
        decode_prefill    the same, one token after another from a prefilled state, for every cut
        continue          the same, all other tokens at once from a prefilled state, for every cut
        context_N         as suffix_K with N tokens, up to 1024 also in training mode, for K at half of them and N - 2
        precision         as suffix_K and training_suffix, in the precision of the module, if it is not float64
        bf16              root mean square of the difference when weights, inputs and computation are in bf16
        compile           the same of torch.compile in fp32

    The first four find different leaks: of tokens, of smooth functions of them, of statistics in training, and those
    that training has used. The decoding checks are absent if an attention of the model cannot decode; Hugging Face
    models decode with their cache. Differences are relative to the largest output. `bf16` and `compile` are for foreign
    modules alone. They disqualify no module; nor does an error of a foreign module with another length or batch.

    Args:
        module: on any device, in any precision; it is not changed.
        hidden_dim: width D of a module of vectors; None for a language model.
        vocab_size: token ids V, where a language model does not tell (`config.vocab_size`, `vocab_size`).
        length: tokens T.
        contexts: lengths N of other texts, such as those of the training; 1024 if neither this nor `length` is given.
            At most 4096 tokens, and as many as 5e10 FLOPs allow.
        compile: also check torch.compile, for at most a minute; it needs a C++ compiler.
        seed: of the random inputs.
        quiet: print nothing.

    Raises:
        ValueError: the module cannot be called, or a window or chunk, or its FLOPs, are too large; or it changes what
            all models of the process share, such as the number of threads.
    """
    with shared_state_kept(type(module).__name__):
        certificate = _certificate(module, hidden_dim, vocab_size, length, contexts, compile, seed)
    if not quiet:
        print(certificate)
    return certificate


def _certificate(
    module: nn.Module,
    hidden_dim: int | None,
    vocab_size: int | None,
    length: int | None,
    contexts: Sequence[int] | None,
    compile: bool,
    seed: int,
) -> Certificate:
    first = next(module.parameters(), torch.zeros(0))
    device = "cpu" if first.device.type == "mps" else first.device  # MPS has no float64
    model = copied(module).to(device).double().eval()
    run = probe(model, hidden_dim, vocab_size)
    if contexts is None:
        contexts = (CONTEXT,) if length is None else ()
    length = _length(run, length)
    _check_size(run, length)
    edges = {edge + i for edge in _edges(run) for i in (-1, 0, 1)}
    cuts = sorted(({0, 1, length - 1} | edges) & set(range(length)))
    own, noise = Measurement(run, cuts, length, seed), run.width**-0.5
    noisy = [
        Measurement(probe(with_noise(model, scale), hidden_dim, vocab_size), cuts, length, seed)
        for scale in (noise, -noise)
    ]
    found = [one.all() for one in (own, *noisy) if one.is_finite or not own.is_finite]
    checks = [worst([measured[name] for measured in found]) for name in found[0]]
    if not _is_own(run):
        checks.append(worst([one.every_suffix() for one in (own, noisy[0]) if one.is_finite or one is own]))
    if run.vocab_size:
        checks.append(own.below_chance())
    checks += [own.context(n) for n in _other_lengths(run, length, contexts)]
    if first.dtype in OTHER_PRECISION:
        given = probe(copy.deepcopy(module).to(device), hidden_dim, vocab_size)
        checks.append(own.precision(given, first.dtype))
    if not isinstance(run, OwnModel):
        given = probe(copy.deepcopy(module).eval(), hidden_dim, vocab_size)
        checks.append(_useful("bf16", LOW_PRECISION, _bf16, own, given))
        if compile:
            given = probe(copy.deepcopy(module).eval().float(), hidden_dim, vocab_size)
            checks.append(_useful("compile", COMPILED, _compiled, own, given))
    return Certificate(length, checks, noise if len(found) > 1 else 0.0, type(module).__name__)


def _is_own(run: Vectors) -> bool:
    """Whether all attentions are of this library, which tell where their windows and chunks end."""
    return bool(run.attentions) and all(type(one).__module__.startswith("bsbr_pl.attention.") for one in run.attentions)


def _edges(run: Vectors) -> set[int]:
    """Where windows and chunks may end."""
    return run.edges or ({64} if isinstance(run, OwnModel) else {32, 64})


def _length(run: Vectors, length: int | None) -> int:
    """Tokens of the certificate, at most as many as there are positions for them and one more."""
    if length is None:
        length = 2 * max(_edges(run)) + 3 if run.vocab_size or run.attentions else TOKENS
    check_positive(length=length)
    return min(length, run.max_length - 1) if run.max_length else length


def _other_lengths(run: Vectors, length: int, wanted: Iterable[int]) -> list[int]:
    """The lengths that are wanted, where too long as long as possible; without that of the certificate."""
    found = set()
    for n in wanted:
        n = min(n, MOST_CONTEXT, run.max_length or n)
        while _flops(run, n) > CONTEXT_FLOPS:
            n //= 2
        found.add(n)
    return sorted(n for n in found if n != length and n > 1)


def _flops(run: Vectors, length: int) -> float:
    """Of a forward pass; 0 where it is not known."""
    try:
        return run.module.flops(length) if isinstance(run, OwnModel) else 0
    except (AttributeError, NotImplementedError):  # an attention of another package may have no closed form
        return 0


def _check_size(run: Vectors, length: int) -> None:
    """Reject models that take too long: their sizes may be those of a hostile checkpoint."""
    if length > MOST_TOKENS:
        raise ValueError(f"its windows and chunks need {length:,} tokens; certificates have at most {MOST_TOKENS:,}")
    flops = _flops(run, length)
    if flops > MOST_FLOPS:
        raise ValueError(f"it needs {flops:.1e} FLOPs for {length:,} tokens, more than {MOST_FLOPS:.0e}")


def copied(module: Module) -> Module:
    """A copy of a module.

    Raises:
        ValueError: it keeps tensors of an earlier computation that need a gradient.
    """
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:
        name = type(module).__name__
        raise ValueError(
            f"{name} keeps tensors of its last computation, so it cannot be copied: detach them"
        ) from error


def with_noise(model: Module, scale: float) -> Module:
    """A copy with Gaussian noise times `scale` added to every parameter; the noise is always the same."""
    model, random = copy.deepcopy(model), Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter), alpha=scale)
    return model


@torch.no_grad()
def _bf16(own: Measurement, run: Vectors) -> float:
    """The module in bf16, against float64."""
    run.module.bfloat16()
    x = own.x.bfloat16() if own.x.is_floating_point() else own.x
    return _difference(own.output, run(x)[0].to(own.output))


@torch.no_grad()
def _compiled(own: Measurement, run: Vectors) -> float:
    """The module through torch.compile in float32, against the module."""
    check_compiler(own.x.device)
    x = own.x.float() if own.x.is_floating_point() else own.x
    expected = run(x)[0]
    with _time_limit(COMPILE_SECONDS):
        run.module = torch.compile(run.module)  # type: ignore[assignment]
        return _difference(expected, run(x)[0])


def _difference(expected: Tensor, found: Tensor) -> float:
    """Root mean square, relative to that of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30))


def _useful(
    name: str, limit: float, measure: Callable[[Measurement, Vectors], float], own: Measurement, run: Vectors
) -> Check:
    """A check that disqualifies no module."""
    try:
        return Check(name, measure(own, run), limit, required=False)
    except Exception as error:  # a foreign module, and the compiler, may fail anywhere
        return impossible(name, limit, error)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError after this time; without effect outside the main thread, which gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    start = time.monotonic()
    try:
        yield
    except Exception as error:
        if time.monotonic() - start >= seconds:  # the compiler raises another error in its place
            raise TimeoutError(f"it takes more than {seconds} s") from error
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
