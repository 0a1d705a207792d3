"""Tensor parts that the architectures share: heads, chunks, triangles, masks, rotary positions, short convolution.

The letters are those of `base.py`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

# Arguments.


def check_positive(**arguments: int) -> None:
    """Raise a ValueError that names the first argument that is not an integer of at least 1."""
    check_number("a positive integer", lambda value: value >= 1, whole=True, **arguments)


def check_number(what: str, valid: Callable[[float], bool], whole: bool = False, **arguments: float) -> None:
    """Raise a ValueError that names the first argument that is not `valid`.

    Args:
        what: what the argument must be, for the message.
        valid: the test of a finite number.
        whole: accept integers only.
        arguments: name -> value.
    """
    for name, value in arguments.items():
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (is_number and -math.inf < value < math.inf and valid(value)):
            raise ValueError(f"{name} must be {what}, got {value!r}")


def check_choice(known: Iterable[str], **arguments: str) -> None:
    """Raise a ValueError that names the first argument that is not one of the `known` names."""
    for name, value in arguments.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


# Precision and heads.


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32 if its precision is lower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H*K) -> (B, H, T, K), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, V) -> (B, T, H*V)."""
    return x.transpose(1, 2).flatten(2)


def gated(y: Tensor, x: Tensor, gate: nn.Linear | None) -> Tensor:
    """y * sigmoid(x W_g) of y and x (B, T, D) (Qiu et al. 2025, arXiv 2505.06708, section 2.2); y without a gate."""
    return y if gate is None else y * gate(x).sigmoid()


def append(past: Tensor, new: Tensor) -> Tensor:
    """`torch.cat((past, new), 2)` of a cache (B, H, T, K) and new tokens (B, H, n, K), in amortised O(n).

    Without autograd, the result is a view of a buffer, which is copied to one a quarter longer when it is full. The
    first continuation of a view writes into the room behind it; any other one copies. So a decode state can be
    continued several times.
    """
    if torch.is_grad_enabled():  # a graph may need the numbers as they are
        return torch.cat((past, new), 2)
    T, end = past.shape[2], past.shape[2] + new.shape[2]
    room = vars(past).get("room")
    buffer = room.pop() if room else past[:, :, :0]
    dtype = torch.promote_types(past.dtype, new.dtype)
    frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    if end > buffer.shape[2] or buffer.dtype != dtype or frozen:
        buffer = past.new_empty(*past.shape[:2], end + end // 4 + 64, past.shape[3], dtype=dtype)
        buffer[:, :, :T] = past
    buffer[:, :, T:end] = new
    view = buffer[:, :, :end]
    vars(view)["room"] = [buffer]
    return view


# Chunks.


def to_chunks(x: Tensor, chunk: int, dim: int = 2) -> Tensor:
    """Cut axis `dim` (T) into (N, chunk), contiguous, with zeros after the last token: no earlier chunk sees them."""
    missing = -x.shape[dim] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))
    return x.unflatten(dim, (-1, chunk)).contiguous()


def chunk_means(x: Tensor, chunk: int) -> Tensor:
    """Means of the finished chunks of `chunk` tokens: x (B, H, T, K) from the start of a chunk on -> (B, H, N, K)."""
    finished = x.shape[2] // chunk
    whole = at_least_fp32(x[:, :, : finished * chunk])
    return whole.unflatten(2, (finished, min(chunk, x.shape[2] + 1))).mean(3)  # chunk may be 2^62


