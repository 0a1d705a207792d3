"""RWKV-7: a generalised delta rule, in which what is removed, what is added and what decays are learned apart.

    S_t = (diag(w_t) - (a_t * kappa_t)^T kappa_t) S_{t-1} + p_t^T v_t          w_t = exp(-e^(-1/2) sigmoid(d_t))
    o_t = r_t S_t

Token shift: each of r, d, k, v, a and the gate is a map of its own mixture x_t + mu * (x_{t-1} - x_t). The maps of r, k
and v are full. Those of d, a and the gate have low rank: d is tanh(. W_1) W_2 + b, a is sigmoid(. W_1 W_2 + b), and the
gate is sigmoid(. W_1) W_2. kappa is k * xi at unit length per head; it reads what is removed. The key of what is added
is p = k * (1 + (a - 1) * zeta). The output is (LayerNorm(o_t) + (r_t * rho) p_t^T v_t) * gate_t, with LayerNorm and the
second term per head.

The fast form, per chunk of C tokens, has S at the start of the chunk, g_t the sum of log w from the start to t, and the
products <q, k>_ts = sum_i q_ti k_si exp(g_ti - g_si) for s <= t, else 0. kappa reads the state before the decay of its
own token, so <kappa, k>'_ts = sum_i kappa_ti k_si exp(g_{t-1,i} - g_si) for s < t, else 0:

    U = (I + <kappa, a * kappa>')^-1 (<kappa, p>' V + (exp(g_{t-1}) kappa) S)                (what is removed, C x V)
    O = (exp(g) r) S + <r, p> V - <r, a * kappa> U
    S <- diag(exp(g_C)) S + (exp(g_C - g) p)^T V - (exp(g_C - g) a * kappa)^T U

One chunk of T tokens, with S = 0, gives the map. No log w is below -e^(-1/2). So with c = -e^(-1/2) C / 2 and at most
128 tokens, exp(g - c) and exp(c - g) are below e^39, and <q, k> is a product of the matrices exp(g - c) Q and
exp(c - g) K.

Source: Peng et al. 2025, arXiv 2503.14456, section 4 (time mixing); its state is the transpose of S.
Differences: the values of the first layer are not mixed into those of later layers, because an attention sees its own
input only; the low ranks are one argument; every layer starts as the first layer of an early public code does (later:
other decays, xi, zeta, rho and bias of a).
Cost: O(T (C + K + C^2 / K) D).
Decode state: S (K D numbers) and the last input (D numbers).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention
from .chunk_kernels import rwkv7_kernel
from .decays import decay_map
from .kernels import BF16, choose, exact_product, has_triton
from .parts import (
    at_least_fp32,
    check_number,
    check_positive,
    merge_heads,
    split_heads,
    to_chunks,
    unit_triangle_inverse,
)

LOWEST = -math.exp(-0.5)  # log w is above it
SHIFTS = {"r": 0.2, "d": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # mu starts at 1 - (channel / D)^this


class Memory(NamedTuple):
    S: Tensor  # (B, H, K, V)
    x: Tensor  # (B, 1, D), the last input


class Parts(NamedTuple):
    r: Tensor  # (B, H, T, K), as all but the gate
    log_w: Tensor
    kappa: Tensor
    removed: Tensor  # a * kappa
    added: Tensor  # p
    v: Tensor
    gate: Tensor  # (B, T, D)


class RWKV7Attention(Attention[Memory]):
    """Time mixing of RWKV-7.

    Args:
        hidden_dim: width D.
        num_heads: heads H; the published width of a head is 64.
        chunk_size: tokens C computed at once, at most 128; changes the speed, not the result.
        rank: width between the two maps of d, of a and of the gate; published: 2.5 sqrt(D) or more, by 32.
    """

    def __init__(self, hidden_dim: int, num_heads: int, chunk_size: int = 64, rank: int = 32) -> None:
        super().__init__(hidden_dim, num_heads)
        check_positive(chunk_size=chunk_size, rank=rank)
        check_number("at most 128", lambda tokens: tokens <= 128, chunk_size=chunk_size)
        self.chunk_size = chunk_size
        self.rank = rank
        channel = torch.arange(hidden_dim) / hidden_dim
        self.mu = nn.Parameter(torch.stack([1 - channel**power for power in SHIFTS.values()]))
        self.r = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.k = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.v = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.decay = nn.Sequential(nn.Linear(hidden_dim, rank, bias=False), nn.Tanh(), nn.Linear(rank, hidden_dim))
        self.rate = nn.Sequential(nn.Linear(hidden_dim, rank, bias=False), nn.Linear(rank, hidden_dim))
        self.gate = nn.Sequential(
            nn.Linear(hidden_dim, rank, bias=False), nn.Sigmoid(), nn.Linear(rank, hidden_dim, bias=False)
        )
        self.xi = nn.Parameter(torch.full((hidden_dim,), 0.85))
        self.zeta = nn.Parameter(torch.ones(hidden_dim))
        self.rho = nn.Parameter(torch.zeros(num_heads, 1, self.head_dim))
        self.scale = nn.Parameter(torch.ones(hidden_dim))  # of the norm
        self.shift = nn.Parameter(torch.zeros(hidden_dim))
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)
        with torch.no_grad():  # memories of 9 to 1000 tokens; a starts at 1/2
            self.decay.get_parameter("2.bias").copy_(5 * channel**0.85 - 6.5)
            self.rate.get_parameter("1.bias").zero_()

    @property
    def period(self) -> int:
        return self.chunk_size

    @property
    def has_kernel(self) -> bool:
        return has_triton(self.head_dim)

    def project(self, x: Tensor, state: Memory | None = None) -> Parts:
        """What the recurrence and the output are made of, at x (B, T, D), which follows the last input of `state`."""
        before = torch.cat((self._zeros(len(x), 1, self.hidden_dim) if state is None else state.x, x[:, :-1]), 1)
        x_r, x_d, x_k, x_v, x_a, x_g = torch.lerp(x, before, self.mu[:, None, None])
        k, v = at_least_fp32(self.k(x_k)), at_least_fp32(self.v(x_v))
        a = at_least_fp32(self.rate(x_a)).sigmoid()
        log_w = LOWEST * at_least_fp32(self.decay(x_d)).sigmoid()
        added = k * (1 + (a - 1) * self.zeta)
        r, log_w, k, a, added, v = (
            split_heads(part, self.num_heads) for part in (at_least_fp32(self.r(x_r)), log_w, k * self.xi, a, added, v)
        )
        kappa = F.normalize(k, dim=-1)
        return Parts(r, log_w, kappa, a * kappa, added, v, self.gate(x_g))

    def values(self, x: Tensor) -> Tensor:
        return self.project(x).v

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.output(mixed, self.project(x), x.dtype)

    def output(self, mixed: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Mixed values (B, H, T, V) -> norm per head, what the token itself adds, gate, and the last map."""
        bonus = (parts.r * at_least_fp32(self.rho) * parts.added).sum(-1, keepdim=True) * parts.v
        normed = merge_heads(F.layer_norm(mixed, mixed.shape[-1:], eps=1e-5 * self.head_dim))
        return self.out((normed * self.scale + self.shift + merge_heads(bonus)).to(dtype) * parts.gate)

    def attention_map(self, x: Tensor) -> Tensor:
        r, log_w, kappa, removed, added, *_ = self.project(x)
        G = decay_map(log_w)
        G_before = F.pad(G[:, :, :-1], (0, 0, 0, 0, 1, 0))  # kappa reads the state before it decays
        r_p, r_a = (torch.einsum("bhtk,bhsk,bhtsk->bhts", r, part, G) for part in (added, removed))
        kappa_p, kappa_a = (torch.einsum("bhtk,bhsk,bhtsk->bhts", kappa, part, G_before) for part in (added, removed))
        identity = torch.eye(x.shape[1], dtype=r.dtype, device=x.device)
        return r_p - r_a @ (torch.linalg.inv(identity + kappa_a) @ kappa_p).tril()

    def mix(
        self, r: Tensor, log_w: Tensor, kappa: Tensor, removed: Tensor, p: Tensor, v: Tensor, S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All (B, H, T, K); S before them, zeros if None -> mixed values (B, H, T, V); S after."""
        T = r.shape[2]
        C = min(self.chunk_size, T)
        parts = (r, log_w, kappa, removed, p, v)
        r, log_w, kappa, removed, p, v = (to_chunks(part, C) for part in parts)  # (B, H, N, C, K)
        g = log_w.cumsum(3)
        g_before, end = g - log_w, g[..., -1:, :]
        center = LOWEST * C / 2
        queries = torch.cat((r * (g - center).exp(), kappa * (g_before - center).exp()), 3)
        keys = torch.cat((p, removed), 3) * (center - g).exp().repeat(1, 1, 1, 2, 1)
        products = exact_product(queries, keys.mT)  # factors up to e^39, above the range of fp16
        (r_p, r_a), (kappa_p, kappa_a) = (part.chunk(2, -1) for part in products.chunk(2, -2))
        r_p, r_a, kappa_p = r_p.tril(), r_a.tril(), kappa_p.tril(-1)  # <r, p>, <r, a * kappa>, <kappa, p>'
        S = v.new_zeros(*v.shape[:2], p.shape[-1], v.shape[-1]) if S is None else S
        to_end = (end - g).exp()
        inverses = unit_triangle_inverse(at_least_fp32(kappa_a))
        steps = (kappa * g_before.exp(), kappa_p @ v, inverses, removed * to_end, (p * to_end).mT @ v, end.exp().mT)
        S_before, U = [], []
        for kappa_n, found_n, inverse_n, removed_n, added_n, decay_n in zip(
            *(part.unbind(2) for part in steps), strict=True
        ):
            S_before.append(S)
            U.append(inverse_n @ (found_n + kappa_n @ S))
            S = decay_n * S + added_n - removed_n.mT @ U[-1]
        mixed = (r * g.exp()) @ torch.stack(S_before, 2) + r_p @ v - r_a @ torch.stack(U, 2)
        return mixed.flatten(2, 3)[:, :, :T], S

    def prefill(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if not x.shape[1]:
            return x, state or self.init_state(len(x))
        parts = self.project(x, state)
        S = None if state is None else state.S
        mixed, S = choose(x, rwkv7_kernel, self.mix, self.has_kernel, BF16)(*parts[:-1], S)
        return self.output(mixed, parts, x.dtype), Memory(S, x[:, -1:])

    def init_state(self, batch_size: int) -> Memory:
        S = at_least_fp32(self._zeros(batch_size, self.num_heads, self.head_dim, self.head_dim))
        return Memory(S, self._zeros(batch_size, 1, self.hidden_dim))

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        x = x[:, None]
        parts = self.project(x, state)
        S = parts.log_w.mT.exp() * state.S - parts.removed.mT @ (parts.kappa @ state.S) + parts.added.mT @ parts.v
        return self.output(parts.r @ S, parts, x.dtype)[:, 0], Memory(S, x)

    def state_size(self, num_tokens: int) -> int:
        return self.hidden_dim * (self.head_dim + 1)

    def flops(self, num_tokens: int) -> int:
        D, K, C = self.hidden_dim, self.head_dim, min(self.chunk_size, num_tokens)
        padded = -(-num_tokens // C) * C
        projections = num_tokens * (4 * D * D + 6 * D * self.rank)
        products = 4 * C * D
        inverse = padded // C * self.num_heads * C**3 // 2  # half of C^2 for each of C columns
        loop = C * D + 2 * K * D  # (...)^-1 (...) ; kappa S, (a kappa)^T U
        others = 3 * C * D + 2 * K * D  # <kappa, p>' V, <r, p> V, <r, a kappa> U ; p^T V, r S
        return 2 * (projections + inverse + padded * (products + loop + others))
