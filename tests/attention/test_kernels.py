"""The kernels for CUDA in low precision: their arithmetic against `mix` on a CPU, and the law on a GPU.

On a CPU, the Triton kernels run only in Triton's interpreter: install Triton and set TRITON_INTERPRET=1.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_chunk_ops import INTERPRETED, numbers
from test_law import assert_near_truth
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bsbr_pl.attention import ARCHITECTURES, Attention, chunk_kernels, kernels, ops, softmax
from bsbr_pl.attention.mamba2 import Mamba2Attention
from bsbr_pl.attention.parts import DepthwiseConvolution, convolve_by_taps, rotary, rotate_real

KERNELS = {
    "linear": kernels.linear_kernel,
    "delta_net": kernels.delta_rule_kernel,
    "gated_delta_net": kernels.gated_delta_rule_kernel,
    "gated_delta_product": chunk_kernels.gated_delta_product_kernel,
    "gau": kernels.gau_kernel,
    "retnet": chunk_kernels.retnet_kernel,
    "mamba2": chunk_kernels.mamba2_kernel,
    "gla": chunk_kernels.gla_kernel,
    "kda": chunk_kernels.kda_kernel,
    "rwkv7": chunk_kernels.rwkv7_kernel,
}
CASES = [
    *((name, {}) for name in KERNELS),
    ("linear", {"output_norm": "rms"}),
    ("gau", {"published": True, "chunk_size": 64}),
    ("delta_net", {"head_dim": 32, "expand_v": 0.5, "output_gate": True}),
    ("gated_delta_net", {"head_dim": 16, "expand_v": 2.0, "allow_neg_eigval": True}),
    ("gated_delta_product", {"num_steps": 3, "forget_gate": False}),
    ("gla", {"tied_keys": True}),
    ("gla", {"expand_k": 0.5}),
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}{o or ''}" for n, o in CASES])
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # Triton's interpreter


def build(name: str, options: dict, dtype: torch.dtype, device: str = "cpu") -> Attention:
    torch.manual_seed(1)
    attention = ARCHITECTURES[name](128, 2, **options)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention.to(device, dtype)


def sequence(T: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(2, T, 128, generator=torch.Generator().manual_seed(T)).to(device, dtype)


def parts_of(attention: Attention, x: Tensor) -> list[Tensor]:
    """What `mix` is given."""
    if not hasattr(attention, "project"):  # GAU
        return [attention.shared(x), attention.values(x)[:, 0]]
    parts = list(attention.project(x)[:-1])
    if isinstance(attention, Mamba2Attention):
        q, k, v, dt, log_alpha = parts
        return [q, k, dt * v, log_alpha]
    return parts


def kernel_of(name: str, attention: Attention, options: dict) -> Callable:
    """The kernel with the options of this attention, if it has any."""
    given = {
        "gau": lambda: (attention.views, attention.inside, attention.chunk_size),
        "retnet": lambda: (attention.log_gamma(torch.device("cpu")),),
    }.get(name, tuple)()
    kernel = partial(KERNELS[name], *given, torch.float32)
    return partial(kernel, divide=False) if "output_norm" in options else kernel


def state_before(name: str, attention: Attention) -> tuple[list[Tensor], dict[str, int]]:
    """What `mix` is given to continue after two chunks of GAU, four of the others: tensors and options."""
    state = attention.prefill(sequence(256, torch.float32))[1]
    if name == "gau":
        return [state.kv], {"finished": state.finished}
    return [part for part in state[: 2 if name == "linear" else 1] if part is not None], {}


@pytest.mark.parametrize("start", [False, True], ids=["", "from a state"])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@each_case
def test_a_kernel_computes_what_mix_does(name, options, T, start):
    """In fp32 on a CPU: mixed values, states, and the gradients of both by everything that is mixed."""
    if "delta" in name and not INTERPRETED:
        pytest.skip("needs Triton and TRITON_INTERPRET=1")
    attention = build(name, options, torch.float32)
    found = []
    for form in ("kernel", "mix"):
        before, past = state_before(name, attention) if start else ([], {})
        inputs = [*parts_of(attention, sequence(T, torch.float32)), *before]
        parts = [part.detach().requires_grad_() for part in inputs]
        mix = attention.mix if form == "mix" else kernel_of(name, attention, options)
        outputs = mix(*parts, **past)
        outputs = [output for output in outputs if output is not None]
        loss = sum(
            (output * torch.linspace(-1, 1, output[0].numel()).view(output[0].shape)).sum() for output in outputs
        )
        found.append([*outputs, *torch.autograd.grad(loss, parts)])
    sizes = [expected.square().mean().sqrt() for expected in found[1]]
    for own, expected, size in zip(*found, sizes, strict=True):
        error = (own - expected).square().mean().sqrt() / max(size, 1e-2 * max(sizes))
        assert error < 2e-5, f"relative error {error:.2e}"


DECAYING = {"retnet": None, "mamba2": 3, "gla": 2, "kda": 4, "rwkv7": None}  # where `mix` takes log alpha, if learned


@pytest.mark.parametrize("name", DECAYING)
def test_prefill_takes_the_kernel_in_bf16(monkeypatch, name):
    """Its own call of `choose`, products in bf16, and a state to continue from; in fp16 the plain form runs."""
    attention, x = build(name, {}, torch.float32), sequence(130, torch.float32)
    expected, last = attention.prefill(x)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "low_precision", lambda x: torch.float16)
    assert torch.equal(attention.prefill(x)[0], expected)
    monkeypatch.setattr(kernels, "low_precision", lambda x: torch.bfloat16)
    outputs, state = [], None
    for part in x.split([70, 60], 1):
        output, state = attention.prefill(part, state)
        outputs.append(output)
    assert state.S.dtype == torch.float32
    for found, exact in ((torch.cat(outputs, 1), expected), (state.S, last.S)):
        error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 1e-4 < error < 1e-2, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", ["mamba2", "gla", "kda"])
def test_tokens_that_forget_everything(name):
    """They cost the slow decays after them no more than bf16 would, and nothing overflows."""
    attention = build(name, {}, torch.float32)
    parts = [part.detach().clone() for part in parts_of(attention, sequence(130, torch.float32))]
    parts[DECAYING[name]][:, :, 5:20] = -1e4
    inputs = [part.requires_grad_() for part in parts]
    found, exact = (mix(*inputs)[0] for mix in (kernel_of(name, attention, {}), attention.mix))
    assert (found - exact).square().mean().sqrt() < 1e-3 * exact.square().mean().sqrt()
    for own, expected in zip(*(torch.autograd.grad(mixed.sum(), inputs) for mixed in (found, exact)), strict=True):
        assert own.isfinite().all()
        assert (own - expected).square().mean().sqrt() < 5e-3 * max(1.0, float(expected.square().mean().sqrt()))


@pytest.mark.parametrize(("width", "fits"), [(8, True), (12, False), (64, True), (256, True), (264, False)])
def test_widths_of_flash_attention(monkeypatch, width, fits):
    monkeypatch.setattr(kernels, "HAS_WINDOW", True)
    assert kernels.has_window(width) == fits
    monkeypatch.setattr(kernels, "HAS_WINDOW", False)
    assert not kernels.has_window(width)


def test_products_before_are_sums():
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    before, total = kernels.products_before(x, dim=1)
    torch.testing.assert_close(before, torch.stack([x[:, :n].sum(1) for n in range(5)], 1))
    torch.testing.assert_close(total, x.sum(1))
    many = torch.randn(1, 1500, 2, 2, generator=torch.Generator().manual_seed(1))  # by `cumsum`
    before, total = kernels.products_before(many, dim=1)
    torch.testing.assert_close(before[:, 1400], many[:, :1400].sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, many.sum(1))


@pytest.mark.parametrize("backwards", [False, True])
def test_sums_before(backwards):
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    start = torch.randn(2, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before, total = ops.sums_before(x, start, backwards)
    sides = [slice(n + 1, None) if backwards else slice(n) for n in range(5)]
    expected = start[:, None] + torch.stack([x[:, side].sum(1) for side in sides], 1)
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(total, start + x.sum(1))
    if not backwards:
        weights, of_total = torch.randn(2, 5, 7), torch.randn(2, 7)
        loss = (before * weights).sum() + (total * of_total).sum()
        truth = (expected * weights).sum() + ((start + x.sum(1)) * of_total).sum()
        own, right = (torch.autograd.grad(value, (x, start)) for value in (loss, truth))
        torch.testing.assert_close(own, right)
        torch.library.opcheck(ops.sums_before, (x,))
        torch.library.opcheck(ops.sums_before, (x, start))
    if INTERPRETED:
        from bsbr_pl.attention import triton_recurrence

        long = torch.randn(2, 70, 200, generator=torch.Generator().manual_seed(2))
        start = long[:, 0].contiguous()
        found, kept = triton_recurrence.sums_before(long, start, backwards), ops.sums_before(long, start, backwards)
        for own, plain in zip(found, kept, strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize(("shape", "V"), [((2, 70, 3, 16), 32), ((1, 330, 1, 32), 32)])
def test_the_delta_rule_over_groups_of_chunks(monkeypatch, shape, V, decays, started):
    """The recurrence in one level and in two, with groups of unequal size, from zeros and from a state; and opcheck."""
    from bsbr_pl.attention import triton_recurrence

    B, _, H, K = shape
    q, k = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    v, weights = torch.randn(2, *shape[:3], V, generator=torch.Generator().manual_seed(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    chance, beta = torch.rand(2, *shape[:3], generator=torch.Generator().manual_seed(1))
    start = torch.randn(B, H, V, K, generator=torch.Generator().manual_seed(2)) if started else None
    given = (q, k, v, 2 * beta, 0.1 * chance.log() if decays else None, start)
    inputs = [x if x is None else x.requires_grad_() for x in given]
    learned = [x for x in inputs if x is not None]
    found = []
    for least in (1000, 1):
        monkeypatch.setattr(triton_recurrence, "LONG", least)
        mixed, last, *_ = ops.delta_rule(*inputs)
        loss = (mixed * weights).sum() + last.square().sum()
        found.append([mixed, last, *torch.autograd.grad(loss, learned)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))
    torch.library.opcheck(ops.delta_rule, tuple(inputs))


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_the_compiler_knows_the_shapes_of_the_delta_rule(tokens, chunks):
    """It allocates from them. Chunks have 64 tokens; what is kept for the gradient is per chunk and head."""
    with FakeTensorMode():
        q, k, v = torch.empty(3, 2, tokens, 3, 16)
        shapes = [tuple(part.shape) for part in ops.delta_rule(q, k, v, torch.empty(2, tokens, 3), None)]
    assert shapes == [(2, tokens, 3, 16), (2, 3, 16, 16), (6, chunks, 64, 64), (6, chunks, 16, 16)]


@pytest.mark.parametrize(("start", "base"), [(0, 10_000.0), (5, 10_000.0), (5, 100.0)])
def test_real_rotary_positions_are_the_complex_ones(start, base):
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    table = ops.rotary_table(torch.arange(start, start + 7).float(), 8, base)
    own, expected = rotate_real(x, table), rotary(x, start, base)
    torch.testing.assert_close(own, expected)
    exact = ops.rotary_table(torch.arange(start, start + 7).double(), 8, base)
    torch.testing.assert_close(rotate_real(x.double(), exact), rotary(x.double(), start, base), rtol=0, atol=1e-13)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (found,), (truth,) = (torch.autograd.grad((y * weights).sum(), x) for y in (own, expected))
    torch.testing.assert_close(found, truth)


def test_options_of_rotary_positions():
    """Half of the channels, and positions that end at 3: by the same function without these options."""
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    half = rotary(x, 2, fraction=0.5)
    torch.testing.assert_close(half, torch.cat((rotary(x[..., :4], 2), x[..., 4:]), -1), rtol=0, atol=0)
    assert torch.equal(rotary(x, 2, fraction=0.0), x)
    ended = rotary(x, 2, last=3)
    torch.testing.assert_close(ended[:, :, :2], rotary(x, 2)[:, :, :2])
    for t in range(2, 7):
        torch.testing.assert_close(ended[:, :, t : t + 1], rotary(x[:, :, t : t + 1], 3))


def test_shapes_of_the_delta_rule_are_known_without_a_gpu():
    """What torch.compile plans with: results, then gradients."""
    B, T, H, K, V = 2, 130, 3, 16, 32
    with FakeTensorMode():
        q, k, v, beta = (torch.empty(B, T, *shape) for shape in ((H, K), (H, K), (H, V), (H,)))
        mixed, last, inverses, states = found = ops.delta_rule(q.bfloat16(), k.bfloat16(), v.bfloat16(), beta, beta)
        gradients = ops.delta_rule_backward(mixed, last, inverses, states, q, k, v, beta, beta)
    assert [tuple(one.shape) for one in found] == [(B, T, H, V), (B, H, V, K), (B * H, 3, 64, 64), (B * H, 3, V, K)]
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    shapes = [(B, H, V, K), *(tuple(one.shape) for one in (q, k, v, beta, beta))]
    assert [tuple(one.shape) for one in gradients] == shapes


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_gated_delta_product_is_the_gated_delta_rule_over_its_rows(num_steps, monkeypatch):
    """Without Triton: the plain form of the gated delta rule takes the place of its kernel."""
    rule = build("gated_delta_net", {}, torch.float64).mix
    monkeypatch.setattr(chunk_kernels, "gated_delta_rule_kernel", lambda low, *given: rule(*given))
    attention = build("gated_delta_product", {"num_steps": num_steps}, torch.float64)
    S = attention.prefill(sequence(20, torch.float64))[1].S
    parts = parts_of(attention, sequence(33, torch.float64))
    found = chunk_kernels.gated_delta_product_kernel(torch.float64, *parts, S)
    torch.testing.assert_close(found, attention.mix(*parts, S))


def test_the_operator_of_exact_products():
    """Also under autocast, and with batches that broadcast."""
    a, b = (x.requires_grad_() for x in (numbers(2, 1, 3, 4), numbers(5, 4, 6, seed=1)))
    torch.library.opcheck(ops.exact_product, (a, b))
    weights = numbers(2, 5, 3, 6, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.exact_product(a, b)
    expected = a @ b
    own, truth = (torch.autograd.grad((product * weights).sum(), (a, b)) for product in (found, expected))
    torch.testing.assert_close([found, *own], [expected, *truth])


def test_unit_vectors_keep_only_their_result_in_low_precision(monkeypatch):
    x, weights = numbers(3, 5, 64).requires_grad_(), numbers(3, 5, 64, seed=1)
    expected = torch.nn.functional.normalize(x, dim=-1)
    (truth,) = torch.autograd.grad((expected * weights).sum(), x, retain_graph=True)
    exact = ops.UnitVectors.apply(x, x.dtype)
    torch.testing.assert_close([exact, *torch.autograd.grad((exact * weights).sum(), x)], [expected, truth])

    monkeypatch.setattr(kernels, "low_precision", lambda x: torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        found = kernels.unit_vectors(x)
    assert [(part.dtype, part.shape) for part in kept] == [(torch.bfloat16, x.shape), (x.dtype, (3, 5, 1))]
    torch.testing.assert_close(found, expected)
    (own,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(own, truth, rtol=0, atol=2**-8 * truth.abs().max().item())
    zeros = torch.zeros(2, 4, requires_grad=True)
    assert torch.equal(kernels.unit_vectors(zeros), zeros)


def test_shifted_products_are_the_convolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 6, generator=generator).requires_grad_()
    weight = torch.randn(6, 1, 4, generator=generator).requires_grad_()
    cotangent = torch.randn(2, 9, 6, generator=generator)
    for own, expected in zip(
        *(
            (form(x, weight), *torch.autograd.grad(form(x, weight), (x, weight), cotangent))
            for form in (convolve_by_taps, DepthwiseConvolution.apply)
        ),
        strict=True,
    ):
        torch.testing.assert_close(own, expected)


def packed_attention(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size):
    """What FlashAttention computes of packed sequences whose queries are their last tokens: (rows, H, K)."""
    back, forward = window_size
    assert forward == 0
    mixed = []
    for i in range(len(ends_q) - 1):
        own = slice(*ends_q[i : i + 2].tolist())
        seen = slice(*ends_k[i : i + 2].tolist())
        assert own.stop - own.start <= max_q
        assert seen.stop - seen.start <= max_k
        parts = [part.transpose(0, 1)[None] for part in (q[own], k[seen], v[seen])]
        if back < 0:
            of_one = softmax.causal_attention(*parts, scale=scale)
        else:
            assert scale is None
            of_one = softmax.window_attention(*parts, back + 1)
        mixed.append(of_one[0].transpose(0, 1))
    return torch.cat(mixed)


def test_what_flash_attention_is_given(monkeypatch):
    """Queries after earlier keys, and windows, on a CPU."""
    monkeypatch.setattr(kernels, "low_precision", lambda x: torch.float32)
    monkeypatch.setattr(kernels, "HAS_WINDOW", True)
    monkeypatch.setattr(kernels, "varlen_attn", packed_attention)
    q, k, v = numbers(2, 3, 5, 8), numbers(2, 3, 12, 8, seed=1), numbers(2, 3, 12, 8, seed=2)
    found = kernels.causal_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(found, softmax.causal_attention(q, k, v, scale=0.5))
    q = numbers(2, 3, 12, 8, seed=3)
    found = kernels.window_attention(q, k, v, 4)
    torch.testing.assert_close(found, softmax.window_attention(q, k, v, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fox_reads_earlier_pieces_on_a_gpu():
    """More tokens than the queries of one piece; in fp64 the plain form has pieces of 512."""
    attention, x = build("fox", {}, torch.bfloat16, "cuda"), sequence(4200, torch.bfloat16, "cuda")
    truth = attention.double()(x.double())
    error = (attention.bfloat16()(x).double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 8e-3


def test_windows_stay_with_the_block_form_without_a_gpu():
    q, k, v = torch.randn(3, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    age = torch.arange(40)[:, None] - torch.arange(40)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < 7))
    torch.testing.assert_close(kernels.window_attention(q, k, v, 7), expected)


def test_kernels_are_chosen_on_cuda_in_low_precision_alone(monkeypatch):
    def chosen(is_cuda: bool, dtype: torch.dtype, fits: bool = True) -> str:
        x = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
        return kernels.choose(x, lambda low: f"kernel in {low}", lambda: "mix", fits)()

    assert chosen(True, torch.bfloat16) == "kernel in torch.bfloat16"
    assert chosen(True, torch.bfloat16, fits=False) == "mix"
    assert chosen(True, torch.float32) == chosen(True, torch.float64) == chosen(False, torch.bfloat16) == "mix"
    with monkeypatch.context() as autocast:  # torch will not enter one without a GPU
        autocast.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert chosen(True, torch.float32) == "kernel in torch.float16"  # what it is until it is set


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
@pytest.mark.parametrize(("name", "options"), [("sliding_window", {}), ("bsbr", {}), *CASES])
def test_kernels_keep_the_law_on_a_gpu(name, options, T):
    assert_near_truth(build(name, options, torch.bfloat16, "cuda"), sequence(T, torch.bfloat16, "cuda"))
