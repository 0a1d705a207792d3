"""The architectures against loops over tokens, written from the papers, and the decays behind them.

The loops are in fp64. They use the parameters of an attention and nothing of its methods.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_law import VARIANTS, build, sequence
from torch import Tensor

from bsbr_pl.attention import Attention
from bsbr_pl.attention.decays import decay_map, decayed_products, decayed_sum, decays, power_of_two

T = 21


def convolved(attention: Attention, x: Tensor) -> Tensor:
    """The projections of x (T, D), each the sum over the last taps."""
    projected, taps = F.linear(x, attention.qkv.weight, attention.qkv.bias), attention.conv.weight[:, 0]
    if not taps.numel():
        return projected
    size = taps.shape[1]
    return torch.stack(
        [sum(taps[:, size - 1 - age] * projected[t - age] for age in range(min(size, t + 1))) for t in range(len(x))]
    )


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def heads(x: Tensor, number: int) -> Tensor:
    """(T, H K) -> (T, H, K)."""
    return x.view(len(x), number, -1)


def gla_by_tokens(gla: Attention, x: Tensor) -> Tensor:
    H, D = 2, x.shape[1]
    HK = H * gla.key_dim
    q, *k, v = convolved(gla, x).split([HK, D] if gla.tied_keys else [HK, HK, D], -1)
    if gla.tied_keys:  # HGRN2
        alpha = torch.sigmoid(x @ gla.decay.weight.T + gla.decay.bias)
        q, k = q * torch.sigmoid(q), [1 - alpha]
    else:
        low = x @ gla.decay[0].weight.T
        alpha = torch.sigmoid(low @ gla.decay[1].weight.T + gla.decay[1].bias) ** (1 / 16)
    q, k, v, alpha = (heads(part, H) for part in (q, *k, v, alpha))
    S, outputs = torch.zeros(H, gla.key_dim, D // H, dtype=x.dtype), []
    for t in range(len(x)):
        S = alpha[t, :, :, None] * S + torch.einsum("hk,hv->hkv", k[t], v[t])
        o = torch.einsum("hk,hkv->hv", q[t] / gla.key_dim**0.5, S)
        gate = x[t] @ gla.gate.weight.T
        outputs.append(rms_norm(o, gla.norm.weight).flatten() * gate * torch.sigmoid(gate) @ gla.out.weight.T)
    return torch.stack(outputs)


def mamba2_by_tokens(mamba2: Attention, x: Tensor) -> Tensor:
    """In the letters of the paper: C, B and X, h the state, dt and A."""
    H, N = 2, mamba2.key_dim
    CBX = convolved(mamba2, x) + mamba2.conv_bias
    CBX = CBX * torch.sigmoid(CBX)
    C, B, X = CBX[:, :N], CBX[:, N : 2 * N], heads(CBX[:, 2 * N :], H)
    dt = F.softplus(x @ mamba2.dt.weight.T + mamba2.dt.bias)
    A = -mamba2.log_rate.exp()
    h, outputs = torch.zeros(H, N, X.shape[2], dtype=x.dtype), []
    for t in range(len(x)):
        write = torch.einsum("n,hp->hnp", B[t], dt[t, :, None] * X[t])
        h = torch.exp(A * dt[t])[:, None, None] * h + write
        y = torch.einsum("n,hnp->hp", C[t], h) + mamba2.skip[:, None] * X[t]
        z = x[t] @ mamba2.gate.weight.T
        outputs.append(rms_norm(y.flatten() * z * torch.sigmoid(z), mamba2.norm.weight) @ mamba2.out.weight.T)
    return torch.stack(outputs)


def log_linear_by_tokens(log_linear: Attention, x: Tensor) -> Tensor:
    """In the letters of the paper, h the states by level: a Fenwick tree that grows by one token at a time."""
    H, N, L = 2, log_linear.key_dim, log_linear.num_levels
    CBX = convolved(log_linear, x) + log_linear.conv_bias
    CBX = CBX * torch.sigmoid(CBX)
    C, B, X = CBX[:, :N], CBX[:, N : 2 * N], heads(CBX[:, 2 * N :], H)
    dt = F.softplus(x @ log_linear.dt.weight.T + log_linear.dt.bias)
    lambdas = heads(F.softplus(x @ log_linear.levels.weight.T + log_linear.levels.bias), H)
    h, outputs = {}, []
    for t in range(len(x)):
        if t:
            lowest = next(digit for digit in range(t) if t >> digit & 1)
            h[lowest + 1] = sum(h.pop(level) for level in range(lowest + 1) if level in h)  # no later level is left
        alpha = torch.exp(-log_linear.log_rate.exp() * dt[t])[:, None, None]
        h = {level: alpha * state for level, state in h.items()}
        h[0] = torch.einsum("n,hp->hnp", B[t], dt[t, :, None] * X[t])
        y = log_linear.skip[:, None] * X[t]
        for level, state in h.items():
            y = y + lambdas[t, :, min(level, L - 1), None] * torch.einsum("n,hnp->hp", C[t], state)
        z = x[t] @ log_linear.gate.weight.T
        outputs.append(rms_norm(y.flatten() * z * torch.sigmoid(z), log_linear.norm.weight) @ log_linear.out.weight.T)
    return torch.stack(outputs)


def kda_by_tokens(kda: Attention, x: Tensor) -> Tensor:
    H, D = 2, x.shape[1]
    qkv = convolved(kda, x)
    q, k, v = (heads(part, H) for part in (qkv * torch.sigmoid(qkv)).split(D, -1))
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    beta = torch.sigmoid(x @ kda.beta.weight.T) * (2 if kda.allow_neg_eigval else 1)
    dt = F.softplus(x @ kda.decay[0].weight.T @ kda.decay[1].weight.T + kda.decay[1].bias)
    alpha = torch.exp(-kda.log_rate.exp() * heads(dt, H))
    K = D // H
    identity = torch.eye(K, dtype=x.dtype)
    S, outputs = [torch.zeros(K, K, dtype=x.dtype)] * H, []
    for t in range(len(x)):
        for h in range(H):
            erase = identity - beta[t, h] * torch.outer(k[t, h], k[t, h])
            write = beta[t, h] * torch.outer(k[t, h], v[t, h])
            S = [*S[:h], erase @ torch.diag(alpha[t, h]) @ S[h] + write, *S[h + 1 :]]
        o = torch.stack([q[t, h] @ S[h] for h in range(H)])
        gate = torch.sigmoid(x[t] @ kda.gate[0].weight.T @ kda.gate[1].weight.T + kda.gate[1].bias)
        outputs.append(rms_norm(o, kda.norm.weight).flatten() * gate @ kda.out.weight.T)
    return torch.stack(outputs)


def fox_by_tokens(fox: Attention, x: Tensor) -> Tensor:
    H, D = 2, x.shape[1]
    q, k, v = (heads(part, H) for part in (x @ fox.qkv.weight.T).split(D, -1))
    f = torch.sigmoid(x @ fox.forget.weight.T + fox.forget.bias)
    if fox.shift is not None:
        share_k, share_v = torch.sigmoid(x @ fox.shift.weight.T)[..., None].split(H, 1)
        k, v = (
            share * torch.cat((torch.zeros_like(part[:1]), part[:-1])) + (1 - share) * part
            for part, share in ((k, share_k), (v, share_v))
        )
    if not isinstance(fox.q_norm, torch.nn.Identity):
        q, k = rms_norm(q, fox.q_norm.weight), rms_norm(k, fox.k_norm.weight)
    outputs = []
    for t in range(len(x)):
        o = []
        for h in range(H):
            weights = torch.stack(
                [torch.exp(q[t, h] @ k[s, h] / (D // H) ** 0.5) * f[s + 1 : t + 1, h].prod() for s in range(t + 1)]
            )
            o.append(weights / weights.sum() @ v[: t + 1, h])
        o = torch.stack(o)
        if fox.gate is not None:
            o = rms_norm(o, fox.norm.weight) * heads(torch.sigmoid(x @ fox.gate.weight.T), H)[t]
        outputs.append(o.flatten() @ fox.out.weight.T)
    return torch.stack(outputs)


def rwkv7_by_tokens(rwkv7: Attention, x: Tensor) -> Tensor:
    """In the letters of the paper, wkv (V, K) the state, tensors (H, K) per token."""
    H, K = 2, x.shape[1] // 2
    wkv, outputs, before = torch.zeros(H, K, K, dtype=x.dtype), [], torch.zeros_like(x[0])
    for x_t in x:
        x_r, x_d, x_k, x_v, x_a, x_g = (x_t + mu * (before - x_t) for mu in rwkv7.mu)
        r, k, v = (x_r @ rwkv7.r.weight.T, x_k @ rwkv7.k.weight.T, x_v @ rwkv7.v.weight.T)
        d = torch.tanh(x_d @ rwkv7.decay[0].weight.T) @ rwkv7.decay[2].weight.T + rwkv7.decay[2].bias
        w = torch.exp(-(torch.e**-0.5) * torch.sigmoid(d))
        a = torch.sigmoid(x_a @ rwkv7.rate[0].weight.T @ rwkv7.rate[1].weight.T + rwkv7.rate[1].bias)
        g = torch.sigmoid(x_g @ rwkv7.gate[0].weight.T) @ rwkv7.gate[2].weight.T
        kappa, k = k * rwkv7.xi, k * (1 + (a - 1) * rwkv7.zeta)
        r, w, k, v, a, kappa = (part.view(H, K) for part in (r, w, k, v, a, kappa))
        kappa = kappa / kappa.norm(dim=-1, keepdim=True)
        transition = torch.stack([torch.diag(w[h]) - torch.outer(kappa[h], a[h] * kappa[h]) for h in range(H)])
        wkv = wkv @ transition + torch.einsum("hv,hk->hvk", v, k)
        p = torch.einsum("hvk,hk->hv", wkv, r)
        p = (p - p.mean(-1, keepdim=True)) / (p.var(-1, keepdim=True, unbiased=False) + 1e-5 * K).sqrt()
        p = p.flatten() * rwkv7.scale + rwkv7.shift
        bonus = (r * rwkv7.rho[:, 0] * k).sum(-1, keepdim=True) * v
        outputs.append((p + bonus.flatten()) * g @ rwkv7.out.weight.T)
        before = x_t
    return torch.stack(outputs)


def retnet_by_tokens(retnet: Attention, x: Tensor) -> Tensor:
    """The parallel form of eq. 5 for each query, with complex rotations."""
    H, D, E = 2, x.shape[1], retnet.value_dim
    K = D // H
    q, k, v = (heads(part, H) for part in convolved(retnet, x).split([D, D, E], -1))
    theta = 10_000 ** (-torch.arange(0, K, 2, dtype=x.dtype) / K)
    outputs = []
    for t in range(len(x)):
        o = []
        for h in range(H):
            gamma = 1 - 2.0 ** (-5 - 4 * h / (H - 1))
            mixed = torch.zeros(E // H, dtype=x.dtype)
            for s in range(t + 1):
                a, b = (torch.view_as_complex(part.view(-1, 2)) for part in (q[t, h], k[s, h]))
                score = (a * torch.polar(torch.ones_like(theta), (t - s) * theta) * b.conj()).sum().real / K**0.5
                mixed = mixed + gamma ** (t - s) * score * v[s, h]
            o.append(rms_norm(mixed, retnet.norm.weight))
        gate = x[t] @ retnet.gate.weight.T
        outputs.append(torch.cat(o) * gate * torch.sigmoid(gate) @ retnet.out.weight.T)
    return torch.stack(outputs)


def gated_delta_product_by_tokens(product: Attention, x: Tensor) -> Tensor:
    """The transition of a token as a product of generalised Householder matrices."""
    H, D, n = 2, x.shape[1], product.num_steps
    qkv = convolved(product, x)
    qkv = qkv * torch.sigmoid(qkv)
    K = D // H
    q, k, v = qkv[:, :D].view(-1, H, K), qkv[:, D : (n + 1) * D], qkv[:, (n + 1) * D :]
    k, v = k.view(-1, H, n, K), v.view(-1, H, n, K)
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    beta = product.beta_scale * torch.sigmoid(x @ product.beta.weight.T + product.beta.bias).view(-1, H, n)
    alpha = torch.ones(len(x), H, dtype=x.dtype)
    if product.decay is not None:
        dt = F.softplus(x @ product.decay.weight.T + product.decay.bias)
        alpha = torch.exp(-product.log_rate.exp() * dt)
    identity = torch.eye(K, dtype=x.dtype)
    S, outputs = [torch.zeros(K, K, dtype=x.dtype)] * H, []
    for t in range(len(x)):
        o = []
        for h in range(H):
            S_h = alpha[t, h] * S[h]
            for i in range(n):
                householder = identity - beta[t, h, i] * torch.outer(k[t, h, i], k[t, h, i])
                S_h = householder @ S_h + beta[t, h, i] * torch.outer(k[t, h, i], v[t, h, i])
            S = [*S[:h], S_h, *S[h + 1 :]]
            o.append(rms_norm(q[t, h] @ S_h, product.norm.weight))
        gate = x[t] @ product.gate.weight.T
        outputs.append(torch.cat(o) * gate * torch.sigmoid(gate) @ product.out.weight.T)
    return torch.stack(outputs)


BY_TOKENS = {
    "retnet": retnet_by_tokens,
    "gated_delta_product": gated_delta_product_by_tokens,
    "gla": gla_by_tokens,
    "mamba2": mamba2_by_tokens,
    "log_linear": log_linear_by_tokens,
    "kda": kda_by_tokens,
    "rwkv7": rwkv7_by_tokens,
    "fox": fox_by_tokens,
}
PUBLISHED = [
    ("retnet", {}),
    ("retnet", {"conv_size": 4, "expand_v": 0.5}),
    ("gated_delta_product", {}),
    ("gated_delta_product", {"num_steps": 3, "forget_gate": False, "allow_neg_eigval": False}),
    ("gla", {"conv_size": 1, "expand_k": 0.5}),
    ("gla", {}),
    ("gla", {"conv_size": 1, "tied_keys": True}),  # HGRN2
    ("mamba2", {}),
    ("mamba2", {"key_dim": 5, "expansion_factor": 1, "conv_size": 1}),
    ("log_linear", {}),
    ("log_linear", {"key_dim": 5, "expansion_factor": 1, "conv_size": 1, "num_levels": 4}),
    ("kda", {}),
    ("kda", {"allow_neg_eigval": True}),
    ("rwkv7", {}),
    ("rwkv7", {"rank": 3}),
    ("fox", {}),
    ("fox", {"qk_norm": True, "kv_shift": True, "output_gate": True}),  # Pro
]


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize(("name", "options"), PUBLISHED, ids=[f"{name}{options or ''}" for name, options in PUBLISHED])
def test_it_is_the_loop_over_tokens(name, options, chunk_size):
    attention, x = build(name, {**options, "chunk_size": chunk_size}), sequence(T, batch=2)
    expected = torch.stack([BY_TOKENS[name](attention, row) for row in x])
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)
    own, truth = (torch.autograd.grad(y.square().sum(), list(attention.parameters())) for y in (attention(x), expected))
    for found, right in zip(own, truth, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)


def test_kda_with_one_decay_per_head_is_gated_delta_net():
    kda, gated = build("kda", {"chunk_size": 8}), build("gated_delta_net", {"chunk_size": 8})
    shape = 2, 2, T, 8
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    beta, alpha = torch.rand(2, *shape[:3], 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mixed, S = kda.mix(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, alpha.log().expand(shape))
    expected, expected_S = gated.mix(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, alpha.log())
    torch.testing.assert_close((mixed, S), (expected, expected_S), rtol=1e-12, atol=1e-12)


def test_gla_without_decay_is_linear_attention():
    gla = build("gla", {"chunk_size": 8})
    q, k, v = torch.randn(3, 2, 2, T, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed, S = gla.mix(q, k, torch.zeros_like(k), v)
    torch.testing.assert_close((mixed, S), ((q @ k.mT).tril() @ v, k.mT @ v), rtol=1e-12, atol=1e-12)


def test_fox_that_forgets_nothing_is_standard_without_rotary_positions():
    fox, standard = build("fox", {"chunk_size": 8}), build("standard", {"rope": False})
    fox.load_state_dict(standard.state_dict(), strict=False)
    torch.nn.init.zeros_(fox.forget.weight)
    torch.nn.init.constant_(fox.forget.bias, 100)  # f = 1
    x = sequence(T)
    torch.testing.assert_close(fox(x), standard(x), rtol=1e-12, atol=1e-12)


def random_parts(C: int, K: int, R: int = 1, rate: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q (2, C, R, K), k and log alpha (2, C, K)."""
    random = torch.Generator().manual_seed(C)
    q, k = (torch.randn(2, C, *shape, generator=random, dtype=torch.float64) for shape in ((R, K), (K,)))
    log_alpha = rate * torch.rand(2, C, K, generator=random, dtype=torch.float64).log()
    return [part.to(dtype).requires_grad_() for part in (q, k, log_alpha)]


