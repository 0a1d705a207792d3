"""The contract every attention architecture keeps, and the few tensor moves they share.

Shape legend, used in every file of this folder:

    B  batch        T  tokens            D  hidden width (`hidden_dim`)
    H  heads        K  key width of a head    V  value width of a head
    C  tokens in a chunk (or window)     N  chunks
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

State = TypeVar("State", bound=tuple[Any, ...])


class Attention(nn.Module, Generic[State]):
    """A causal sequence mixer (B, T, D) -> (B, T, D): output t depends on inputs <= t only.

    An architecture says the same thing in three ways, and one test holds them to it, outputs and gradients:

        emit(attention_map(x) @ values(x), x)  ==  forward(x)  ==  step, step, step, ...

    `attention_map` is the definition, as plain as it can be written; `prefill` is the fast form that training uses
    (`forward` is its output alone) and leaves the decode state behind; `step` continues from that state.

    Args:
        hidden_dim: width D of the input and the output.
        num_heads: number of heads H; must divide `hidden_dim`.

    Raises:
        ValueError: if `hidden_dim` or `num_heads` is not positive or `num_heads` does not divide `hidden_dim`.
    """

    #: True where a layer of this architecture already holds the work of a feed-forward network (GAU).
    replaces_feed_forward: ClassVar[bool] = False
    #: The last linear map, back to the hidden width.
    out: nn.Linear

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        check_positive(hidden_dim=hidden_dim, num_heads=num_heads)
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads, got {hidden_dim} and {num_heads}")
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.head_dim = hidden_dim // num_heads

    def attention_map(self, x: Tensor) -> Tensor:
        """The definition: x (B, T, D) -> the exact matrix A (B, H, T, T) with A @ values(x) the mixed values.

        Entries that cannot be reached are exactly 0; where the architecture is not a softmax they may be negative.
        """
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """What the map mixes: x (B, T, D) -> (B, H, T, V)."""
        raise NotImplementedError

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        """From mixed values (B, H, T, V), and x (B, T, D) where there is a gate, to the output (B, T, D)."""
        raise NotImplementedError

    def prefill(self, x: Tensor) -> tuple[Tensor, State]:
        """The fast form over a whole sequence: x (B, T, D) -> output (B, T, D) and the state after its last token."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The fast form, output alone: (B, T, D) -> (B, T, D)."""
        return self.prefill(x)[0]

    def init_state(self, batch_size: int) -> State:
        """The decode state before the first token, on the device and in the dtype of the parameters."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x (B, D) and the state before it -> output (B, D) and the state after it."""
        raise NotImplementedError

    def state_size(self, num_tokens: int) -> int:
        """How many numbers one sequence's decode state holds after `num_tokens` tokens (T)."""
        raise NotImplementedError

    def flops(self, num_tokens: int) -> int:
        """Floating-point operations of `forward` on one sequence of `num_tokens` tokens (T).

        A multiply-add is 2. Matrix products, convolutions and triangular solves are counted as they are carried out,
        padding of the last chunk included; a causal `scaled_dot_product_attention` counts its lower triangle, since
        its kernels skip the rest. Elementwise work and softmax are left out.
        """
        raise NotImplementedError

    def _zeros(self, *shape: int) -> Tensor:
        """Zeros like the parameters."""
        return next(self.parameters()).new_zeros(shape)


def check_positive(**arguments: int) -> None:
    """Raise a ValueError that names the first argument that is not an integer of at least 1."""
    check_number("a positive integer", lambda value: value >= 1, whole=True, **arguments)


