"""Forgetting Transformer (FoX): softmax attention in which the weight of a token decays with every later token.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(K) + log f_{s+1} + ... + log f_t) v_s

The forget gate f_t = sigmoid(x_t w_f + b) is one number per head and token. It also encodes the order of past tokens,
so there are no rotary positions by default. The fast form computes blocks of C queries. Softmax ignores a term that is
equal for all keys of a query, so the sum of log f may end at the start of the block instead of at t. This sum is age_s.
For a key s before the block, it is the sum of log f after s up to the block; for a key s in the block, it is minus the
sum from the start of the block to s. The age is in three more channels of the keys, in which the queries are 1: three
numbers of bf16, whose sum is the age in fp32. Ages are counted from each block, so fp32 is precise enough for any T.

Source: Lin et al. 2025, arXiv 2503.02130, section 3. The layer of the published Pro form is qk_norm, kv_shift and
output_gate together.
Differences: the heads share the scale of each RMSNorm.
Cost: O(T^2 D).
Decode state: the keys, values and ages of all tokens (T (2 D + H) numbers), and with kv_shift 2 D more.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, num_weights
from .kernels import causal_attention, for_products, has_window, low_precision
from .parts import append, at_least_fp32, check_positive, merge_heads, rotary, split_heads
from .softmax import causal_softmax, head_norm

WITHOUT_MASK = 4096  # queries at once where FlashAttention needs no mask; of more, fp32 would not hold the ages
CHANNELS = 3  # of the age: three numbers of bf16 hold one of fp32


class AgingCache(NamedTuple):
    k: Tensor  # (B, H, T, K)
    v: Tensor  # (B, H, T, V)
    age: Tensor  # (B, H, T, 1), the sum of log f after each token
    kv: Tensor  # (B, 1, 2D), the last key and value before their shift; (B, 0, 2D) without kv_shift


class FoXAttention(Attention[AgingCache]):
    """Causal softmax attention with a forget gate.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        chunk_size: queries C computed at once; changes the speed, not the result.
        rope: rotate queries and keys by their position.
        qk_norm: RMSNorm of queries and keys.
        kv_shift: mix each key and value with those of the token before, in learned shares per head.
        output_gate: the output is RMSNorm(o_t) * sigmoid(x_t W_g).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        chunk_size: int = 512,
        rope: bool = False,
        qk_norm: bool = False,
        kv_shift: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size)
        self.chunk_size = chunk_size
        self.rope = rope
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False)
        self.forget = nn.Linear(hidden_dim, num_heads)
        self.q_norm, self.k_norm = head_norm(self.head_dim, qk_norm), head_norm(self.head_dim, qk_norm)
        self.shift = nn.Linear(hidden_dim, 2 * num_heads, bias=False) if kv_shift else None
        self.norm = head_norm(self.head_dim, output_gate)
        self.gate = nn.Linear(hidden_dim, hidden_dim, bias=False) if output_gate else None
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def added(self) -> int:
        """Channels of a head for the age, and zeros up to a multiple of 8: CUDA's kernels for masks take no others."""
        return CHANNELS + -(self.head_dim + CHANNELS) % 8

    def project(self, x: Tensor, state: AgingCache | None = None) -> tuple[Tensor, ...]:
        """q, k, v (B, H, T, K), log f (B, H, T, 1), and the last key and value before their shift."""
        state = self.init_state(len(x)) if state is None else state
        q, kv = self.qkv(x).split([self.hidden_dim, 2 * self.hidden_dim], -1)
        last_kv = kv[:, :0]
        if self.shift is not None:
            before, last_kv = torch.cat((state.kv, kv[:, :-1]), 1), kv[:, -1:]
            before, kv = (part.unflatten(-1, (2 * self.num_heads, -1)) for part in (before, kv))
            share = self.shift(x).sigmoid()[..., None]
            kv = (share * before + (1 - share) * kv).flatten(2)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, *kv.chunk(2, -1)))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = (rotary(part, start=state.k.shape[2]) for part in (q, k))
        log_f = -F.softplus(-at_least_fp32(self.forget(x)))  # (B, T, H)
        return q, k, v, log_f.mT[..., None], last_kv

    def values(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.project(x)[2])

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        mixed = merge_heads(self.norm(mixed.to(x.dtype)))
        return self.out(mixed if self.gate is None else mixed * self.gate(x).sigmoid())

    def attention_map(self, x: Tensor) -> Tensor:
        q, k, _, log_f, _ = self.project(x)
        c = log_f.cumsum(2)
        return causal_softmax(at_least_fp32(q) @ at_least_fp32(k).mT / self.head_dim**0.5 + c - c.mT)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, age: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q (B, H, T, K) and log f (B, H, T, 1) of the last T tokens of k, v; age of the tokens before them, none if
        None -> mixed values (B, H, T, V); age of all tokens."""
        V, zeros = v.shape[3], self.added - CHANNELS
        chunk = self.chunk_size
        if low_precision(q) is not None and has_window(self.head_dim + self.added):
            chunk = max(chunk, WITHOUT_MASK)
        k, v = for_products(k), for_products(v)
        q = (at_least_fp32(q) * self.head_dim**-0.5).to(k.dtype)
        q = F.pad(F.pad(q, (0, CHANNELS), value=1.0), (0, zeros))
        v = F.pad(v, (0, self.added))  # the kernels want equal widths
        age = log_f[:, :, :0] if age is None else age
        mixed = []
        for q_n, log_f_n in zip(*(part.split(chunk, 2) for part in (q, log_f)), strict=True):
            g = log_f_n.cumsum(2)
            age = torch.cat((age, -g), 2)
            seen = age.shape[2]
            keys = F.pad(torch.cat((k[:, :, :seen], *(part.to(k.dtype) for part in in_bf16(age))), 3), (0, zeros))
            mixed.append(causal_attention(q_n, keys, v[:, :, :seen], scale=1.0))
            age = age + g[:, :, -1:]
        return torch.cat(mixed, 2)[..., :V], age

    def prefill(self, x: Tensor, state: AgingCache | None = None) -> tuple[Tensor, AgingCache]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        q, k, v, log_f, last_kv = self.project(x, state)
        if state is not None:
            k, v = append(state.k, k), append(state.v, v)
        mixed, age = self.mix(q, k, v, log_f, None if state is None else state.age)
        return self.emit(mixed, x), AgingCache(k, v, age, last_kv)

    def init_state(self, batch_size: int) -> AgingCache:
        empty = self._zeros(batch_size, self.num_heads, 0, self.head_dim)
        kv = self._zeros(batch_size, int(self.shift is not None), 2 * self.hidden_dim)
        return AgingCache(empty, empty, at_least_fp32(empty[..., :1]), kv)

    def step(self, x: Tensor, state: AgingCache) -> tuple[Tensor, AgingCache]:
        x = x[:, None]
        q, k, v, log_f, last_kv = self.project(x, state)
        k, v = append(state.k, k), append(state.v, v)
        age = F.pad(state.age + log_f, (0, 0, 0, 1))
        q, k_, v_ = (at_least_fp32(part) for part in (q, k, v))
        scores = at_least_fp32(q @ k_.mT * self.head_dim**-0.5) + age.mT  # a mask would be rounded to bf16 by autocast
        mixed = scores.softmax(3) @ v_
        return self.emit(mixed, x)[:, 0], AgingCache(k, v, age, last_kv)

    def state_size(self, num_tokens: int) -> int:
        return num_tokens * (2 * self.hidden_dim + self.num_heads) + self.init_state(1).kv.numel()

    def flops(self, num_tokens: int) -> int:
        T, D, H, C = num_tokens, self.hidden_dim, self.num_heads, min(self.chunk_size, num_tokens)
        projections = T * num_weights(self.qkv, self.forget, self.shift, self.gate, self.out)
        pairs = C * (C + 1) // 2 + sum((min(start + C, T) - start) * min(start + C, T) for start in range(C, T, C))
        return 2 * (projections + pairs * 2 * (D + H * self.added))


def in_bf16(x: Tensor) -> list[Tensor]:
    """Three tensors of numbers that bf16 holds, whose sum is x in fp32."""
    parts = []
    for _ in range(CHANNELS - 1):
        parts.append(x.bfloat16().to(x.dtype))
        x = x - parts[-1]
    return [*parts, x]
