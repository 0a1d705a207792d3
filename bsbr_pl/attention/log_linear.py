"""Log-linear attention: Mamba-2 with one state for each level of a tree over the past, O(log T) states in all.

    S_tl = sum_{s in level l of t} alpha_{s+1} ... alpha_t dt_s k_s^T v_s        alpha_t = exp(-A dt_t)
    o_t = sum_l lambda_tl q_t S_tl + d v_t        lambda_t = softplus(x_t W_l + b_l)

The level of s is the place (from 1) of the highest binary digit in which the positions t and s (from 0) differ; 0 for
s = t. So the past of t has one block of 2^(l-1) tokens for each 1 among the digits of t (a Fenwick tree). dt, q, k, v,
d, the convolution and the output are those of Mamba-2; with lambda = 1 it is Mamba-2. The fast form, per chunk of C
tokens: within a chunk, the map. Chunks are merged in pairs, then pairs in pairs, up to all; at each merge, every chunk
of the second block reads the state of the first.

Source: Guo et al. 2025, arXiv 2506.04761, section 3.
Differences: those of Mamba-2 in this package; the layer of flash-linear-attention multiplies x_t W_l + b_l by one more
learned factor and starts with A from 1 to H; all levels from num_levels - 1 on share one lambda.
Cost: O(T (C + K log(T / C)) E).
Decode state: one S (K E numbers) for each binary digit of T, and the last conv_size - 1 inputs of the convolution.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .decays import decay_map, decays, power_of_two
from .parts import ConvInit, ShortConvolution, at_least_fp32, check_positive, merge_heads, split_heads, to_chunks


class Levels(NamedTuple):
    S: Tensor  # (B, H, P, K, V) of the block of 2^p tokens for each 1 among the P binary digits of T; else 0
    conv_state: Tensor  # (B, conv_size - 1, 2K + E), the last inputs of the convolution
    position: int  # tokens seen


class LogLinearAttention(Attention[Levels]):
    """The layer of log-linear Mamba-2: a decaying state for each level of a Fenwick tree.

    Args:
        hidden_dim: width D.
        num_heads: heads H; the published width of a head, E / H, is 64.
        chunk_size: tokens C computed at once, rounded up to a power of two; changes the speed, not the result.
        conv_size: taps of the short convolution on q, k and v; 1 for none.
        conv_init: initial values of the taps, `identity` or `uniform`; see `ShortConvolution`.
        expansion_factor: E / D.
        key_dim: width K of a query and a key.
        num_levels: levels with a lambda of their own; published: 15, for 16,384 tokens.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 64,
        conv_size: int = 4,
        conv_init: ConvInit = "identity",
        expansion_factor: int = 2,
        key_dim: int = 64,
        num_levels: int = 15,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, conv_size=conv_size, expansion_factor=expansion_factor)
        check_positive(key_dim=key_dim, num_levels=num_levels)
        self.chunk_size = chunk_size
        self.key_dim = key_dim
        self.value_dim = expansion_factor * hidden_dim
        self.num_levels = num_levels
        channels = 2 * key_dim + self.value_dim
        self.qkv = nn.Linear(hidden_dim, channels, bias=False)
        self.conv = ShortConvolution(channels, conv_size, conv_init)
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.dt = nn.Linear(hidden_dim, num_heads)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())  # log A
        self.levels = nn.Linear(hidden_dim, num_heads * num_levels)
        self.skip = nn.Parameter(torch.ones(num_heads))  # d
        self.gate = nn.Linear(hidden_dim, self.value_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)
        self.out = nn.Linear(self.value_dim, hidden_dim, bias=False)
        with torch.no_grad():  # dt starts between 0.001 and 0.1
            self.dt.bias.uniform_(math.log(0.001), math.log(0.1)).exp_().expm1_().log_()

    @property
    def period(self) -> int:
        return self.chunk_size

    def project(self, x: Tensor, state: Levels | None = None) -> tuple[Tensor, ...]:
        """q, k (B, 1, T, K), v (B, H, T, V), dt, log alpha (B, H, T, 1), lambda (B, H, T, L) and the state of the
        convolution."""
        qkv, conv_state = self.conv(self.qkv(x), None if state is None else state.conv_state)
        qkv = F.silu(at_least_fp32(qkv) + self.conv_bias)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], -1)
        dt = F.softplus(at_least_fp32(self.dt(x)))  # (B, T, H)
        log_alpha = -at_least_fp32(self.log_rate).exp() * dt
        scale = F.softplus(at_least_fp32(self.levels(x)))
        return (
            q[:, None],
            k[:, None],
            split_heads(v, self.num_heads),
            dt.mT[..., None],
            log_alpha.mT[..., None],
            split_heads(scale, self.num_heads),
            conv_state,
        )

    def level(self, t: Tensor, s: Tensor) -> Tensor:
        """The level of token s for token t, num_levels - 1 at most; the shapes broadcast."""
        powers = 2 ** torch.arange(min(self.num_levels - 1, 62), device=t.device)
        return ((t ^ s)[..., None] >= powers).sum(-1)  # the binary digits of t xor s

    def values(self, x: Tensor) -> Tensor:
        return self.project(x)[2]

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(merge_heads(mixed).to(x.dtype) * F.silu(self.gate(x))))

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, dt, log_alpha, scale, _ = self.project(x)
        t = torch.arange(x.shape[1], device=x.device)
        G = decay_map(log_alpha)[..., 0]
        chosen = scale.gather(3, self.level(t[:, None], t).expand_as(G))
        return q @ k.mT * G * chosen * dt.mT + self.skip[:, None, None] * torch.eye(len(t), device=x.device)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, log_alpha: Tensor, scale: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """q, k (B, 1, T, K), v (B, H, T, V), dt, log alpha (B, H, T, 1), lambda (B, H, T, L), from the first token on
        or from one after blocks of at least T tokens -> mixed values (B, H, T, V), without what is read of earlier
        tokens; S of blocks of 1, 2, 4, ... chunks of these tokens (B, H, n, K, V), if there are several."""
        T = int(v.shape[2])  # int: a tracer makes tensors of sizes
        C = power_of_two(min(self.chunk_size, T))
        parts = (to_chunks(part, C) for part in (q, k, v, dt, log_alpha, scale))  # (B, 1 or H, N, C, .)
        q_n, k_n, v_n, dt_n, log_alpha_n, scale_n = parts
        G, from_start, to_end = decays(log_alpha_n)
        t = torch.arange(C, device=v.device)
        scale_ts = scale_n.gather(4, self.level(t[:, None], t).expand_as(G))
        A = q_n @ k_n.mT * G * scale_ts * dt_n.mT + self.skip[:, None, None, None] * torch.eye(C, device=v.device)
        mixed = A @ v_n
        tree: list[Tensor] = []
        if q_n.shape[2] > 1:
            log_decay = log_alpha_n.sum(3, keepdim=True)
            tree = self.read_tree(from_start * q_n, scale_n, log_decay, (to_end * dt_n * k_n).mT @ v_n, mixed)
        return mixed.flatten(2, 3)[:, :, :T], tree

    def read_tree(self, q: Tensor, scale: Tensor, log_decay: Tensor, S: Tensor, mixed: Tensor) -> list[Tensor]:
        """Add to `mixed` what each chunk reads of the chunks before it.

        Args:
            q: (B, H, N, C, K), multiplied by the decay from the start of its chunk.
            scale, mixed: (B, H, N, C, .).
            log_decay: of each whole chunk (B, H, N, 1, 1).
            S: of each chunk (B, H, N, K, V).

        Returns:
            S of blocks of chunks, as `mix` does.
        """
        N, C = int(q.shape[2]), int(q.shape[3])
        tree, scales = [S], scale.unbind(-1)
        from_block_start = torch.zeros_like(log_decay)  # of each chunk: the log decays of its block before it
        number = torch.arange(N, device=q.device)[None, None, :, None, None]
        while tree[-1].shape[2] > 1:
            h = len(tree) - 1
            left, right = pairs(tree[-1])
            by_level = scales[min(C.bit_length() + h, self.num_levels - 1)][..., None]
            halves = right_halves(h, q, by_level, from_block_start.expand(-1, -1, -1, C, -1), number)
            reads = left.split(max(1, N >> (h + 1)), 2)  # an unfinished last pair may have no second block
            for (q_h, scale_h, from_start_h, number_h), read in zip(halves, reads, strict=False):
                values = (normal_exp(from_start_h) * scale_h * q_h) @ read
                mixed.index_add_(2, number_h.flatten(), values.flatten(2, 3).unflatten(2, (-1, C)))
            log_left, log_right = pairs(log_decay)
            in_right = number // 2**h % 2
            from_block_start = from_block_start + in_right * log_left.repeat_interleave(2 << h, 2)[:, :, :N]
            tree.append(normal_exp(log_right) * left + right)
            log_decay = log_left + log_right
        return tree

    def read(self, q: Tensor, scale: Tensor, S: Tensor, position: int) -> Tensor:
        """What the queries after a state read of it, without decay: q (B, 1, T, K), lambda (B, H, T, L), S of
        `position` tokens -> (B, H, T, V)."""
        t = torch.arange(position, position + q.shape[2], device=q.device)
        p = torch.arange(position.bit_length(), device=q.device)
        starts = ((position >> p) - 1) << p  # of the blocks; without a block S is 0
        weight = scale.gather(3, self.level(t[:, None], starts).expand(*scale.shape[:3], -1))  # (B, H, T, P)
        return (weight[..., None] * q[..., None, :]).flatten(3) @ S.flatten(2, 3)

    def prefill(self, x: Tensor, state: Levels | None = None) -> tuple[Tensor, Levels]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        *parts, conv_state = self.project(x, state)
        S, _, position = self.init_state(len(x)) if state is None else state
        outputs, rest = [], int(x.shape[1])
        while rest:
            n = min(rest, position & -position or rest)  # no longer than the shortest block before
            q, k, v, dt, log_alpha, scale = (part[:, :, -rest:][:, :, :n] for part in parts)
            mixed, tree = self.mix(q, k, v, dt, log_alpha, scale)
            if position:
                mixed = mixed + log_alpha.cumsum(2).exp() * self.read(q, scale, S, position)
            new = block_states(k, v, dt, log_alpha, tree, power_of_two(min(self.chunk_size, n)))
            S = joined(log_alpha.sum(2)[..., None, None].exp() * S, new, position, n)
            outputs.append(mixed)
            position, rest = position + n, rest - n
        return self.emit(torch.cat(outputs, 2), x), Levels(S, conv_state, position)

    def forward(self, x: Tensor) -> Tensor:
        """`prefill` without the state, which training does not need."""
        if not x.shape[1]:
            return x
        *parts, _ = self.project(x)
        return self.emit(self.mix(*parts)[0], x)

    def init_state(self, batch_size: int) -> Levels:
        S = self._zeros(batch_size, self.num_heads, 0, self.key_dim, self.value_dim // self.num_heads)
        return Levels(at_least_fp32(S), self.conv.init_state(batch_size), 0)

    def step(self, x: Tensor, state: Levels) -> tuple[Tensor, Levels]:
        x = x[:, None]
        q, k, v, dt, log_alpha, scale, conv_state = self.project(x, state)
        alpha, own = log_alpha.exp(), scale[..., :1] * (q * k).sum(-1, keepdim=True) * dt
        mixed = alpha * self.read(q, scale, state.S, state.position) + (own + self.skip[:, None, None]) * v
        S = joined(alpha[..., None] * state.S, (k.mT @ (dt * v))[:, :, None], state.position, 1)
        return self.emit(mixed, x)[:, 0], Levels(S, conv_state, state.position + 1)

    def state_size(self, num_tokens: int) -> int:
        return num_tokens.bit_length() * self.key_dim * self.value_dim + self.conv.state_size

    def flops(self, num_tokens: int) -> int:
        D, K, E, C = self.hidden_dim, self.key_dim, self.value_dim, power_of_two(min(self.chunk_size, num_tokens))
        H, N = self.num_heads, -(-num_tokens // C)
        maps = D * (2 * K + 3 * E + H + H * self.num_levels) + self.conv.weight.numel()
        in_chunk = C * K + C * E + (K * E if N > 1 else 0)  # Q K^T, the map times V, K^T V
        G = C * (C - 1) * H // 2
        reads = sum(n.bit_count() for n in range(N)) * C * K * E
        return 2 * (num_tokens * maps + N * (C * in_chunk + G) + reads)


def block_states(k: Tensor, v: Tensor, dt: Tensor, log_alpha: Tensor, tree: list[Tensor], C: int) -> Tensor:
    """S (B, H, P, K, V), as in the state, of the tokens k, v, dt, log alpha (B, 1 or H, T, .): blocks of chunks from
    their tree, shorter ones from the tokens."""
    T, states = int(k.shape[2]), []
    for p in range(T.bit_length()):
        start, end = ((T >> p) - 1) << p, (T >> p) << p
        if not T >> p & 1:
            S = v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])
        elif tree and 1 << p >= C:
            S = tree[p - C.bit_length() + 1][:, :, start >> p]
        else:
            to_end = F.pad(log_alpha[:, :, start + 1 : end], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2).exp()
            S = k[:, :, start:end].mT @ (to_end * dt[:, :, start:end] * v[:, :, start:end])
        states.append(log_alpha[:, :, end:, None].sum(2).exp() * S)
    return torch.stack(states, 2)


