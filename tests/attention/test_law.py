"""The law of base.py: definition, fast form, continued prefill and decoding give the same outputs and gradients."""

import copy
import inspect

import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES, Attention
from bsbr_pl.attention.parts import at_least_fp32

C = 8  # chunk, window
WIDTH = 16
NOISE = 0.2
LENGTHS = [1, C - 1, C, C + 1, 2 * C + 3, 4 * C + 1]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 8e-3}

# Every option with at least two values; the first entry of an architecture is its default form at test size.
VARIANTS = [
    ("standard", {}),
    ("standard", {"rope": False}),
    ("standard", {"bias": True}),
    ("standard", {"conv_size": 4}),
    ("standard", {"rope_base": 100.0, "rope_fraction": 0.5, "output_gate": True}),
    ("standard", {"rope_fraction": 0.0, "sink": True, "bias": True}),
    ("standard", {"qk_norm": True, "num_kv_heads": 1, "conv_size": 4}),
    ("standard", {"qk_norm": True, "num_kv_heads": 1, "sink": True, "output_gate": True}),
    ("sliding_window", {"window_size": C}),
    ("sliding_window", {"window_size": 5}),
    ("sliding_window", {"window_size": 1}),
    ("sliding_window", {"window_size": C, "rope": False}),
    ("sliding_window", {"window_size": C, "bias": True}),
    ("sliding_window", {"window_size": C, "conv_size": 4}),
    ("sliding_window", {"window_size": C, "num_sinks": 2}),
    ("sliding_window", {"window_size": 5, "num_sinks": 9, "conv_size": 4, "rope_base": 100.0, "rope_fraction": 0.5}),
    ("sliding_window", {"window_size": 1, "num_sinks": 1, "qk_norm": True, "num_kv_heads": 1}),
    ("sliding_window", {"window_size": 5, "num_sinks": 2, "rope": False, "num_kv_heads": 1}),
    ("sliding_window", {"window_size": 5, "conv_size": 4, "qk_norm": True, "output_gate": True}),
    ("linear", {"chunk_size": C}),
    ("linear", {"chunk_size": 3}),
    ("linear", {"chunk_size": C, "conv_size": 1}),
    ("linear", {"chunk_size": C, "output_norm": "rms"}),
    ("delta_net", {"chunk_size": C}),
    ("delta_net", {"chunk_size": 3}),
    ("delta_net", {"chunk_size": C, "conv_size": 1}),
    ("delta_net", {"chunk_size": C, "allow_neg_eigval": True}),
    ("delta_net", {"chunk_size": C, "head_dim": 6, "expand_v": 1.5, "output_gate": True}),
    ("gated_delta_net", {"chunk_size": C}),
    ("gated_delta_net", {"chunk_size": 3}),
    ("gated_delta_net", {"chunk_size": C, "conv_size": 1}),
    ("gated_delta_net", {"chunk_size": C, "allow_neg_eigval": True}),
    ("gated_delta_net", {"chunk_size": C, "head_dim": 6, "expand_v": 2.0, "decay_init": "random"}),
    ("gated_delta_product", {"chunk_size": C}),
    ("gated_delta_product", {"chunk_size": 3, "num_steps": 3, "forget_gate": False}),
    ("gated_delta_product", {"chunk_size": C, "conv_size": 1, "num_steps": 1, "allow_neg_eigval": False}),
    ("retnet", {"chunk_size": C}),
    ("retnet", {"chunk_size": 3, "expand_v": 0.5}),
    ("retnet", {"chunk_size": C, "conv_size": 4, "expand_v": 1.0}),
    ("gla", {"chunk_size": C}),
    ("gla", {"chunk_size": 3}),
    ("gla", {"chunk_size": C, "conv_size": 1, "expand_k": 0.5, "gate_rank": 3}),
    ("gla", {"chunk_size": C, "tied_keys": True}),
    ("mamba2", {"chunk_size": C, "key_dim": 8}),
    ("mamba2", {"chunk_size": 3, "key_dim": 5}),
    ("mamba2", {"chunk_size": C, "key_dim": 8, "conv_size": 1, "expansion_factor": 1}),
    ("log_linear", {"chunk_size": C, "key_dim": 8}),
    ("log_linear", {"chunk_size": 3, "key_dim": 5, "num_levels": 2}),
    ("log_linear", {"chunk_size": C, "key_dim": 8, "conv_size": 1, "expansion_factor": 1, "num_levels": 1}),
    ("kda", {"chunk_size": C}),
    ("kda", {"chunk_size": 3}),
    ("kda", {"chunk_size": C, "conv_size": 1, "allow_neg_eigval": True}),
    ("rwkv7", {"chunk_size": C}),
    ("rwkv7", {"chunk_size": 3, "rank": 3}),
    ("fox", {"chunk_size": C}),
    ("fox", {"chunk_size": 3, "rope": True}),
    ("fox", {"chunk_size": C, "qk_norm": True}),
    ("fox", {"chunk_size": C, "kv_shift": True}),
    ("fox", {"chunk_size": C, "output_gate": True}),
    ("fox", {"chunk_size": 3, "qk_norm": True, "kv_shift": True, "output_gate": True}),
    ("hopfield", {}),
    ("hopfield", {"num_updates": 0}),
    ("hopfield", {"num_updates": 3}),
    ("hopfield", {"beta": 0.5}),
    ("hopfield", {"rope": False}),
    ("hopfield", {"rope_base": 100.0, "rope_fraction": 0.5}),
    ("gau", {"chunk_size": C, "key_dim": 16}),
    ("gau", {"chunk_size": 3, "key_dim": 16}),
    ("gau", {"chunk_size": 1, "key_dim": 8}),
    ("gau", {"chunk_size": C, "key_dim": 8, "expansion_factor": 1}),
    ("gau", {"chunk_size": C, "key_dim": 16, "rope": False}),
    ("gau", {"chunk_size": C, "key_dim": 16, "published": True}),
    ("gau", {"chunk_size": 3, "key_dim": 16, "rope": False, "published": True}),
    ("moba", {"chunk_size": C}),
    ("moba", {"chunk_size": 3, "top_k": 2, "conv_size": 4}),
    ("moba", {"chunk_size": C, "top_k": 1, "rope": False}),
    ("moba", {"chunk_size": C, "top_k": 9, "conv_size": 4, "qk_norm": True, "output_gate": True}),
    ("nsa", {"chunk_size": C, "window_size": C}),
    ("nsa", {"chunk_size": 3, "top_k": 5, "window_size": 5, "conv_size": 4, "num_kv_heads": 1}),
    ("nsa", {"chunk_size": C, "top_k": 1, "window_size": 1, "rope": False}),
    ("bsbr", {"chunk_size": C}),
    ("bsbr", {"chunk_size": 3}),
    ("bsbr", {"chunk_size": 1}),
    ("bsbr", {"chunk_size": C, "retrieval_top_k": 1}),
    ("bsbr", {"chunk_size": C, "router_dim": 3}),
    ("bsbr", {"chunk_size": C, "route_every": 1}),
    ("bsbr", {"chunk_size": 6, "route_every": 2, "retrieval_top_k": 1}),
    ("bsbr", {"chunk_size": 6, "route_every": 3, "overlap": False, "normalize": False}),
    ("bsbr", {"chunk_size": 3, "retrieval_top_k": 2}),
    ("bsbr", {"chunk_size": C, "normalize": False}),
    ("bsbr", {"chunk_size": 3, "normalize": False, "retrieval_top_k": 2}),
    ("bsbr", {"chunk_size": C, "rope": False}),
    ("bsbr", {"chunk_size": 3, "conv_size": 1}),
    ("bsbr", {"chunk_size": C, "overlap": False, "initial_gain": 0.5}),
    ("bsbr", {"chunk_size": 3, "overlap": False, "conv_size": 1, "normalize": False}),
    ("bsbr", {"chunk_size": C, "bias": True}),
    ("bsbr", {"chunk_size": C, "qk_norm": True, "output_gate": True}),
    ("bsbr", {"chunk_size": 3, "qk_norm": True, "overlap": False, "normalize": False}),
    ("bsbr", {"chunk_size": C, "compression_factor": 2}),
    ("bsbr", {"chunk_size": 3, "compression_factor": 4, "retrieval_top_k": 1}),
]


