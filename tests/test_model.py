"""The language model around any attention: causality, decoding, generation, costs, and what it says to bad input."""

import math
from functools import partial

import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES, BSBRAttention, GAUAttention, StandardAttention
from bsbr_pl.feed_forward import FeedForward, default_ff_dim
from bsbr_pl.model import LanguageModel
from bsbr_pl.spec import specs_of

V = 31
OPTIONS = {
    "sliding_window": {"window_size": 4},
    "linear": {"chunk_size": 4},
    "delta_net": {"chunk_size": 4},
    "gated_delta_net": {"chunk_size": 4},
    "gau": {"chunk_size": 4, "key_dim": 8},
    "bsbr": {"chunk_size": 4},
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def model_of(name: str, dtype: torch.dtype = torch.float64, **arguments) -> LanguageModel:
    """Two layers with every parameter moved from its start, so that no zero hides a branch."""
    torch.manual_seed(0)
    factory = partial(ARCHITECTURES[name], **OPTIONS.get(name, {}))
    defaults = {"attention": factory, "vocab_size": V, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
    model = LanguageModel(**defaults | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


@every_architecture
def test_no_logit_sees_a_later_token(name):
    model, before = model_of(name, torch.float32), ids(2, 19)
    logits = model(before)
    assert logits.shape == (2, 19, V)
    for t in (1, 3, 4, 5, 18):
        after = before.clone()
        after[:, t:] = (after[:, t:] + 1) % V
        assert torch.equal(model(after)[:, :t], logits[:, :t])
        assert not torch.equal(model(after)[:, t], logits[:, t])


@every_architecture
def test_greedy_generation_equals_argmax_over_forward(name):
    model, text = model_of(name), ids(3, 5)
    generated = model.generate(text, max_new_tokens=20, temperature=0)
    for _ in range(20):
        text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generated, text)
    assert len(set(generated[0].tolist())) > 3  # not stuck on one token: the comparison says something


def test_generation_ends_where_the_caller_says():
    model, text = model_of("bsbr"), ids(3, 5)
    whole = model.generate(text, max_new_tokens=20, temperature=0)
    seen: list[torch.Tensor] = []
    found = model.generate(text, 20, temperature=0, until=lambda given: seen.append(given) or given.shape[1] == 9)
    assert torch.equal(found, whole[:, :9])
    assert [given.shape[1] for given in seen] == [6, 7, 8, 9]


@every_architecture
def test_decoding_from_nothing_equals_forward(name):
    model, text = model_of(name), ids(2, 11)
    states, logits = model.init_state(2), []
    for t in range(11):
        next_logits, states = model.step(text[:, t], states)
        logits.append(next_logits)
    torch.testing.assert_close(torch.stack(logits, 1), model(text), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", [0, 11])
@every_architecture
def test_prefill_continues_from_states(name, positions):
    """Every cut of a text: the logits after both parts, all activations, and what follows, are those of the whole."""
    model, text = model_of(name, positions=positions), ids(2, 11)
    logits, hidden = model(text), model.hidden(text)
    _, whole = model.prefill(text[:, :10])
    for cut in range(1, 10):
        first, states = model.prefill(text[:, :cut])
        torch.testing.assert_close(first, logits[:, cut - 1], rtol=1e-9, atol=1e-9)
        activations, _ = model.decode(text[:, cut:], states)
        torch.testing.assert_close(activations, hidden[:, cut:], rtol=1e-9, atol=1e-9)
        next_logits, states = model.prefill(text[:, cut:10], states)
        torch.testing.assert_close(next_logits, logits[:, 9], rtol=1e-9, atol=1e-9)
        assert states[0] == whole[0] == (10,)
        torch.testing.assert_close(model.step(text[:, 10], states)[0], logits[:, 10], rtol=1e-9, atol=1e-9)
    from_nothing, _ = model.prefill(text, model.init_state(2))
    torch.testing.assert_close(from_nothing, logits[:, -1], rtol=1e-9, atol=1e-9)


def test_a_continuation_beyond_the_learned_positions_is_refused():
    model, text = model_of("standard", positions=11), ids(1, 8)
    _, states = model.prefill(text)
    model.prefill(text[:, :3], states)
    with pytest.raises(ValueError, match=r"a text must have at most 11 tokens \(positions\), got 12"):
        model.prefill(text[:, :4], states)


def test_sampling_is_seeded_and_obeys_top_k():
    model, text = model_of("bsbr"), ids(1, 6)
    one, again, other = (model.generate(text, 12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(model.generate(text, 12, top_k=1, seed=5), model.generate(text, 12, temperature=0))
    best = set(model(text)[0, -1].topk(3).indices.tolist())
    assert {int(model.generate(text, 1, top_k=3, temperature=9.0, seed=s)[0, -1]) for s in range(40)} == best


def test_exactly_top_k_of_equal_logits_are_sampled():
    model = model_of("standard")
    torch.nn.init.zeros_(model.embedding.weight)  # every logit is 0
    assert len({int(model.generate(ids(1, 6), 1, top_k=2, seed=seed)[0, -1]) for seed in range(30)}) == 2


@pytest.mark.parametrize("temperature", [1e-12, 1e-45, 5e-324])
def test_next_to_no_temperature_is_greedy(temperature):
    model = model_of("standard")
    greedy = model.generate(ids(1, 4), 8, temperature=0)
    assert torch.equal(model.generate(ids(1, 4), 8, temperature=temperature), greedy)


def test_generation_leaves_the_mode_as_it_was():
    model = model_of("standard", dropout=0.5).train()
    assert torch.equal(model.generate(ids(1, 4), 3), model.generate(ids(1, 4), 3))
    assert model.training
    with pytest.raises(ValueError, match="input_ids must lie in"):
        model.generate(torch.tensor([[V]]), 3)
    assert model.training


@every_architecture
def test_attention_weights_are_those_of_every_layer(name):
    model, text = model_of(name), ids(2, 9)
    A = model.get_attention_weights(text)
    heads = {"gau": 1, "gated_delta_product": 4}.get(name, 2)  # Gated DeltaProduct has a map for each of two steps
    assert A.shape == (4 if name == "gau" else 2, 2, heads, 9, 9)
    assert torch.equal(A.triu(1), torch.zeros_like(A))
    x = model.branches[0].norm(model.embed(text))
    first = model.attentions[0]
    torch.testing.assert_close(first.emit(A[0] @ first.values(x), x), first(x))


@every_architecture
def test_costs_are_sums_over_layers(name):
    model = model_of(name)
    states = model.prefill(ids(1, 13))[1]
    kept = sum(part.numel() for state in states for part in state if isinstance(part, torch.Tensor))
    assert model.state_size(13) == kept
    assert model.flops(13) > 2 * 13 * sum(p.numel() for p in model.parameters() if p.dim() == 2) * 0.9


def test_gau_needs_no_feed_forward_and_matches_standard_in_size():
    def size(factory):
        return sum(p.numel() for p in LanguageModel(factory, 8, hidden_dim=256, num_layers=2).parameters())

    assert abs(size(GAUAttention) / size(StandardAttention) - 1) < 0.1


def test_hybrid_has_one_architecture_a_layer():
    model = LanguageModel([BSBRAttention, StandardAttention], V, hidden_dim=16, num_layers=2, num_heads=2)
    assert [type(attention) for attention in model.attentions] == [BSBRAttention, StandardAttention]
    text = ids(1, 9)
    torch.testing.assert_close(model.prefill(text)[0], model(text)[:, -1])


def test_without_feed_forward_there_are_attentions_alone():
    model = LanguageModel(StandardAttention, V, hidden_dim=16, num_layers=3, num_heads=2, ff_dim=0)
    assert [type(branch.inner) for branch in model.branches] == [StandardAttention] * 3


@pytest.mark.parametrize("hidden_dim", [32, 128, 768])
@pytest.mark.parametrize("vocab_size", [256, 8192])
@every_architecture
@torch.no_grad()
def test_the_first_loss_is_that_of_guessing(name, vocab_size, hidden_dim):
    """Within 0.1 of ln V; and a token predicts itself neither more nor less than others, though the head is tied."""
    torch.manual_seed(0)
    factory = partial(ARCHITECTURES[name], **OPTIONS.get(name, {}))
    model = LanguageModel(factory, vocab_size, hidden_dim, num_layers=2)
    text = torch.randint(vocab_size, (8, 65))
    logits = model(text[:, :-1]).mT
    following, current = (torch.nn.functional.cross_entropy(logits, targets) for targets in (text[:, 1:], text[:, :-1]))
    assert following.item() == pytest.approx(math.log(vocab_size), abs=0.1)
    assert current.item() == pytest.approx(math.log(vocab_size), abs=0.15)


@pytest.mark.parametrize(("out_init", "options"), [(0.5, {}), (1.5, {"positions": 6, "ff_bias": True}), (0.0, {})])
def test_initial_weights_have_the_variance_of_their_formula(out_init, options):
    torch.manual_seed(0)
    model = LanguageModel(
        partial(StandardAttention, bias=True),
        997,
        hidden_dim=128,
        num_layers=3,
        num_heads=2,
        out_init=out_init,
        **options,
    )
    attention, network = model.branches[0].inner, model.branches[5].inner
    assert attention.qkv.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert network.into.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert model.embedding.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    for out, fan_in in ((attention.out, 128), (network.out, 512)):
        assert out.weight.std().item() == pytest.approx(out_init / (fan_in * 128 * 6) ** 0.5, rel=0.02)
        assert out.bias is None or not out.bias.any()
    assert model.norm.weight.tolist() == pytest.approx([0.3, -0.3] * 64)


def test_branches_start_small_and_not_silent():
    """What all branches add to the embedding has about c^2 times its variance, in a deep model too."""
    for num_layers in (1, 8):
        torch.manual_seed(0)
        model = LanguageModel(StandardAttention, 997, hidden_dim=128, num_layers=num_layers, out_init=0.5)
        text = torch.randint(997, (8, 16))
        x = before = model.embed(text)
        for branch in model.branches:
            x = branch(x)
        assert 0.25 / 4 < ((x - before).var() / before.var()).item() < 0.25 * 4


def test_silent_branches_start_as_a_guess_without_context():
    model = LanguageModel(StandardAttention, V, hidden_dim=16, num_layers=2, num_heads=2, out_init=0.0)
    one, other = ids(1, 6), ids(1, 6, seed=1)
    other[:, -1] = one[:, -1]
    assert torch.equal(model(one)[:, -1], model(other)[:, -1])


@pytest.mark.parametrize("name", ["gau", "bsbr"])
def test_learned_positions_biases_and_gelu_change_what_is_said_but_no_law(name):
    options = {"positions": 19, "ff_activation": "gelu", "ff_bias": True}
    model, text = model_of(name, **options), ids(2, 19)
    plain = model_of(name)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(model(text)[:, 0], plain(text)[:, 0], atol=0.01)
    states, logits = model.init_state(2), []
    for t in range(19):
        next_logits, states = model.step(text[:, t], states)
        logits.append(next_logits)
    torch.testing.assert_close(torch.stack(logits, 1), model(text), rtol=1e-9, atol=1e-9)


FORMS = [("layer", "relu2", True), ("rms", "swiglu", False), ("rms", "gelu", True), ("layer", "swiglu", True)]


@pytest.mark.parametrize(("norm", "ff_activation", "tied"), FORMS)
def test_norms_networks_and_head_are_their_formulas(norm, ff_activation, tied):
    """The logits from the parameters and the attentions alone."""
    options = {"norm": norm, "ff_activation": ff_activation, "tie_embeddings": tied}
    model, text = model_of("standard", ff_dim=24, ff_bias=True, **options), ids(2, 7)

    def normed(x, part):
        x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * part.weight
        return scaled + part.bias if norm == "layer" else scaled

    def network(x, part):
        x = x @ part.into.weight.T + part.into.bias
        if ff_activation == "swiglu":
            x = x[..., :24] * torch.sigmoid(x[..., :24]) * x[..., 24:]
        elif ff_activation == "relu2":
            x = x.clamp(min=0) ** 2
        else:
            x = x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
        return x @ part.out.weight.T + part.out.bias

    x = model.embedding.weight[text]
    for i, branch in enumerate(model.branches):
        y = normed(x, branch.norm)
        x = x + (network(y, branch.inner) if i % 2 else branch.inner(y))
    head = (model.embedding if tied else model.unembedding).weight
    torch.testing.assert_close(model(text), normed(x, model.norm) @ head.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.prefill(text)[0], model(text)[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("vocab_size", [256, 8192])
@pytest.mark.parametrize(("norm", "ff_activation", "tied"), FORMS)
@torch.no_grad()
def test_the_first_loss_is_that_of_guessing_in_each_form(norm, ff_activation, tied, vocab_size):
    torch.manual_seed(0)
    model = LanguageModel(
        StandardAttention, vocab_size, 64, num_layers=2, norm=norm, ff_activation=ff_activation, tie_embeddings=tied
    )
    text = torch.randint(vocab_size, (8, 65))
    loss = torch.nn.functional.cross_entropy(model(text[:, :-1]).mT, text[:, 1:])
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.1)


@pytest.mark.parametrize("hidden_dim", [64, 128, 768])
def test_a_gated_network_has_about_as_many_parameters(hidden_dim):
    plain, gated = (
        sum(p.numel() for p in FeedForward(hidden_dim, default_ff_dim(hidden_dim, activation), activation).parameters())
        for activation in ("relu2", "swiglu")
    )
    assert gated == pytest.approx(plain, rel=0.04)
    assert default_ff_dim(1, "swiglu") > 0


def test_longer_than_anything_seen_is_no_error():
    assert model_of("standard", torch.float32)(ids(1, 700)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden_dim": 15}, "hidden_dim must be a multiple of num_heads, got 15 and 2"),
        ({"hidden_dim": None}, "hidden_dim must be a positive integer, got None"),
        ({"hidden_dim": 6}, "rotary positions need an even head width, got 3"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"ff_dim": -1}, r"ff_dim must be 0 \(no feed-forward networks\) or more, got -1"),
        ({"ff_dim": 2.5}, r"ff_dim must be 0 \(no feed-forward networks\) or more, got 2.5"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": None}, r"dropout must be at least 0 and below 1, got None"),
        ({"positions": -1}, r"positions must be 0 \(none\) or more, got -1"),
        ({"out_init": -0.1}, r"out_init must be 0 \(silent branches\) or more, got -0.1"),
        ({"positions": 3}, r"a text must have at most 3 tokens \(positions\), got 4"),
        ({"ff_activation": "relu"}, "ff_activation must be one of relu2, gelu, swiglu, got 'relu'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"attention": None}, "attention must be an Attention class or another builder of one, got None"),
        ({"attention": [StandardAttention] * 3}, "attention must list one architecture per layer, .* got 3 for 2"),
        ({"attention": []}, "attention must list one architecture per layer, .* got 0 for 2 layers"),
        ({"attention": partial(BSBRAttention, chunk_size=0)}, "chunk_size must be a positive integer, got 0"),
        ({"attention": partial(BSBRAttention, chunk_size=2.5)}, "chunk_size must be a positive integer, got 2.5"),
        ({"attention": partial(BSBRAttention, retrieval_top_k=0)}, "retrieval_top_k must be a positive integer, got 0"),
        ({"attention": partial(BSBRAttention, router_dim=0)}, "router_dim must be a positive integer, got 0"),
        ({"attention": partial(BSBRAttention, compression_factor=3)}, "compression_factor must divide the head width"),
        ({"attention": partial(BSBRAttention, initial_gain=1.5)}, "initial_gain must be from -1 to 1, got 1.5"),
        ({"attention": partial(ARCHITECTURES["hopfield"], num_updates=-1)}, "num_updates must be 0 or more, got -1"),
        ({"attention": partial(ARCHITECTURES["hopfield"], num_updates=1.5)}, "num_updates must be 0 or more, got 1.5"),
        ({"attention": partial(ARCHITECTURES["hopfield"], beta=0.0)}, "beta must be positive, got 0.0"),
        ({"attention": partial(ARCHITECTURES["hopfield"], beta=float("nan"))}, "beta must be positive, got nan"),
        ({"attention": partial(ARCHITECTURES["gau"], key_dim=7)}, "key_dim must be even for rotary positions, got 7"),
        ({"attention": partial(StandardAttention, rope_base=1)}, "rope_base must be above 1, got 1"),
        (
            {"attention": partial(StandardAttention, rope_fraction=1.5)},
            "rope_fraction must be a share from 0 to 1, got",
        ),
        ({"attention": partial(StandardAttention, num_kv_heads=3)}, r"num_kv_heads must divide num_heads \(2\), got 3"),
        ({"attention": partial(StandardAttention, num_kv_heads=0)}, "num_kv_heads must be a positive integer, got 0"),
        (
            {"attention": partial(ARCHITECTURES["sliding_window"], num_sinks=-1)},
            r"num_sinks must be 0 \(none\) or more",
        ),
        ({"attention": partial(ARCHITECTURES["linear"], conv_size=0)}, "conv_size must be a positive integer, got 0"),
        ({"attention": partial(ARCHITECTURES["sliding_window"], window_size=0)}, "window_size must be a positive"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    defaults = {"attention": StandardAttention, "vocab_size": V, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=words):
        LanguageModel(**defaults | arguments)(ids(1, 4))


def test_a_name_is_no_attention():
    with pytest.raises(TypeError, match=r"not be its name: give bsbr_pl.spec.specs_of\('delta_net'\)"):
        LanguageModel("delta_net", V, 16)
    LanguageModel(specs_of("delta_net"), V, 16)


@pytest.mark.parametrize("bad", [-1, V])
def test_ids_outside_the_vocabulary_are_named(bad):
    with pytest.raises(ValueError, match=rf"input_ids must lie in 0 ... {V - 1} \(vocab_size\)"):
        model_of("standard")(torch.tensor([[1, bad]]))


@pytest.mark.parametrize("bad", [ids(3), ids(1, 0), ids(0, 3), ids(1, 3).float(), ids(1, 2, 3)])
@every_architecture
def test_what_are_no_ids_is_said(name, bad):
    model = model_of(name)
    for call in (model, model.prefill, model.get_attention_weights):
        with pytest.raises(
            ValueError, match=r"input_ids must be \(batch, length\) in int64, both at least 1, got shape"
        ):
            call(bad)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, got inf"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer of 0 or more, got -1"),
        ({"seed": 2**64}, "seed must be an integer from 0"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids must be"),
    ],
)
def test_bad_generation_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        model_of("standard").generate(**{"input_ids": ids(1, 3), "max_new_tokens": 2} | arguments)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            [[1, 2]],
            r"input_ids must be \(batch, length\) in int64, both at least 1, got a list: make it a ",
        ),
        (ids(3), r"input_ids must be \(batch, length\) .* got shape \(3,\) in int64"),
        (ids(1, 3).float(), r"input_ids must be \(batch, length\) .* got shape \(1, 3\) in float32"),
        (None, "got a NoneType"),
    ],
)
def test_generation_says_what_are_no_ids(bad, words):
    for max_new_tokens in (0, 2):
        with pytest.raises(ValueError, match=words):
            model_of("standard").generate(bad, max_new_tokens)


@every_architecture
def test_states_of_other_texts_or_layers_are_refused(name):
    model, states = model_of(name), model_of(name).prefill(ids(3, 5))[1]
    for batch in (1, 2):  # one text would be broadcast
        with pytest.raises(ValueError, match=f"input_ids must continue the 3 texts of states, got {batch}"):
            model.step(ids(batch), states)
        with pytest.raises(ValueError, match=f"input_ids must continue the 3 texts of states, got {batch}"):
            model.prefill(ids(batch, 2), states)
    layers = len(model.attentions)
    for wrong, found in ((states[:-1], f"{layers} elements"), ([], "0 elements"), (tuple(states), "a tuple")):
        words = f"states must be a list of {layers + 1}, a Position and the state of each attention, got {found}"
        for call in (lambda wrong=wrong: model.step(ids(3), wrong), lambda wrong=wrong: model.decode(ids(3, 1), wrong)):
            with pytest.raises(ValueError, match=words):
                call()


@pytest.mark.parametrize("bad", [ids(3, 1), ids(0), ids(3).float(), torch.tensor(1), [1, 2, 3]])
def test_a_step_says_what_are_no_ids(bad):
    model = model_of("standard")
    with pytest.raises(ValueError, match=r"input_ids must be \(batch,\) in int64, at least 1, got "):
        model.step(bad, model.init_state(3))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda model: model.branches[2].inner.out.weight, r"branches\.2 \(StandardAttention\) .* token 0 of text 0"),
        (lambda model: model.branches[1].inner.into.weight, r"branches\.1 \(FeedForward\) .* token 0 of text 0"),
        (lambda model: model.norm.bias, "norm is not finite at token 0 of text 0"),
        (lambda model: model.embedding.weight[5], "embedding is not finite at token 3 of text 1"),
        (lambda model: model.embedding.weight[6], "head is not finite at token 0 of text 0"),  # is in no prompt
        (lambda model: model.positions.weight[6], "embedding is not finite at token 6 of text 0"),  # a generated token
    ],
)
def test_logits_that_are_not_finite_name_the_layer_and_the_token(damage, where, temperature):
    model, text = model_of("standard", positions=9), torch.tensor([[1, 2, 3, 4], [4, 3, 2, 5]])
    with torch.no_grad():
        damage(model).fill_(float("nan"))
    with pytest.raises(ValueError, match=f"cannot sample: the output of {where}"):
        model.generate(text, 5, temperature=temperature)


def test_a_step_that_is_not_finite_while_forward_is_finite_is_said(monkeypatch):
    model = model_of("standard")
    step = model.attentions[1].step
    monkeypatch.setattr(model.attentions[1], "step", lambda x, state: (x / 0, step(x, state)[1]))
    with pytest.raises(ValueError, match="`step` of an attention gives numbers that are not finite, and `forward`"):
        model.generate(ids(1, 3), 3)


def test_state_compression_has_no_map():
    model = model_of("bsbr", attention=partial(BSBRAttention, chunk_size=4, compression_factor=2))
    with pytest.raises(ValueError, match="no T x T attention map"):
        model.get_attention_weights(ids(1, 9))