def joined(S: Tensor, new: Tensor, position: int, num_tokens: int) -> Tensor:
    """S after `num_tokens` tokens more than `position`, from both parts decayed to the end: binary addition.

    The new tokens are no more than the shortest block before them: if they are as many, all blocks up to the first
    missing one become one.
    """
    digits = (position + num_tokens).bit_length()
    S, new = (F.pad(part, (0, 0, 0, 0, 0, digits - part.shape[2])) for part in (S, new))
    S = S + new
    if not position & num_tokens:
        return S
    p = (position ^ (position + num_tokens)).bit_length() - 1  # the digit that becomes 1
    return torch.cat((torch.zeros_like(S[:, :, :p]), S[:, :, : p + 1].sum(2, keepdim=True), S[:, :, p + 1 :]), 2)


def normal_exp(x: Tensor) -> Tensor:
    """exp(x), but 0 where that is below 1e-30: on a CPU, products of denormal numbers take ten times as long."""
    decay = x.exp()
    return torch.where(decay < 1e-30, 0, decay)


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd blocks of x (B, H, n, ., .), with zeros for a missing last one."""
    left, right = to_chunks(x, 2).unbind(3)
    return left, right


def right_halves(h: int, *parts: Tensor) -> list[list[Tensor]]:
    """The second blocks of pairs of blocks of 2^h chunks, views of the parts (B, 1 or H, N, C, .).

    Returns:
        Of n whole pairs (B, 1 or H, n, 2^h C, .), and of a last one with an unfinished second block (B, 1 or H, 1, .,
        .); each only if there is one.
    """
    N, found = int(parts[0].shape[2]), []
    whole = N >> (h + 1)
    if whole:
        pairs_of = (part[:, :, : whole << (h + 1)].unflatten(2, (whole, 2, 1 << h)) for part in parts)
        found.append([part[:, :, :, 1].flatten(3, 4) for part in pairs_of])
    last = (2 * whole + 1) << h
    if last < N:
        found.append([part[:, :, last:].flatten(2, 3)[:, :, None] for part in parts])
    return found
