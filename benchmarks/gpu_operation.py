"""The attention operation of a row and its inputs: without projections, convolutions and rotary positions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_rows import Row, Setting
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES, kernels
from bsbr_pl.attention.parts import at_least_fp32

Operation = tuple[Callable[..., Tensor], list[Tensor]]  # the forward pass, its inputs


class Inputs:
    """Random inputs, with the memory layout that a projection leaves."""

    def __init__(self, row: Row, setting: Setting) -> None:
        self.device, self.dtype, self.tokens = setting.device, setting.dtype(row), setting.tokens(row)
        self.heads, self.width = (2, 16) if setting.device == "cpu" else (row.heads, row.width)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=self.generator, device=self.device).to(self.dtype)

    def by_heads(self, tokens: int) -> Tensor:
        """(B, H, T, K)"""
        return self.normal(tokens, self.heads, self.width).transpose(1, 2)

    def qkv(self) -> list[Tensor]:
        return [self.by_heads(self.tokens) for _ in range(3)]

    def gates(self) -> Tensor:
        """(B, H, T, 1), uniform between 0 and 1."""
        shape = (1, self.heads, self.tokens, 1)
        return torch.rand(shape, generator=self.generator, device=self.device)

    def attention(self, name: str, **options: Any) -> Any:
        return ARCHITECTURES[name](self.heads * self.width, self.heads, **options).to(self.device, self.dtype)

    def choose(self, kernel: Callable, plain: Callable) -> Callable:
        """The kernel where it runs, else the plain form."""
        return kernels.choose(torch.empty(0, device=self.device, dtype=self.dtype), kernel, plain)


def operation(row: Row, setting: Setting) -> Operation:
    inputs = Inputs(row, setting)
    name, *top_k = row.name.split(" top-k ")
    if row.form == "fla" and setting.device != "cpu":
        return FLA_OPERATIONS[name](inputs)
    if name == "bsbr":
        return bsbr(inputs, int(top_k[0]) if top_k else None)
    return OPERATIONS[name](inputs)


def sdpa(inputs: Inputs) -> Operation:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs.qkv()


def sliding_window(inputs: Inputs) -> Operation:
    qkv = inputs.qkv()
    return inputs.attention("sliding_window", rope=False).mix, qkv


def bsbr(inputs: Inputs, top_k: int | None) -> Operation:
    qkv = inputs.qkv()
    attention = inputs.attention("bsbr", rope=False, initial_gain=1.0, retrieval_top_k=top_k)
    chunks = -(-inputs.tokens // attention.chunk_size)
    return lambda *given: attention.mix(*given)[0], [*qkv, inputs.by_heads(chunks), inputs.by_heads(chunks)]


def linear(inputs: Inputs) -> Operation:
    qkv = inputs.qkv()
    mix = inputs.choose(kernels.linear_kernel, inputs.attention("linear").mix)
    return lambda q, k, v: mix(feature(q), feature(k), at_least_fp32(v))[0], qkv


def gau(inputs: Inputs) -> Operation:
    inputs.qkv()  # the random numbers of the other operations
    attention = inputs.attention("gau", rope=False)
    kernel = partial(kernels.gau_kernel, attention.views, attention.inside, attention.chunk_size)
    mix = inputs.choose(kernel, attention.mix)
    z, v = inputs.normal(inputs.tokens, attention.key_dim), inputs.normal(inputs.tokens, attention.value_dim)
    return lambda z, v: mix(z, v)[0], [z, v]


def delta_net(inputs: Inputs) -> Operation:
    qkv = inputs.qkv()
    mix = inputs.choose(kernels.delta_rule_kernel, inputs.attention("delta_net").mix)
    beta = inputs.gates().to(inputs.dtype)
    return lambda q, k, v, beta: mix(unit(q), unit(k), at_least_fp32(v), at_least_fp32(beta))[0], [*qkv, beta]


def gated_delta_net(inputs: Inputs) -> Operation:
    qkv = inputs.qkv()
    mix = inputs.choose(kernels.gated_delta_rule_kernel, inputs.attention("gated_delta_net").mix)
    beta = inputs.gates().to(inputs.dtype)
    log_alpha = (0.1 * inputs.gates().clamp(min=1e-6).log()).to(inputs.dtype)
    return lambda q, k, *rest: mix(unit(q), unit(k), *map(at_least_fp32, rest))[0], [*qkv, beta, log_alpha]


def feature(x: Tensor) -> Tensor:
    return F.elu(at_least_fp32(x)) + 1


def unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(x), dim=-1)


def token_major(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """(B, H, T, K) -> (B, T, H, K) in bf16, as flash-linear-attention wants them."""
    return [tensor.transpose(1, 2).bfloat16().contiguous() for tensor in tensors]


def fla_linear(inputs: Inputs) -> Operation:
    """The kernel of flash-linear-attention, for comparison."""
    from fla.ops.linear_attn import chunk_linear_attn

    def mix(*qkv: Tensor) -> Tensor:
        q, k, v = token_major((feature(qkv[0]), feature(qkv[1]), at_least_fp32(qkv[2])))
        mixed, _ = chunk_linear_attn(q, k, v, scale=1.0, output_final_state=False, normalize=False)
        total = (q.float() * k.float().cumsum(1)).sum(-1, keepdim=True) + 1e-6
        return (mixed / total).transpose(1, 2)

    return mix, inputs.qkv()


def fla_delta_net(inputs: Inputs) -> Operation:
    """The kernel of flash-linear-attention, for comparison."""
    from fla.ops.delta_rule import chunk_delta_rule

    def mix(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        q, k, v, beta = token_major((unit(q), unit(k), at_least_fp32(v), at_least_fp32(beta)))
        mixed, _ = chunk_delta_rule(q, k, v, beta[..., 0], scale=1.0, output_final_state=False)
        return mixed.transpose(1, 2)

    qkv = inputs.qkv()
    return mix, [*qkv, inputs.gates().to(inputs.dtype)]


OPERATIONS = {
    "sdpa": sdpa,
    "sliding_window": sliding_window,
    "linear": linear,
    "gau": gau,
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
}
FLA_OPERATIONS = {"linear": fla_linear, "delta_net": fla_delta_net}


def operation_call(row: Row, setting: Setting) -> Callable[[], object]:
    """Forward and backward of a row's operation."""
    forward, inputs = operation(row, setting)
    if row.form == "compiled" and not setting.toy:
        forward = torch.compile(forward, dynamic=False)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    mixed = forward(*inputs)  # with gradients, or it would be compiled a second time
    weights = torch.randn_like(mixed, requires_grad=False)
    del mixed
    return lambda: torch.autograd.grad(forward(*inputs), inputs, weights)