def check_number(what: str, valid: Callable[[float], bool], whole: bool = False, **arguments: float) -> None:
    """Raise a ValueError that names the first argument that is not a finite number as `what` says and `valid` tests."""
    for name, value in arguments.items():
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (is_number and -math.inf < value < math.inf and valid(value)):
            raise ValueError(f"{name} must be {what}, got {value!r}")


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32 where it is in a lower precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H*K) -> (B, H, T, K), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, V) -> (B, T, H*V)."""
    return x.transpose(1, 2).flatten(2)


def to_chunks(x: Tensor, chunk: int, dim: int = 2) -> Tensor:
    """Cut axis `dim` (T) into (N, chunk), contiguous, zeros after the last token: no earlier chunk can see them."""
    missing = -x.shape[dim] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))
    return x.unflatten(dim, (-1, chunk)).contiguous()


def running_sum(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Along the chunks, axis `dim` of x: the sum of what stands before each, and the sum of all.

    On a CPU a loop takes a fifth of the time of `torch.cumsum`, which is made for the last axis; on a GPU it would wait
    for its launches.
    """
    if x.is_cuda:
        sums, nothing = x.cumsum(dim), torch.zeros_like(x.narrow(dim, 0, 1))
        return torch.cat((nothing, sums.narrow(dim, 0, x.shape[dim] - 1)), dim), sums.select(dim, -1)
    before, total = [], torch.zeros_like(x.select(dim, 0))
    for part in x.unbind(dim):
        before.append(total)
        total = total + part
    return torch.stack(before, dim), total


def lower_triangle(size: int, like: Tensor) -> Tensor:
    """Ones where j <= i, zeros elsewhere: a product with it is quicker than `tril`, forward and backward."""
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril()


def unit_triangle_inverse(lower: Tensor) -> Tensor:
    """(I + tril(L, -1))^-1 of matrices L (..., C, C), whose diagonal and upper triangle are not read."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)


def causal_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis of (..., T, T) restricted to j <= t; what lies after t is exactly 0."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of each query over the last `window` keys, its own among them: (B, H, T, K) -> (B, H, T, V).

    In blocks of C <= window queries; a block meets its own keys and those of the blocks before it that reach into its
    window, so that no T x T matrix is ever formed.
    """
    T = q.shape[2]
    if window >= T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    C, r = _blocks(window)
    q, k, v = (to_chunks(at_least_fp32(part), C) for part in (q, k, v))  # (B, H, N, C, K)
    rest = q.shape[2] - r
    first_q, first_k, first_v = (part[:, :, :r].flatten(2, 3) for part in (q, k, v))
    first = _banded(first_q, first_k, first_v, keys_before=0, window=window)
    near_k, near_v = (torch.cat([part[:, :, i : i + rest] for i in range(r + 1)], 3) for part in (k, v))
    others = _banded(q[:, :, r:], near_k, near_v, keys_before=r * C, window=window)
    return torch.cat((first, others.flatten(2, 3)), 2)[:, :, :T]