def running_sum(x: Tensor, dim: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over the chunks, axis `dim` of x: at each chunk the sum of the chunks before it, and the sum of all.

    Both include `start`, a tensor like one chunk. On a CPU a loop takes a fifth of the time of `torch.cumsum`, which
    is made for the last axis; on a GPU the loop would wait for its launches.
    """
    if x.is_cuda:
        sums, zero = x.cumsum(dim), torch.zeros_like(x.narrow(dim, 0, 1))
        before, total = torch.cat((zero, sums.narrow(dim, 0, x.shape[dim] - 1)), dim), sums.select(dim, -1)
        return (before, total) if start is None else (before + start.unsqueeze(dim), total + start)
    sums_before, total = [], torch.zeros_like(x.select(dim, 0)) if start is None else start
    for chunk in x.unbind(dim):
        sums_before.append(total)
        total = total + chunk
    return torch.stack(sums_before, dim), total


# Triangles.


def lower_triangle(size: int, like: Tensor) -> Tensor:
    """Ones where j <= i, zeros elsewhere: a product with it is faster than `tril`, forward and backward."""
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril()


def unit_triangle_inverse(lower: Tensor) -> Tensor:
    """(I + tril(L, -1))^-1 of matrices L (..., C, C); their diagonal and upper triangle are not read."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)


# Masks, bool (T, T): True at [t, j] if query t sees token j.


def window_mask(num_tokens: int, window: int | None, device: torch.device) -> Tensor:
    """The last `window` tokens, t included; all tokens up to t if None."""
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def chunk_mask(num_tokens: int, chunk: int, device: torch.device) -> Tensor:
    """The tokens up to t of the chunk that t is in."""
    number = torch.arange(num_tokens, device=device) // chunk
    return (number[:, None] == number).tril()


# Rotary positions.


def rotary(x: Tensor, start: int = 0, base: float = 10_000.0, fraction: float = 1.0, last: int | None = None) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34) of x (..., T, K) at start, start + 1, ...

    Pair i, (x_2i, x_{2i+1}) for i < R/2, is rotated by the angle t * base^(-2i/R). The product of a rotated query and
    a rotated key then depends only on their distance. There is no table, so there is no longest sequence.

    Args:
        x: queries or keys.
        start: position of the first token.
        base: the slowest pair turns by about one radian in this many tokens.
        fraction: share of the K channels that are rotated: the first R, in whole pairs. The others have no position.
        last: the greatest position; tokens after it have the same one. None for no limit.

    Raises:
        ValueError: if R is odd.
    """
    length, width = x.shape[-2:]
    if fraction != 1:
        rotated = 2 * round(fraction * int(width) / 2)
        return torch.cat((rotary(x[..., :rotated], start, base, last=last), x[..., rotated:]), -1)
    if width % 2:
        raise ValueError(f"rotary positions need an even head width, got {width}: change hidden_dim or num_heads")
    exact = torch.promote_types(x.dtype, torch.float32)  # bf16 cannot hold a position
    position = torch.arange(start, start + length, device=x.device, dtype=exact)
    if last is not None:
        position = position.clamp(max=last)
    if compiles_for_gpu(x):
        return rotate_real(x, ops.rotary_table(position, width, base))
    angle = position[:, None] * base ** (-torch.arange(0, width, 2, device=x.device, dtype=exact) / width)
    rotation = torch.polar(torch.ones_like(angle), angle)  # (T, K/2); one complex product: a third of four real ones
    pairs = torch.view_as_complex(x.to(exact).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def check_rotary(rope_base: float, rope_fraction: float) -> None:
    """Raise a ValueError that names the option of `rotary` that is out of range."""
    check_number("above 1", lambda base: base > 1, rope_base=rope_base)
    check_number("a share from 0 to 1", lambda share: 0 <= share <= 1, rope_fraction=rope_fraction)


def rotate_real(x: Tensor, table: Tensor) -> Tensor:
    """`rotary` in real numbers, which torch.compile can fuse with its neighbours; the table is `ops.rotary_table`."""
    cosines, sines = table
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cosines + swapped * sines).to(x.dtype)


def compiles_for_gpu(x: Tensor) -> bool:
    """Whether torch.compile is tracing and x is on a GPU."""
    return x.is_cuda and torch.compiler.is_compiling()


# Short convolution.

ConvInit = Literal["identity", "uniform"]


class ShortConvolution(nn.Module):
    """Depthwise causal convolution: y_t = sum_{i < size} w_i * x_{t-i}, one filter per channel.

    Args:
        channels: number of channels D.
        size: number of taps, the current token included; 1 is the identity, without parameters.
        init: initial taps: `identity` (w_0 = 1, the others 0) or `uniform` (all from U(-1/sqrt(size), 1/sqrt(size))).
    """

    weight: Tensor  # (D, 1, size); empty for size 1

    def __init__(self, channels: int, size: int, init: ConvInit = "identity") -> None:
        super().__init__()
        check_positive(conv_size=size)
        check_choice(get_args(ConvInit), conv_init=init)
        if size == 1:
            self.register_buffer("weight", torch.zeros(channels, 1, 0), persistent=False)
            return
        self.weight = nn.Parameter(torch.zeros(channels, 1, size))
        with torch.no_grad():
            if init == "identity":
                self.weight[..., -1] = 1.0
            else:
                self.weight.uniform_(-(size**-0.5), size**-0.5)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the size - 1 inputs before it, zeros if None -> y (B, T, D) and the last size - 1 inputs."""
        if not self.weight.numel():
            return x, self.init_state(len(x)) if state is None else state
        if state is None and compiles_for_gpu(x):
            inputs = F.pad(x, (0, 0, self.weight.shape[2] - 1, 0))  # fused, while the result of `cat` is written
        else:
            inputs = torch.cat((self.init_state(len(x)) if state is None else state, x), 1)
        convolve = convolve_by_taps if compiles_for_gpu(x) else DepthwiseConvolution.apply
        return convolve(inputs, self.weight), inputs[:, x.shape[1] :]

    def init_state(self, batch_size: int) -> Tensor:
        """The inputs before the first token: zeros (B, size - 1, D)."""
        channels, _, size = self.weight.shape
        return self.weight.new_zeros(batch_size, max(0, size - 1), channels)

    @property
    def state_size(self) -> int:
        """How many numbers of one sequence the state holds."""
        return self.init_state(1).numel()


class DepthwiseConvolution(torch.autograd.Function):
    """x (B, T + size - 1, D), weight (D, 1, size) -> sum_{i < size} weight_i * x_{t+i}, (B, T, D).

    The same as `F.conv1d` with one group per channel, about three times as fast on a CPU: channels stay last, and the
    gradient of the weights is a sum of products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        T, before = grad.shape[1], weight.shape[2] - 1
        grad_x = _convolve(F.pad(grad, (0, 0, before, before)), weight.flip(2).to(grad.dtype))
        products = (at_least_fp32(grad) * x[:, i : i + T] for i in range(before + 1))
        grad_weight = torch.stack([product.sum((0, 1)) for product in products], -1)[:, None]
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def convolve_by_taps(x: Tensor, weight: Tensor) -> Tensor:
    """`DepthwiseConvolution` as a sum of products, which torch.compile can fuse with its neighbours."""
    T = x.shape[1] - weight.shape[2] + 1
    taps = (at_least_fp32(x[:, i : i + T]) * weight[:, 0, i] for i in range(weight.shape[2]))
    return sum(taps, start=x.new_zeros(())).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # oneDNN has no kernel for it, and torch's own takes one channel after the other
        return convolve_by_taps(x, weight)
    channels_last = x.mT[:, :, None].contiguous(memory_format=torch.channels_last)  # (B, D, 1, T)
    y = F.conv2d(channels_last, weight[:, :, None], groups=weight.shape[0])
    return y[:, :, 0].mT.contiguous()  # a copy on the meta device only