def products_by_definition(q: Tensor, k: Tensor, log_alpha: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """`decayed_products`, pair by pair."""
    B, C, R, _ = q.shape
    alpha = log_alpha.exp()
    A = torch.zeros(R, B, C, C, dtype=q.dtype)
    for t, s in itertools.product(range(C), range(C)):
        if s <= t:
            decay = alpha[:, s + 1 : t + 1].prod(1)
            A = A.clone()
            A[:, :, t, s] = torch.einsum("brk,bk,bk->rb", q[:, t], k[:, s], decay)
    from_start = torch.stack([alpha[:, : t + 1].prod(1) for t in range(C)], 1)
    to_end = torch.stack([alpha[:, t + 1 :].prod(1) for t in range(C)], 1)
    return list(A), from_start, to_end


@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("C", [1, 2, 4, 8])
def test_decayed_products_are_their_definition(C, R):
    """All results, and the gradients of a random function of all of them."""
    parts = random_parts(C, K=3, R=R)
    found = []
    for A, from_start, to_end in (decayed_products(*parts), products_by_definition(*parts)):
        results = [*A, from_start, to_end]
        random = torch.Generator().manual_seed(7)
        loss = sum((y * torch.randn(y.shape, generator=random, dtype=y.dtype)).sum() for y in results)
        found.append([*results, *torch.autograd.grad(loss, parts)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_decayed_products_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(lambda *parts: decayed_products(*parts)[0], random_parts(4, K=2, R=2))


@pytest.mark.parametrize("C", [1, 4, 16])
def test_decays_are_their_map(C):
    (log_alpha,) = random_parts(C, K=1)[2:]
    G, from_start, to_end = decays(log_alpha)
    expected = decay_map(log_alpha)
    torch.testing.assert_close(G, expected[..., 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(from_start, log_alpha.cumsum(1).exp(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to_end, expected[:, -1], rtol=1e-12, atol=1e-12)


def test_decayed_sum_is_its_recurrence():
    random = torch.Generator().manual_seed(0)
    x, start = torch.randn(2, 3, 5, 4, 2, generator=random), torch.randn(2, 3, 4, 2, generator=random)
    decay = torch.rand(2, 3, 5, 4, 1, generator=random)
    before, last = decayed_sum(x, decay, start)
    for n in range(5):
        following = before[:, :, n + 1] if n < 4 else last
        torch.testing.assert_close(following, decay[:, :, n] * before[:, :, n] + x[:, :, n])
    torch.testing.assert_close(before[:, :, 0], start)
    assert torch.equal(decayed_sum(x, decay)[0][:, :, 0], torch.zeros(2, 3, 4, 2))


@pytest.mark.parametrize("rate", [1e-6, 1.0, 30.0, 1e4])
def test_fp32_holds_every_decay(rate):
    """Decays from 1 - 1e-6 to exp(-10,000) in a chunk of 64: all is finite and near fp64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        parts = [part.detach().float().to(dtype).requires_grad_() for part in random_parts(64, K=8, rate=rate)]
        (A,), from_start, to_end = decayed_products(*parts)
        loss = (A * A.detach().cos()).sum() + from_start.sum() + to_end.sum()
        found.append([A, from_start, to_end, *torch.autograd.grad(loss, parts)])
    for low, exact in zip(*found, strict=True):
        assert low.isfinite().all()
        error = (low.double() - exact).square().mean().sqrt() / (exact.square().mean().sqrt() + 1e-30)
        assert error <= 2e-6, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", ["gla", "mamba2", "log_linear", "kda", "gated_delta_net", "gated_delta_product"])
def test_one_fast_decay_costs_the_slow_ones_no_precision(name):
    """A token at which everything is forgotten, then tokens at which nearly nothing is: fp32 near fp64."""
    attention = build(name, {"chunk_size": 64}, torch.float32)
    log_decay = torch.full((1, 2, 64, 8 if name in ("gla", "kda") else 1), -1e-3)
    log_decay[:, :, 20] = -3e4
    q, k, v = torch.randn(3, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    one, unit = torch.ones(1, 2, 64, 1) / 2, F.normalize(k, dim=-1)
    parts = {
        "gla": (q, k, log_decay, v),
        "mamba2": (q[:, :1], k[:, :1], one * v, log_decay),
        "log_linear": (q[:, :1], k[:, :1], v, one, log_decay, one.expand(-1, -1, -1, 15)),
        "kda": (q, unit, v, one, log_decay),
        "gated_delta_net": (q, unit, v, one, log_decay),
        "gated_delta_product": (
            q,
            *(part[:, :, :, None].expand(-1, -1, -1, 2, -1) for part in (unit, v, one)),
            log_decay,
        ),
    }[name]
    mixed, exact = attention.mix(*parts)[0], attention.double().mix(*(part.double() for part in parts))[0]
    error = (mixed.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= 1e-6, f"relative error {error:.1e}"


def test_log_linear_with_equal_levels_is_mamba2():
    """lambda = 1, over several chunks: only the way through the tree differs."""
    log_linear, mamba2 = build("log_linear", {"chunk_size": 8}), build("mamba2", {"chunk_size": 8})
    mamba2.load_state_dict(log_linear.state_dict(), strict=False)
    torch.nn.init.zeros_(log_linear.levels.weight)
    torch.nn.init.constant_(log_linear.levels.bias, math.log(math.e - 1))
    x = sequence(5 * T)
    torch.testing.assert_close(log_linear(x), mamba2(x), rtol=1e-12, atol=1e-12)


def test_the_levels_of_log_linear_are_blocks_that_double():
    """Those of query 13, binary 1101: itself, token 12, tokens 8 to 11, tokens 0 to 7; a limit joins the last ones."""
    t = torch.tensor(13)
    levels = build("log_linear", {}).level(t, torch.arange(14))
    assert levels.tolist() == [4] * 8 + [3] * 4 + [1, 0]
    assert build("log_linear", {"num_levels": 4}).level(t, torch.arange(14)).tolist() == [3] * 12 + [1, 0]


@pytest.mark.parametrize("rate", [1e-3, 1.0, 30.0])
def test_log_linear_is_precise_in_long_blocks(rate):
    """Decays of blocks of up to 2,048 tokens: fp32 near fp64, outputs and gradients."""
    log_linear, tokens = build("log_linear", {"chunk_size": 16}, torch.float32), 3000
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, tokens, 8, generator=random)
    v = torch.randn(1, 2, tokens, 8, generator=random)
    dt, scale = torch.rand(1, 2, tokens, 1, generator=random), torch.rand(1, 2, tokens, 15, generator=random)
    found = []
    for dtype in (torch.float32, torch.float64):
        parts = [part.to(dtype).requires_grad_() for part in (q, k, v, dt, -rate * dt, scale)]
        mixed, tree = log_linear.to(dtype).mix(*parts)
        loss = (mixed * mixed.detach().cos()).sum() + tree[-1].sum()
        found.append([mixed, *tree, *torch.autograd.grad(loss, parts)])
    for low, exact in zip(*found, strict=True):
        error = (low.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error <= 1e-5, f"relative error {error:.1e}"


def test_fox_is_precise_however_much_was_forgotten():
    """Ages of -10,000 and more: in fp32 a sum of log f over the whole text would have an error of 1e-3."""
    fox = build("fox", {"chunk_size": 64}, torch.float32)
    q, k, v = torch.randn(3, 1, 2, 2000, 8, generator=torch.Generator().manual_seed(0))
    log_f = -10 * torch.rand(1, 2, 2000, 1, generator=torch.Generator().manual_seed(1))
    mixed, exact = fox.mix(q, k, v, log_f)[0], fox.double().mix(*(part.double() for part in (q, k, v, log_f)))[0]
    error = (mixed.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= 3e-6, f"relative error {error:.1e}"


@pytest.mark.parametrize(("expand_k", "found"), [(0.3, "0.3"), (0, "0"), (-1.0, "-1.0"), (True, "True")])
def test_keys_of_a_broken_width_are_refused(expand_k, found):
    with pytest.raises(ValueError, match=rf"expand_k must be above 0, with .* whole number, got {found}"):
        build("gla", {"expand_k": expand_k})


def test_power_of_two():
    assert [power_of_two(number) for number in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.6])
def test_rwkv7_is_precise_in_its_longest_chunk(rate):
    """Factors up to e^39 in a chunk of 128 tokens: fp32 near fp64, outputs and gradients."""
    rwkv7 = build("rwkv7", {"chunk_size": 128})
    random = torch.Generator().manual_seed(0)
    r, k, v, kappa = torch.randn(4, 1, 2, 300, 8, generator=random)
    kappa, a, share = F.normalize(kappa, dim=-1), *torch.rand(2, 1, 2, 300, 8, generator=random)
    found = []
    for dtype in (torch.float32, torch.float64):
        parts = [part.to(dtype).requires_grad_() for part in (r, -rate * share, kappa, a * kappa, k, v)]
        mixed = rwkv7.mix(*parts)[0]
        found.append([mixed, *torch.autograd.grad(mixed.square().sum(), parts)])
    for low, exact in zip(*found, strict=True):
        error = (low.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error <= 5e-6, f"relative error {error:.1e}"


def test_rwkv7_refuses_a_chunk_whose_factors_would_overflow():
    with pytest.raises(ValueError, match="chunk_size must be at most 128, got 129"):
        build("rwkv7", {"chunk_size": 129})


def moba_by_tokens(moba: Attention, x: Tensor) -> Tensor:
    """Section 2.2 of the paper, token by token; keys and queries are not rotated."""
    H, D = 2, x.shape[1]
    C, K = moba.chunk_size, D // H
    q, k, v = qkv_heads(moba, x)
    outputs = []
    for t in range(len(x)):
        o = []
        for h in range(H):
            own, allowed = t // C, []
            gates = {i: q[t, h] @ k[i * C : (i + 1) * C, h].mean(0) for i in range(own)}
            best = sorted(gates, key=lambda i: -gates[i])[: moba.top_k - 1]
            for i in sorted([*best, own]):
                allowed += [s for s in range(i * C, (i + 1) * C) if s <= t]
            scores = torch.stack([q[t, h] @ k[s, h] / K**0.5 for s in allowed])
            o.append(scores.softmax(0) @ v[allowed, h])
        outputs.append(torch.stack(o))
    return through(moba, outputs, x)


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "output_gate": True}], ids=["", "normed and gated"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_moba_is_the_loop_over_tokens(chunk_size, top_k, more):
    moba = build("moba", {"chunk_size": chunk_size, "top_k": top_k, "rope": False, "conv_size": 4, **more})
    x = sequence(T, batch=2)
    expected = torch.stack([moba_by_tokens(moba, row) for row in x])
    torch.testing.assert_close(moba(x), expected, rtol=1e-10, atol=1e-10)
    own, truth = (torch.autograd.grad(y.square().sum(), list(moba.parameters())) for y in (moba(x), expected))
    for found, right in zip(own, truth, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)


def test_moba_that_chooses_all_chunks_is_standard():
    moba, standard = build("moba", {"chunk_size": 4, "top_k": 9}), build("standard", {})
    standard.load_state_dict(moba.state_dict())
    x = sequence(T)
    torch.testing.assert_close(moba(x), standard(x), rtol=1e-10, atol=1e-10)


def test_moba_prefers_the_earlier_of_equal_chunks():
    moba = build("moba", {"chunk_size": 2, "top_k": 2, "rope": False})
    A = moba.attention_map(sequence(1).expand(-1, 9, -1))
    expected = torch.zeros(9, 9, dtype=torch.bool)
    for t in range(9):
        expected[t, [0, 1] if t > 1 else []] = True
        expected[t, t - t % 2 : t + 1] = True
    assert torch.equal(A != 0, expected.expand(3, 2, 9, 9))


def softmax_weights(query: Tensor, keys: list[Tensor]) -> Tensor:
    """Of one query (K,) over n keys (K,), n > 0: (n,)."""
    return torch.stack([query @ key / len(key) ** 0.5 for key in keys]).softmax(0)


def nsa_by_tokens(nsa: Attention, x: Tensor) -> Tensor:
    """Section 3 of the paper, token by token; blocks are compressed by their mean, keys and queries are not rotated."""
    H, G, D = 2, nsa.num_kv_heads, x.shape[1]
    C, K = nsa.chunk_size, D // H
    q, k, v = convolved(nsa, x).split([D, G * K, G * K], -1)
    q, k, v = heads(q, H), heads(k, G), heads(v, G)
    gates = torch.sigmoid(x @ nsa.gate.weight.T).view(len(x), 3, H)
    k_means, v_means = ([part[c * C : (c + 1) * C].mean(0) for c in range(len(x) // C)] for part in (k, v))
    outputs = []
    for t in range(len(x)):
        own, finished, o = t // C, (t + 1) // C, []
        p = [
            softmax_weights(q[t, h], [key[h * G // H] for key in k_means[:finished]]) if finished else []
            for h in (0, 1)
        ]
        for h in range(H):
            g = h * G // H
            group = [p[other] for other in range(H) if other * G // H == g]
            best = sorted(range(own), key=lambda c, group=group: -sum(weights[c] for weights in group))
            fixed = [c for c in (own, own - 1, 0) if c >= 0]
            blocks = list(dict.fromkeys([*fixed, *best]))[: nsa.top_k]
            chosen = [s for s in range(t + 1) if s // C in blocks]
            window = list(range(max(0, t + 1 - nsa.window_size), t + 1))
            parts = [sum((p[h][c] * v_means[c][g] for c in range(finished)), start=torch.zeros(K, dtype=x.dtype))]
            for seen in (chosen, window):
                parts.append(softmax_weights(q[t, h], list(k[seen, g])) @ v[seen, g])
            o.append(sum(gates[t, i, h] * parts[i] for i in range(3)))
        outputs.append(torch.cat(o) @ nsa.out.weight.T)
    return torch.stack(outputs)


@pytest.mark.parametrize("num_kv_heads", [None, 1])
@pytest.mark.parametrize(("chunk_size", "top_k"), [(1, 3), (2, 1), (2, 2), (2, 3), (2, 5), (4, 4), (64, 4)])
def test_nsa_is_the_loop_over_tokens(chunk_size, top_k, num_kv_heads):
    options = {"chunk_size": chunk_size, "top_k": top_k, "window_size": 5, "num_kv_heads": num_kv_heads}
    nsa, x = build("nsa", options | {"rope": False, "conv_size": 4}), sequence(T, batch=2)
    expected = torch.stack([nsa_by_tokens(nsa, row) for row in x])
    torch.testing.assert_close(nsa(x), expected, rtol=1e-10, atol=1e-10)
    own, truth = (torch.autograd.grad(y.square().sum(), list(nsa.parameters())) for y in (nsa(x), expected))
    for found, right in zip(own, truth, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gates", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.5, 0.5)])
def test_nsa_that_chooses_all_chunks_or_has_a_window_over_all_is_standard(gates, monkeypatch):
    nsa, standard = build("nsa", {"chunk_size": 4, "top_k": 9, "window_size": T}), build("standard", {})
    standard.load_state_dict({name: value for name, value in nsa.state_dict().items() if name != "gate.weight"})
    monkeypatch.setattr(nsa, "gates", lambda x: torch.tensor(gates, dtype=x.dtype).view(3, 1, 1, 1, 1))
    x = sequence(T)
    torch.testing.assert_close(nsa(x), standard(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("top_k", [1, 2])
def test_nsa_sees_its_window_and_its_last_chunks_exactly(top_k, monkeypatch):
    nsa = build("nsa", {"chunk_size": 4, "top_k": top_k, "window_size": 6})
    monkeypatch.setattr(nsa, "gates", lambda x: torch.tensor([0.0, 0.5, 0.5], dtype=x.dtype).view(3, 1, 1, 1, 1))
    A = nsa.attention_map(sequence(T))
    assert torch.equal(A != 0, nsa.sees_exactly(T).expand(3, 2, T, T))


def test_nsa_chooses_fixed_chunks_first_and_the_earlier_of_equal_ones():
    nsa, t = build("nsa", {"chunk_size": 2, "top_k": 4}), torch.arange(10)
    chosen, exists = nsa.choose(torch.zeros(1, 2, 10, 5), t)
    found = [row[there].tolist() for row, there in zip(chosen[0, 0], exists[0, 0], strict=True)]
    assert found == [[], [], [0], [0], [1, 0], [1, 0], [2, 0, 1], [2, 0, 1], [3, 0, 1], [3, 0, 1]]


def test_gated_delta_product_of_one_step_is_gated_delta_net():
    product = build("gated_delta_product", {"chunk_size": 8, "num_steps": 1, "allow_neg_eigval": False})
    gated = build("gated_delta_net", {"chunk_size": 8})
    gated.load_state_dict(product.state_dict())
    x = sequence(T)
    torch.testing.assert_close(product(x), gated(x), rtol=1e-12, atol=1e-12)


def test_one_step_with_beta_of_two_is_a_reflection():
    """Two reflections give back what was there; two erasures (beta = 1) do not."""
    product = build("gated_delta_product", {"chunk_size": 8, "num_steps": 2, "forget_gate": False})
    S = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key = F.normalize(torch.randn(1, 2, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 2, 1, 2, 8)
    q, no_value, beta = key[:, :, :, 0], torch.zeros_like(key), torch.full((1, 2, 1, 2, 1), 2.0, dtype=torch.float64)
    log_alpha = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(product.mix(q, key, no_value, beta, log_alpha, S)[1], S, rtol=1e-12, atol=1e-12)
    erased = product.mix(q, key, no_value, beta / 2, log_alpha, S)
    torch.testing.assert_close(erased[0], torch.zeros_like(erased[0]), rtol=0, atol=1e-12)


# The other architectures, from the formulas of their docstrings.


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def rotated(x: Tensor, t: int, base: float = 10_000.0, fraction: float = 1.0) -> Tensor:
    """Pair i of the first R = fraction * K channels of x (K,) turned by t * base^(-2i/R)."""
    R = 2 * round(fraction * len(x) / 2)
    angle = t * base ** (-torch.arange(0, R, 2, dtype=x.dtype) / max(R, 1))
    a, b = x[:R:2], x[1:R:2]
    turned = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
    return torch.cat((turned.flatten(), x[R:]))


def qkv_heads(attention: Attention, x: Tensor) -> list[Tensor]:
    """q, k, v, each (T, H, K)."""
    projected = convolved(attention, x) if hasattr(attention, "conv") else x @ attention.qkv.weight.T
    q, k, v = (heads(part, attention.num_heads) for part in projected.chunk(3, -1))
    return [*normed(attention, q, k), v]


def normed(attention: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with QK-norm, if the attention has it."""
    if not hasattr(getattr(attention, "q_norm", None), "weight"):
        return q, k
    return rms_norm(q, attention.q_norm.weight), rms_norm(k, attention.k_norm.weight)


def through(attention: Attention, o: list[Tensor], x: Tensor) -> Tensor:
    """Rows of heads (H, V) through the output gate, if there is one, and the output map."""
    y = torch.stack(o).flatten(1)
    if getattr(attention, "output_gate", None) is not None:
        y = y * torch.sigmoid(x @ attention.output_gate.weight.T)
    y = y @ attention.out.weight.T
    return y if attention.out.bias is None else y + attention.out.bias


def softmax_by_tokens(attention: Attention, x: Tensor) -> Tensor:
    """Standard, SlidingWindow and Hopfield. A position is the place in the cache: sinks, then the window."""
    H, D, K = attention.num_heads, x.shape[1], x.shape[1] // attention.num_heads
    projected = convolved(attention, x) if hasattr(attention, "conv") else x @ attention.qkv.weight.T
    shared = (projected.shape[1] - D) // 2
    q, k, v = (part.view(len(x), -1, K) for part in projected.split([D, shared, shared], 1))
    group, beta = H // k.shape[1], getattr(attention, "beta", torch.full((H, 1, 1), K**-0.5, dtype=x.dtype))
    q, k = normed(attention, q, k)
    base, fraction = attention.rope_base, attention.rope_fraction if attention.rope else 0
    outputs = []
    for t in range(len(x)):
        first = max(0, t + 1 - (attention.reach or len(x)))
        cache, o = [*range(min(first, getattr(attention, "num_sinks", 0))), *range(first, t + 1)], []
        for h in range(H):
            xi = rotated(q[t, h], len(cache) - 1, base, fraction)
            keys = torch.stack([rotated(k[j, h // group], i, base, fraction) for i, j in enumerate(cache)])
            for _ in range(getattr(attention, "num_updates", 0)):
                xi = (beta[h, 0, 0] * (keys @ xi)).softmax(0) @ keys
            weights = (beta[h, 0, 0] * (keys @ xi)).exp()
            total = weights.sum() + (attention.sink[h].exp() if getattr(attention, "sink", None) is not None else 0)
            o.append(weights / total @ v[cache, h // group])
        outputs.append(torch.stack(o))
    return through(attention, outputs, x)


def linear_by_tokens(linear: Attention, x: Tensor) -> Tensor:
    q, k, v = qkv_heads(linear, x)
    q, k = (torch.where(part > 0, part + 1, part.exp()) for part in (q, k))
    S, z, outputs = torch.zeros(2, 8, 8, dtype=x.dtype), torch.zeros(2, 8, dtype=x.dtype), []
    for t in range(len(x)):
        S, z = S + torch.einsum("hk,hv->hkv", k[t], v[t]), z + k[t]
        o = torch.einsum("hk,hkv->hv", q[t], S)
        divided = linear.norm is None
        outputs.append(o / ((q[t] * z).sum(-1, keepdim=True) + 1e-6) if divided else rms_norm(o, linear.norm.weight))
    return through(linear, outputs, x)


def delta_by_tokens(delta: Attention, x: Tensor) -> Tensor:
    """DeltaNet and GatedDeltaNet."""
    K, V = delta.head_dim, delta.norm.weight.numel()
    q, k, v = (heads(part, 2) for part in silu(convolved(delta, x)).split([2 * K, 2 * K, 2 * V], -1))
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    beta, alpha = torch.sigmoid(x @ delta.beta.weight.T + delta.beta.bias), torch.ones(len(x), 2, dtype=x.dtype)
    beta = 2 * beta if delta.allow_neg_eigval else beta
    if hasattr(delta, "decay"):
        alpha = torch.exp(-delta.log_rate.exp() * F.softplus(x @ delta.decay.weight.T + delta.decay.bias))
    gate = torch.ones(len(x), 2 * V, dtype=x.dtype) if delta.gate is None else silu(x @ delta.gate.weight.T)
    S, outputs = torch.zeros(2, K, V, dtype=x.dtype), []
    for t in range(len(x)):
        S = alpha[t, :, None, None] * S
        wrong = v[t] - torch.einsum("hk,hkv->hv", k[t], S)
        S = S + beta[t, :, None, None] * torch.einsum("hk,hv->hkv", k[t], wrong)
        outputs.append(rms_norm(torch.einsum("hk,hkv->hv", q[t], S), delta.norm.weight) * heads(gate, 2)[t])
    return through(delta, outputs, x)


def gau_by_tokens(gau: Attention, x: Tensor) -> Tensor:
    C, u, v, z = gau.chunk_size, *(silu(x @ part.weight.T) for part in (gau.u, gau.v, gau.z))
    q, k, q_lin, k_lin = (scale * z + offset for scale, offset in zip(gau.scale, gau.offset, strict=True))
    turn, outputs = rotated if gau.rope else lambda row, _: row, []
    far = turn if gau.published else lambda row, _: row
    bias = gau.bias if gau.published else torch.zeros(C, dtype=x.dtype)
    for t in range(len(x)):
        first = t // C * C
        scores = [turn(q[t], t) @ turn(k[j], j) / C + bias[t - j] for j in range(first, t + 1)]
        o = sum(score.clamp(min=0) ** 2 * v[first + i] for i, score in enumerate(scores))
        for j in range(first):
            o = o + far(q_lin[t], t) @ far(k_lin[j], j) / first * v[j]
        outputs.append(u[t] * o @ gau.out.weight.T)
    return torch.stack(outputs)


def bsbr_by_tokens(bsbr: Attention, x: Tensor) -> Tensor:
    q, k, v = qkv_heads(bsbr, x)
    (T, H, K), C, outputs = q.shape, bsbr.chunk_size, []
    unit, eps = k, 1e-5
    if bsbr.normalize:
        centred = k - k.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() / K**0.5
    down, up = (getattr(bsbr, name, torch.eye(K, dtype=x.dtype).expand(H, K, K)) for name in ("down", "up"))
    turn = rotated if bsbr.rope else lambda row, _: row
    for t in range(T):
        first = t // C * C
        start, o = max(0, t - C + 1) if bsbr.overlap else first, []
        asking = t // bsbr.route_every * bsbr.route_every
        r = heads(x[asking] @ bsbr.chunk_query.weight.T[None], H)[0]
        for h in range(H):
            scores = [turn(q[t, h], t) @ turn(k[j, h], j) / K**0.5 for j in range(start, t + 1)]
            local = torch.stack(scores).softmax(0) @ v[start : t + 1, h]
            chunks = [slice(a, a + C) for a in range(0, first, C)]
            means = [heads(x[c].mean(0) @ bsbr.chunk_key.weight.T[None], H)[0, h] for c in chunks]
            scores = [r[h] @ mean / bsbr.router_dim**0.5 for mean in means]
            best = sorted(range(len(chunks)), key=lambda i: -scores[i])[: bsbr.retrieval_top_k]
            total = sum((scores[i].exp() for i in best), start=torch.tensor(float(bsbr.normalize)))
            m = torch.zeros_like(local)
            for i in best:
                state = unit[chunks[i], h].T @ v[chunks[i], h] @ down[h]
                m = m + scores[i].exp() / total * (q[t, h] @ state @ up[h])
            o.append(local + (bsbr.gain[h, 0, 0] * m / (1 + m.square().mean()).sqrt() if bsbr.normalize else m))
        outputs.append(torch.stack(o))
    return through(bsbr, outputs, x)


FORMULAS = {
    **dict.fromkeys(("standard", "sliding_window", "hopfield"), softmax_by_tokens),
    **{"linear": linear_by_tokens, "delta_net": delta_by_tokens, "gated_delta_net": delta_by_tokens},
    **{"gau": gau_by_tokens, "bsbr": bsbr_by_tokens},
}
OWN = [variant for variant in VARIANTS if variant[0] in FORMULAS]


@pytest.mark.parametrize(("name", "options"), OWN, ids=[f"{name}{options or ''}" for name, options in OWN])
def test_it_is_its_formula(name, options):
    attention, x = build(name, options), sequence(T, batch=1)
    expected = FORMULAS[name](attention, x[0])
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-10, atol=1e-10)
    own, truth = (
        torch.autograd.grad(y.square().sum(), list(attention.parameters()), allow_unused=True)
        for y in (attention(x), expected)
    )
    torch.testing.assert_close(own, truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "gla", "mamba2", "log_linear", "fox"])
def test_a_decay_that_forgets_all_overflows_nothing(name):
    """Decays of exp(-30) a token: over a chunk of 64 tokens, exp(1920) would be infinite in fp64."""
    attention, x = build(name, {"chunk_size": 64}), sequence(130)
    (decay,) = (
        part
        for n, part in attention.named_parameters()
        if n in ("decay.bias", "decay.1.bias", "dt.bias", "forget.bias")
    )
    with torch.no_grad():
        decay.fill_(30.0 if name in ("gated_delta_net", "kda", "mamba2", "log_linear") else -30.0)
    y = attention(x)
    torch.testing.assert_close(y, attention.emit(attention.attention_map(x) @ attention.values(x), x))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), list(attention.parameters())))
