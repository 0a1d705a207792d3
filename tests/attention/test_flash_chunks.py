"""Attention to chosen chunks by FlashAttention: its sorting and sums on a CPU, with FlashAttention written out, and all
of it on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from test_kernels import build, sequence
from test_law import assert_close, assert_near_truth
from torch import Tensor

from bsbr_pl.attention import flash_chunks, kernels, softmax

# (B, H, T, S, C)
SIZES = [(1, 1, 1, 0, 1), (2, 3, 5, 0, 8), (2, 3, 8, 1, 8), (2, 3, 29, 2, 8), (2, 2, 24, 3, 8), (3, 2, 40, 2, 7)]


def scores_of(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT * q.shape[1] ** -0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf) if causal else scores


def slices(packed: flash_chunks.Packed) -> list[tuple[slice, slice]]:
    """The rows of queries and keys of each sequence, within the bounds of both."""
    found = []
    for i in range(len(packed.borders_q) - 1):
        queries, keys = (slice(*borders[i : i + 2].tolist()) for borders in (packed.borders_q, packed.borders_k))
        assert 0 <= queries.stop - queries.start <= packed.max_q
        assert 0 < keys.stop - keys.start <= packed.max_k
        found.append((queries, keys))
    return found


def plain_forward(q: Tensor, k: Tensor, v: Tensor, packed: flash_chunks.Packed) -> tuple[Tensor, Tensor]:
    """`_forward` by its definition. Rows of no sequence are NaN: they may be anything."""
    out, lse = torch.full_like(q, torch.nan), torch.full_like(q[None, :, 0, 0], torch.nan)
    for queries, keys in slices(packed):
        scores = scores_of(q[queries, 0], k[keys, 0], packed.causal)
        out[queries, 0], lse[0, queries] = scores.softmax(1) @ v[keys, 0], scores.logsumexp(1)
    return out, lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: flash_chunks.Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """`_backward` by its definition, from the given output and log-sum-exp."""
    dq, dk, dv = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    for queries, keys in slices(packed):
        g, q_i, k_i, v_i = grad[queries, 0], q[queries, 0], k[keys, 0], v[keys, 0]
        weights = (scores_of(q_i, k_i, packed.causal) - lse[0, queries, None]).exp()
        delta = (g * out[queries, 0]).sum(1, keepdim=True)
        of_scores = weights * (g @ v_i.mT - delta) * q.shape[2] ** -0.5
        dq[queries, 0], dk[keys, 0], dv[keys, 0] = of_scores @ k_i, of_scores.mT @ q_i, weights.mT @ g
    return dq, dk, dv


@pytest.fixture
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_chunks, "_forward", plain_forward)
    monkeypatch.setattr(flash_chunks, "_backward", plain_backward)


def example(B: int, H: int, T: int, S: int, C: int, K: int = 8) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, and chunks chosen at random, of which the earlier ones exist, but for one in five."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = torch.randn(3, B, H, T, K, generator=generator)
    order = torch.rand(B, H, T, max(T // C, 1), generator=generator).argsort(-1)
    chosen = order[..., :S]
    exists = (chosen < torch.arange(T)[:, None] // C) & (torch.rand(B, H, T, S, generator=generator) < 0.8)
    return [2 * q, 2 * k, v], chosen, exists


def outcome(form, parts: list[Tensor], *rest) -> dict[str, Tensor]:
    """The output of a form, and the gradients of a fixed random function of it."""
    parts = [part.detach().requires_grad_() for part in parts]
    output = form(*parts, *rest)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    gradients = torch.autograd.grad((output * weights).sum(), parts)
    return {"output": output.detach(), **dict(zip(("gradient of q", "of k", "of v"), gradients, strict=True))}


def by_operator(q: Tensor, k: Tensor, v: Tensor, C: int, chosen: Tensor, exists: Tensor) -> Tensor:
    return flash_chunks.chosen_chunks(q, k, v, chosen, exists, C)[0]


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_parts_are_the_whole_softmax(sizes):
    parts, chosen, exists = example(*sizes)
    rest = sizes[4], chosen, exists
    expected = outcome(softmax.chosen_attention, [part.double() for part in parts], *rest)
    assert_close(outcome(by_operator, parts, *rest), expected, 1e-5)


@pytest.mark.usefixtures("_plain")
def test_parts_in_other_orders_in_memory():
    """Views as heads are split: (B, T, H, K) with the axes of T and H exchanged; and a gradient of that kind."""
    parts, chosen, exists = example(2, 3, 29, 2, 8)
    views = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    for form in (by_operator, lambda *inputs: by_operator(*inputs).transpose(1, 2).flatten(2)):
        assert_close(outcome(form, views, 8, chosen, exists), outcome(form, parts, 8, chosen, exists), 1e-6)


@pytest.mark.usefixtures("_plain")
def test_no_pair_exists():
    parts, chosen, exists = example(2, 2, 24, 2, 8)
    none = torch.zeros_like(exists)
    expected = outcome(softmax.chosen_attention, [part.double() for part in parts], 8, chosen[..., :0], none[..., :0])
    assert_close(outcome(by_operator, parts, 8, chosen, none), expected, 1e-5)


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize("sizes", [(2, 3, 5, 0, 5), (2, 3, 29, 2, 8)], ids=str)
def test_what_torch_asks_of_an_operator(sizes):
    parts, chosen, exists = example(*sizes)
    inputs = [part.requires_grad_() for part in parts]
    torch.library.opcheck(flash_chunks.chosen_chunks, (*inputs, chosen, exists, sizes[4]))


def test_arguments_of_flash_attention(monkeypatch):
    """By the names that torch gives them."""
    calls = {}

    def recorder(name):
        names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]

        def call(*given):
            calls[name] = dict(zip(names, given, strict=False))
            return [None] * 5

        return call

    names = ("_flash_attention_forward", "_flash_attention_backward")
    monkeypatch.setattr(flash_chunks, "aten", SimpleNamespace(**{name: recorder(name) for name in names}))
    grad, q, k, v, out, lse, borders_q, borders_k = torch.arange(8)
    packed = flash_chunks.Packed(borders_q, borders_k, 3, 4, True)
    flash_chunks._forward(q, k, v, packed)
    flash_chunks._backward(grad, q, k, v, out, lse, packed)
    of_both = {"query": q, "key": k, "value": v, "cum_seq_q": borders_q, "cum_seq_k": borders_k}
    of_both |= {"max_q": 3, "max_k": 4, "dropout_p": 0.0, "is_causal": True}
    forward, backward = (calls[name] for name in names)
    assert forward == of_both | {"return_debug_mask": False}
    kept = {key: value for key, value in backward.items() if key not in ("rng_state", "unused")}
    assert kept == of_both | {"grad_out": grad, "out": out, "logsumexp": lse}


@pytest.mark.parametrize(
    ("tokens", "keys", "width_v", "fits"), [(8, 8, 8, True), (7, 8, 8, False), (8, 8, 16, False), (1, 1, 8, True)]
)
def test_when_it_runs(monkeypatch, tokens, keys, width_v, fits):
    """From the first token on, with values as wide as keys; and never in more sequences than CUDA allows."""
    monkeypatch.setattr(kernels, "low_precision", lambda x: torch.float32)
    monkeypatch.setattr(kernels, "HAS_WINDOW", True)
    monkeypatch.setattr(kernels.softmax, "chosen_attention", lambda *given: "plain")
    monkeypatch.setattr(flash_chunks, "chosen_chunks", lambda *given: ("flash",))
    q, k, v = torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, keys, 8), torch.zeros(1, 2, keys, width_v)
    assert kernels.chosen_attention(q, k, v, 4, None, None) == ("flash" if fits else "plain")
    monkeypatch.setattr(flash_chunks, "SEQUENCES", 1)
    assert kernels.chosen_attention(q, k, v, 4, None, None) == "plain"


def test_the_plain_form_runs_without_a_gpu():
    parts, chosen, exists = example(2, 3, 29, 2, 8)
    expected = softmax.chosen_attention(*parts, 8, chosen, exists)
    assert torch.equal(kernels.chosen_attention(*parts, 8, chosen, exists), expected)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("K", [8, 64, 128])
@pytest.mark.parametrize("sizes", [*SIZES, (2, 3, 300, 2, 64), (2, 2, 1024, 15, 64), (1, 2, 1000, 3, 200)], ids=str)
def test_chosen_attention_on_a_gpu(sizes, K, dtype):
    """Against the plain form in fp64 with the same numbers, and the same chunks chosen."""
    parts, *choice = example(*sizes, K)
    parts = [(part / 2).to("cuda", dtype) for part in parts]
    rest = sizes[4], *(part.cuda() for part in choice)
    expected = outcome(softmax.chosen_attention, [part.double() for part in parts], *rest)
    found = outcome(kernels.chosen_attention, parts, *rest)
    assert found["output"].dtype == dtype, "the kernel did not run"
    assert_close(found, expected, 2e-2)


@on_a_gpu
@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_the_law_on_a_gpu(name, T):
    assert_near_truth(build(name, {}, torch.bfloat16, "cuda"), sequence(T, torch.bfloat16, "cuda"))


@on_a_gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_on_a_gpu():
    parts, chosen, exists = example(2, 3, 300, 2, 64, 64)
    parts, rest = [part.to("cuda", torch.bfloat16) for part in parts], (64, chosen.cuda(), exists.cuda())
    compiled = torch.compile(kernels.chosen_attention, fullgraph=True)
    assert_close(outcome(compiled, parts, *rest), outcome(kernels.chosen_attention, parts, *rest), 1e-2)