def small_options(name: str) -> dict:
    """The size options of an architecture at test size."""
    return dict.fromkeys({"chunk_size", "window_size"} & set(inspect.signature(ARCHITECTURES[name]).parameters), C)


# An architecture without an entry is tested with its default options.
VARIANTS += [(name, small_options(name)) for name in ARCHITECTURES.keys() - dict(VARIANTS).keys()]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in VARIANTS]
each_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)


def build(name: str, options: dict, dtype: torch.dtype = torch.float64, num_heads: int = 2) -> Attention:
    """Hidden 16, two heads, and no parameter left at a start (0 or 1) that would hide a fault."""
    torch.manual_seed(1)
    attention = ARCHITECTURES[name](WIDTH, num_heads, **options).to(torch.float64)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
        if options.get("published"):
            attention.bias.abs_()  # a negative bias hides a token behind relu
    return attention.to(dtype)


def sequence(T: int, dtype: torch.dtype = torch.float64, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, T, WIDTH, generator=torch.Generator().manual_seed(T), dtype=torch.float64).to(dtype)


def definition(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    if getattr(attention, "state_dim", attention.head_dim) != attention.head_dim:
        return compressed_definition(attention, x)
    return attention.emit(attention.attention_map(x) @ attention.values(x), x)


def compressed_definition(bsbr: Attention, x: torch.Tensor) -> torch.Tensor:
    """BSBR with compression has no map over values: its oracle goes token by token, chunk by chunk."""
    q, k, v, _ = (at_least_fp32(part) for part in bsbr.project(x))
    down, up = at_least_fp32(bsbr.down), at_least_fp32(bsbr.up)
    P = bsbr.chunk_map(x)  # once: in bf16 its gradients would be rounded for every token
    outputs = []
    for t in range(x.shape[1]):
        c = t // bsbr.chunk_size
        start = max(0, t + 1 - bsbr.chunk_size) if bsbr.overlap else c * bsbr.chunk_size
        query, keys = bsbr.rotate(q)[:, :, t : t + 1], bsbr.rotate(k)[:, :, start : t + 1]
        local = (query @ keys.mT / bsbr.head_dim**0.5).softmax(-1) @ v[:, :, start : t + 1]
        retrieved = torch.zeros_like(local)
        for j in range(c):
            inside = slice(j * bsbr.chunk_size, (j + 1) * bsbr.chunk_size)
            state = sum(
                bsbr.unit_keys(k)[:, :, i, :, None] @ (v[:, :, i, None] @ down) for i in range(x.shape[1])[inside]
            )
            retrieved = retrieved + P[:, :, t, j, None, None] * (q[:, :, t : t + 1] @ state @ up)
        if bsbr.normalize:
            retrieved = bsbr.gain * retrieved / (1 + retrieved.square().mean(-1, keepdim=True)).sqrt()
        outputs.append(local + retrieved)
    return bsbr.emit(torch.cat(outputs, 2), x)


def decode(attention: Attention, x: torch.Tensor, prefilled: int = 0) -> torch.Tensor:
    outputs = []
    state = attention.init_state(len(x))
    if prefilled:
        output, state = attention.prefill(x[:, :prefilled])
        outputs.extend(output.unbind(1))
    for x_t in x[:, prefilled:].unbind(1):
        output, state = attention.step(x_t, state)
        outputs.append(output)
    return torch.stack(outputs, 1)


def prefill_in_parts(attention: Attention, x: torch.Tensor, *cuts: int) -> torch.Tensor:
    """The output of x, prefilled up to the first cut, then from each state up to the next cut."""
    outputs, state = [], None
    for part in torch.tensor_split(x, cuts, 1):
        output, state = attention.prefill(part, state)
        outputs.append(output)
    return torch.cat(outputs, 1)


def results(form, attention: Attention, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of a form and the gradient of a fixed random function of it by the input and every parameter."""
    x = x.clone().requires_grad_()
    output = form(attention, x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(x)
    inputs = {"x": x, **dict(attention.named_parameters())}
    gradients = torch.autograd.grad((output * weights).sum(), list(inputs.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(inputs, gradients, strict=True)
    }
    return {"output": output.detach(), **{f"gradient of {name}": gradient for name, gradient in found.items()}}


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Root-mean-square difference over that of the truth, which is in fp64."""
    return (found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()


#: One number a head or channel, whose gradient sums B T V rounded terms that mostly cancel.
SUMS_OF_SMALL_TERMS = ("beta", "gain", "bias", "forget.weight", "forget.bias", "q_norm.weight", "k_norm.weight")


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """Relative root-mean-square difference of each; what is 0 by definition must be 0 to the same absolute measure."""
    largest = max(value.double().square().mean().sqrt() for value in expected.values())
    for name, truth in expected.items():
        error = (found[name].double() - truth.double()).square().mean().sqrt()
        allowed, floor = tolerance, 1e-3 * largest
        if name.removeprefix("gradient of ") in SUMS_OF_SMALL_TERMS:
            low = tolerance == TOLERANCE[torch.bfloat16]
            allowed, floor = (10 * tolerance, floor) if low else (tolerance, largest)
        scale = max(truth.double().square().mean().sqrt(), floor)
        assert error <= allowed * scale, f"{name}: relative error {error / scale:.2e}"


def assert_near_truth(attention: Attention, x: torch.Tensor) -> None:
    """In low precision: the error of the fast form against fp64 may be the law's, or twice that of the definition.

    Each is rounded in its own way, and a sum of signed terms (the gradient of a gain, a rate, a bias) may have less
    than the law's precision in both.
    """
    truth = results(definition, copy.deepcopy(attention).double(), x.double())
    found, plain = results(type(attention).forward, attention, x), results(definition, attention, x)
    floor = 1e-3 * max(value.square().mean().sqrt() for value in truth.values())
    for name, value in truth.items():
        scale = max(value.square().mean().sqrt(), floor)
        error, own = ((form[name].double() - value).square().mean().sqrt() / scale for form in (found, plain))
        allowed = max(TOLERANCE[x.dtype], 2 * own)
        assert error <= allowed, f"{name}: relative error {error:.2e}, of the definition {own:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@each_variant
def test_fast_form_equals_definition(name, options, dtype):
    """In fp32 also against the definition in fp64 with the same, rounded, numbers: they are not merely wrong together.

    Low precision is tested within one chunk, at the end of one, and over several.
    """
    attention = build(name, options, dtype)
    for T in LENGTHS if dtype == torch.float64 else (1, C, 4 * C + 1):
        x = sequence(T, dtype)
        found = results(type(attention).forward, attention, x)
        assert_close(found, results(definition, attention, x), TOLERANCE[dtype])
        if dtype == torch.float32:
            truth = definition(copy.deepcopy(attention).double(), x.double())
            error = relative_error(found["output"], truth)
            assert error <= 1e-5, f"{T} tokens: relative error {error:.2e}"


@each_variant
def test_decode_equals_definition(name, options):
    attention, x = build(name, options), sequence(4 * C + 1)
    assert_close(results(decode, attention, x), results(definition, attention, x), 1e-10)


@pytest.mark.parametrize("name", ["standard", "sliding_window", "nsa"])
def test_four_heads_may_share_two_heads_of_keys(name):
    """Neither one head of keys nor one for each head of queries: nothing broadcasts."""
    attention = build(name, small_options(name) | {"num_kv_heads": 2}, num_heads=4)
    x = sequence(4 * C + 1)
    expected = results(definition, attention, x)
    assert_close(results(type(attention).forward, attention, x), expected, 1e-10)
    assert_close(results(decode, attention, x), expected, 1e-10)
    assert_close(results(lambda *given: prefill_in_parts(*given, C + 1), attention, x), expected, 1e-10)


TOKENS = 3 * C + 2
CUTS = [
    *((1,), (C - 1,), (C + 1,), (C - 1, C, C + 1), (3, C + 3, 2 * C + 3)),
    *((C, 2 * C, 3 * C), (0, 0, 5, 5, TOKENS, TOKENS)),
]
MORE_CUTS = [
    *((n,) for n in (0, 2, C, 2 * C - 3, 2 * C, TOKENS - 1, TOKENS)),
    *((1, 2, 3), (2, 4, 2 * C + 1)),
]


@each_variant
def test_prefill_continues_from_every_state(name, options):
    """Outputs for cuts at and around the edges of chunks, and for several in a row; gradients for one of each kind."""
    attention, x = build(name, options), sequence(TOKENS)
    expected = results(type(attention).forward, attention, x)
    for cuts in CUTS:
        found = results(lambda attention, x, cuts=cuts: prefill_in_parts(attention, x, *cuts), attention, x)
        assert_close(found, expected, 1e-10)
    with torch.no_grad():
        for cuts in MORE_CUTS:
            assert_close({"output": prefill_in_parts(attention, x, *cuts)}, {"output": expected["output"]}, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_variant
@torch.no_grad()
def test_prefill_continues_in_low_precision(name, options, dtype):
    attention, x = build(name, options, dtype), sequence(TOKENS, dtype)
    truth = definition(copy.deepcopy(attention).double(), x.double())
    for cuts in ((1,), (C + 3,), (C - 1, 2 * C)):
        output = prefill_in_parts(attention, x, *cuts)
        assert output.dtype == dtype
        error = relative_error(output, truth)
        assert error <= 2 * TOLERANCE[dtype], f"cuts {cuts}: relative error {error:.2e}"


@each_variant
@torch.no_grad()
def test_prefill_and_decoding_continue_each_other(name, options):
    """Prefill, step, prefill, step: every kind of state is continued in both ways, and no state is changed."""
    attention, x = build(name, options), sequence(TOKENS)
    expected = attention(x)
    for first in (0, 1, C - 1, C, C + 1, C + 2, 2 * C):
        output, state = attention.prefill(x[:, :first])
        outputs = [output]
        for t in range(first, first + 3):
            output, state = attention.step(x[:, t], state)
            outputs.append(output[:, None])
        output, after = attention.prefill(x[:, first + 3 : first + 3 + C], state)
        again, _ = attention.prefill(x[:, first + 3 : first + 3 + C], state)
        assert torch.equal(output, again), "a continuation must not change the state that it starts from"
        outputs.append(output)
        for t in range(first + 3 + C, TOKENS):
            output, after = attention.step(x[:, t], after)
            outputs.append(output[:, None])
        torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)


@each_variant
def test_prefill_continues_from_the_initial_state(name, options):
    attention, x = build(name, options), sequence(TOKENS)
    output, _ = attention.prefill(x, attention.init_state(len(x)))
    torch.testing.assert_close(output, attention(x), rtol=1e-10, atol=1e-10)
    output, state = attention.prefill(x[:, :0])
    assert output.shape == attention(x[:, :0]).shape == (3, 0, WIDTH)
    for found, expected in zip(state, attention.init_state(3), strict=True):
        torch.testing.assert_close(found, expected)


@each_variant
@torch.no_grad()
def test_states_are_the_same_however_they_were_made(name, options):
    """Sizes and numbers: a state from prefills is the state from steps, and `state_size` counts it."""
    attention, x = build(name, options), sequence(TOKENS)
    stepped = attention.init_state(len(x))
    for t in range(TOKENS):
        _, stepped = attention.step(x[:, t], stepped)
        assert size_of(stepped) == len(x) * attention.state_size(t + 1), f"after {t + 1} tokens"
        if t + 1 in (1, C - 1, C, C + 1, 2 * C + 3):
            assert_same_state(attention.prefill(x[:, : t + 1])[1], stepped)
    for cuts in ((), (1,), (C - 1,), (C + 1,), (C, 2 * C), (3, C + 3, 2 * C + 3), (TOKENS,)):
        state = None
        for part in torch.tensor_split(x, cuts, 1):
            _, state = attention.prefill(part, state)
        assert_same_state(state, stepped)


def size_of(state: tuple) -> int:
    return sum(part.numel() for part in state if isinstance(part, torch.Tensor))


def assert_same_state(found: tuple, expected: tuple) -> None:
    for field, own, other in zip(type(found)._fields, found, expected, strict=True):
        if isinstance(own, torch.Tensor):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10, msg=lambda m, f=field: f"{f}: {m}")
        else:
            assert own == other, field


@each_variant
def test_the_contract_says_what_is_seen_exactly(name, options):
    attention = build(name, options)
    exact = attention.sees_exactly(TOKENS)
    t, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    sink = j < options.get("num_sinks", 0)
    if attention.reach is None:
        assert torch.equal(exact, j <= t)
    else:
        assert exact.diagonal().all()
        assert not (exact & ((j > t) | (t - j >= attention.reach) & ~sink)).any()
    size = options.get("window_size", options.get("chunk_size"))
    chunks, window = (t // size == j // size, (t - j < size) | sink) if size else (None, None)
    known = {"sliding_window": window, "gau": chunks, "moba": chunks, "bsbr": window} if size else {}
    if name in known:
        assert attention.reach == size
        within = known[name] if options.get("overlap", True) else chunks
        assert torch.equal(exact, (j <= t) & within)


@pytest.mark.parametrize("name", ["standard", "hopfield", "sliding_window", "fox", "bsbr"])
def test_a_softmax_without_retrieval_has_its_weight_where_it_sees_exactly(name):
    for options in (options for architecture, options in VARIANTS if architecture == name):
        attention = build(name, options)
        if name == "bsbr":
            if not attention.has_map or not attention.normalize:
                continue
            torch.nn.init.zeros_(attention.gain)
        exact = attention.sees_exactly(TOKENS)
        assert torch.equal(attention.attention_map(sequence(TOKENS)) != 0, exact.expand(3, 2, TOKENS, TOKENS))


@each_variant
def test_the_contract_says_what_there_is(name, options):
    attention, x = build(name, options), sequence(3)
    assert attention.has_decode
    assert attention.has_map == (options.get("compression_factor", 1) == 1)
    assert attention.period == options.get("chunk_size", 1)
    if attention.routes_chunks:
        assert attention.chunk_map(x).dim() == 4
    else:
        with pytest.raises(NotImplementedError):
            attention.chunk_map(x)


@each_variant
@torch.no_grad()
def test_no_output_moves_when_a_later_token_changes(name, options):
    attention = build(name, options, torch.float32)
    for T in (C - 1, 4 * C + 3):
        x = sequence(T, torch.float32)
        before = attention(x)
        for t in {0, 1, C - 1, C, C + 1, T - 1} & set(range(T)):
            changed = x.clone()
            changed[:, t:] += 10 * torch.randn(x[:, t:].shape, generator=torch.Generator().manual_seed(t))
            after = attention(changed)
            assert torch.equal(after[:, :t], before[:, :t]), f"outputs before {t} moved"
            assert not torch.equal(after[:, t], before[:, t])


@each_variant
def test_map_is_causal_and_complete(name, options):
    if options.get("compression_factor"):
        pytest.skip("no map exists with state compression")
    attention = build(name, options)
    A = attention.attention_map(sequence(4 * C + 3))
    heads = attention.num_heads * getattr(attention, "num_steps", 1)
    assert A.shape == (3, heads, 4 * C + 3, 4 * C + 3)
    assert torch.equal(A.triu(1), torch.zeros_like(A))


@each_variant
def test_what_is_seen_of_the_past(name, options):
    """The gradient of the last output by each token: beyond the chunk too, except through a window."""
    attention = build(name, options)
    x = sequence(4 * C + 1, batch=1).requires_grad_()
    (gradient,) = torch.autograd.grad(attention(x)[0, -1].sum(), x)
    seen = gradient[0].abs().sum(-1) > 0
    if name == "sliding_window":
        reach = options["window_size"] + options.get("conv_size", 1) - 1
        assert seen.tolist() == [t > 4 * C - reach or t < options.get("num_sinks", 0) for t in range(4 * C + 1)]
    elif name == "moba":
        mapped = (attention.attention_map(x)[0, :, -1] != 0).any(0)
        assert (seen[mapped]).all()
        assert torch.equal(seen, mapped) or options.get("conv_size", 1) > 1
        assert mapped.view(-1)[: 4 * C].any() == (options.get("top_k", 3) > 1)
    elif "retrieval_top_k" in options:
        assert seen[: -2 * options["chunk_size"]].any()
    else:
        assert seen.all()


def test_hopfield_without_updates_is_standard():
    standard, hopfield = build("standard", {}), ARCHITECTURES["hopfield"](WIDTH, 2, num_updates=0).double()
    torch.nn.init.constant_(hopfield.beta, hopfield.head_dim**-0.5)
    hopfield.load_state_dict(standard.state_dict() | {"beta": hopfield.beta})
    x = sequence(2 * C)
    torch.testing.assert_close(hopfield(x), standard(x), rtol=1e-10, atol=1e-10)


def test_window_as_long_as_the_text_is_standard():
    standard, window = build("standard", {}), ARCHITECTURES["sliding_window"](WIDTH, 2, window_size=2 * C).double()
    window.load_state_dict(standard.state_dict())
    x = sequence(2 * C)
    torch.testing.assert_close(window(x), standard(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(window(sequence(2 * C + 1))[:, -1], standard(sequence(2 * C + 1))[:, -1])


@pytest.mark.parametrize("normalize", [True, False])
def test_bsbr_keeps_top_k_of_equal_chunks(normalize):
    """The same text again and again: every chunk scores the same, and still only so many are mixed."""
    bsbr = build("bsbr", {"chunk_size": 2, "retrieval_top_k": 2, "normalize": normalize})
    x = sequence(1).expand(-1, 13, -1)
    assert ((bsbr.chunk_map(x) > 0).sum(-1) == (torch.arange(13) // 2).clamp(max=2)).all()
    assert_close(results(type(bsbr).forward, bsbr, x), results(definition, bsbr, x), 1e-10)


def test_bsbr_chunk_map_is_strict_and_may_retrieve_nothing():
    x = sequence(4 * C + 3)
    chunk = torch.arange(4 * C + 3) // C
    P = build("bsbr", {"chunk_size": C}).chunk_map(x)
    assert torch.equal(P != 0, (torch.arange(5) < chunk[:, None]).expand_as(P))
    assert (P.sum(-1) < 1).all()
    plain = build("bsbr", {"chunk_size": C, "normalize": False}).chunk_map(x)
    torch.testing.assert_close(plain.sum(-1), (chunk > 0).to(P).expand(P.shape[:3]))
    best = build("bsbr", {"chunk_size": C, "retrieval_top_k": 2}).chunk_map(x)
    assert ((best > 0).sum(-1) == chunk.clamp(max=2)).all()


@pytest.mark.parametrize("every", [1, 2, 4, None])
def test_a_block_of_bsbr_has_the_routing_weights_of_its_first_token(every):
    x = sequence(2 * C + 3)
    bsbr = build("bsbr", {"chunk_size": C, "route_every": every})
    P = bsbr.chunk_map(x)
    same = [torch.equal(P[:, :, t], P[:, :, t - 1]) for t in range(C + 1, 2 * C)]
    assert same == [t % (every or C) != 0 for t in range(C + 1, 2 * C)]
    changed = x.clone()
    changed[:, C + 3] += 1  # the first token of a block where every token asks, and within a block of 2, 4 and 8
    moved = (bsbr.chunk_map(changed) != P).any(-1).any(1).any(0)[: 2 * C].nonzero()[:, 0].tolist()
    assert moved == ([C + 3] if every == 1 else [])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_sizes_keep_the_law(name):
    """Chunks and windows of 64 and 128, which span several blocks of the fast form, in 300 tokens."""
    attention, x = build(name, {}), sequence(300, batch=1)
    y, state = attention.prefill(x[:, :170])
    continued = attention.prefill(x[:, 170:], state)[0]
    expected = attention.emit(attention.attention_map(x) @ attention.values(x), x)
    torch.testing.assert_close(attention(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat((y, continued), 1), expected, rtol=1e-9, atol=1e-9)


@each_variant
def test_state_size_counts_the_state(name, options):
    attention = build(name, options)
    for T in (1, C - 1, C, 3 * C + 2):
        with torch.no_grad():
            state = attention.prefill(sequence(T))[1]
        assert size_of(state) == 3 * attention.state_size(T), f"after {T} tokens"