def window_pairs(num_tokens: int, window: int) -> int:
    """How many pairs of query and key `window_attention` multiplies, masked ones in its blocks included."""
    C, r = _blocks(window)
    if window >= num_tokens:
        return num_tokens * (num_tokens + 1) // 2
    return (r * C) ** 2 + (-(-num_tokens // C) - r) * C * (r + 1) * C


def _blocks(window: int) -> tuple[int, int]:
    """C, and how many blocks before its own a block of C queries sees."""
    C = min(64, window)
    return C, -(-(window - 1) // C)


def _banded(q: Tensor, k: Tensor, v: Tensor, keys_before: int, window: int) -> Tensor:
    """Softmax attention where key `keys_before` stands at the first query's place: (..., C, K) -> (..., C, V)."""
    shape = q.shape[-2], k.shape[-2]
    visible = torch.ones(shape, dtype=torch.bool, device=q.device).tril(keys_before).triu(keys_before - window + 1)
    bias = torch.full(shape, -torch.inf, dtype=q.dtype, device=q.device).masked_fill(visible, 0)
    return (q * q.shape[-1] ** -0.5 @ k.mT).add_(bias).softmax(-1) @ v


def rotary(x: Tensor, start: int = 0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34) of x (..., T, K) at start, start + 1, ...

    Pair i, (x_2i, x_{2i+1}) for i < K/2, is turned by the angle t * 10000^(-2i/K), so that the product of a rotated
    query and a rotated key depends on their distance alone. No table, hence no longest sequence.

    Raises:
        ValueError: if K is odd.
    """
    length, width = x.shape[-2:]
    if width % 2:
        raise ValueError(f"rotary positions need an even head width, got {width}: change hidden_dim or num_heads")
    exact = torch.promote_types(x.dtype, torch.float32)  # bf16 cannot hold a position
    position = torch.arange(start, start + length, device=x.device, dtype=exact)
    if fuses(x):
        return turned(x, ops.turns(position, width))
    angle = position[:, None] * 10_000 ** (-torch.arange(0, width, 2, device=x.device, dtype=exact) / width)
    turn = torch.polar(torch.ones_like(angle), angle)  # (T, K/2); one complex product takes a third of four real ones
    pairs = torch.view_as_complex(x.to(exact).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """`rotary` in real numbers, which torch.compile can fuse with what is around it; `turns` are `ops.turns`."""
    cosines, sines = turns
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cosines + swapped * sines).to(x.dtype)


def fuses(x: Tensor) -> bool:
    """Whether torch.compile is making a kernel for a GPU out of what is done with x."""
    return x.is_cuda and torch.compiler.is_compiling()


class DepthwiseConvolution(torch.autograd.Function):
    """x (B, T + size - 1, D), weight (D, 1, size) -> sum_{i < size} weight_i * x_{t+i}, (B, T, D).

    What `F.conv1d` gives with one group a channel, some three times as fast on a CPU: channels stay last, and the
    weights' gradient is a sum of products.
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


def shifted_products(x: Tensor, weight: Tensor) -> Tensor:
    """`DepthwiseConvolution` as plain products, which torch.compile can fuse with what is around them."""
    T = x.shape[1] - weight.shape[2] + 1
    taps = (at_least_fp32(x[:, i : i + T]) * weight[:, 0, i] for i in range(weight.shape[2]))
    return sum(taps, start=x.new_zeros(())).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    channels_last = x.mT[:, :, None].contiguous(memory_format=torch.channels_last)  # (B, D, 1, T)
    y = F.conv2d(channels_last, weight[:, :, None], groups=weight.shape[0])
    return y[:, :, 0].mT.contiguous()  # which it is already, but on the meta device


class ShortConvolution(nn.Module):
    """Depthwise causal convolution: y_t = sum_{i < size} w_i * x_{t-i}, one filter per channel; starts as the identity.

    Args:
        channels: number of channels D.
        size: number of taps, the current token among them; with 1 it is the identity and learns nothing.
    """

    weight: Tensor  # (D, 1, size); none for size 1

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        check_positive(conv_size=size)
        if size == 1:
            self.register_buffer("weight", torch.zeros(channels, 1, 0), persistent=False)
            return
        self.weight = nn.Parameter(torch.zeros(channels, 1, size))
        with torch.no_grad():
            self.weight[..., -1] = 1.0

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the size - 1 inputs before it, zeros where None -> y (B, T, D), the last size - 1 inputs."""
        if not self.weight.numel():
            return x, self.nothing_before(len(x)) if before is None else before
        if before is None and fuses(x):
            past = F.pad(x, (0, 0, self.weight.shape[2] - 1, 0))  # which is never written, unlike what `cat` makes
        else:
            past = torch.cat((self.nothing_before(len(x)) if before is None else before, x), 1)
        convolve = shifted_products if fuses(x) else DepthwiseConvolution.apply
        return convolve(past, self.weight), past[:, x.shape[1] :]

    def nothing_before(self, batch_size: int) -> Tensor:
        """The inputs before the first token: zeros (B, size - 1, D)."""
        channels, _, size = self.weight.shape
        return self.weight.new_zeros(batch_size, max(0, size - 1), channels)
