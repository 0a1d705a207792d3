"""Random architectures, options, shapes and arguments: the law holds, or a ValueError names the argument.

pytest tests/test_fuzz.py                                                    # 100 examples of each, always the same
pytest tests/test_fuzz.py --hypothesis-profile=long --hypothesis-seed=1      # 2000 others of each
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from attention.test_law import TOLERANCE, assert_close, decode, definition, results
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning import Trainer

from bsbr_pl.attention import ARCHITECTURES, Attention
from bsbr_pl.model import LanguageModel
from bsbr_pl.module import LanguageModule

SEEDS = st.integers(0, 2**32)
#: What options that do not go together are answered.
TOO_LONG = "chunk_size must be at most 512 if published"
UNDIVIDED, ODD = "compression_factor must divide", ("rotary positions need an even head width", "key_dim must be even")
SIZES = st.integers(1, 3) | st.integers(1, 9) | st.sampled_from([64, 2**31, 2**62])
ROPE = {"rope": st.booleans()}
CONVOLUTION = {"conv_size": st.integers(1, 6), "conv_init": st.sampled_from(["identity", "uniform"])}
DELTA = {
    "allow_neg_eigval": st.booleans(),
    "head_dim": st.none() | st.integers(1, 9),
    "expand_v": st.sampled_from([1, 1.0, 2.0]),
}
PRO = dict.fromkeys(("qk_norm", "output_gate"), st.booleans())
SOFTMAX = {**ROPE, **CONVOLUTION, **PRO, "bias": st.booleans()}
OPTIONS: dict[str, dict[str, st.SearchStrategy]] = {
    "standard": SOFTMAX,
    "sliding_window": {"window_size": SIZES, **SOFTMAX},
    "linear": {"chunk_size": SIZES, **CONVOLUTION, "output_norm": st.sampled_from(["denominator", "rms"])},
    "delta_net": {"chunk_size": SIZES, **CONVOLUTION, **DELTA, "output_gate": st.booleans()},
    "gated_delta_net": {
        "chunk_size": SIZES,
        **CONVOLUTION,
        **DELTA,
        "decay_init": st.sampled_from(["spaced", "random"]),
    },
    "gated_delta_product": {
        "chunk_size": SIZES,
        **CONVOLUTION,
        "num_steps": st.integers(1, 4),
        "forget_gate": st.booleans(),
        "allow_neg_eigval": st.booleans(),
    },
    "retnet": {"chunk_size": SIZES, **CONVOLUTION, "expand_v": st.sampled_from([1, 1.0, 2.0])},
    "gla": {
        "chunk_size": SIZES,
        **CONVOLUTION,
        "expand_k": st.sampled_from([1, 1.0, 2.0]),
        "gate_rank": st.integers(1, 9),
        "tied_keys": st.booleans(),
    },
    "mamba2": {
        "chunk_size": SIZES,
        **CONVOLUTION,
        "expansion_factor": st.integers(1, 3),
        "key_dim": st.integers(1, 9),
    },
    "log_linear": {
        "chunk_size": SIZES,
        **CONVOLUTION,
        "expansion_factor": st.integers(1, 3),
        "key_dim": st.integers(1, 9),
        "num_levels": st.integers(1, 9),
    },
    "kda": {"chunk_size": SIZES, **CONVOLUTION, "allow_neg_eigval": st.booleans()},
    "rwkv7": {"chunk_size": st.integers(1, 128), "rank": st.integers(1, 9)},
    "fox": {
        "chunk_size": SIZES,
        **dict.fromkeys(("rope", "qk_norm", "kv_shift", "output_gate"), st.booleans()),
    },
    "hopfield": {"num_updates": st.integers(0, 3), "beta": st.none() | st.floats(0.1, 2) | st.just(1), **ROPE},
    "gau": {
        "chunk_size": SIZES,
        "expansion_factor": st.integers(1, 3),
        "key_dim": st.integers(1, 9),
        "published": st.booleans(),
        **ROPE,
    },
    "moba": {"chunk_size": SIZES, "top_k": SIZES, **CONVOLUTION, **ROPE, **PRO},
    "nsa": {
        **dict.fromkeys(("chunk_size", "top_k", "window_size"), SIZES),
        "num_kv_heads": st.none() | st.just(1),
        **CONVOLUTION,
        **ROPE,
    },
    "bsbr": {
        "chunk_size": SIZES,
        "retrieval_top_k": st.none() | SIZES,
        "route_every": st.none() | st.integers(1, 4),
        "router_dim": st.none() | st.integers(1, 9),
        "compression_factor": st.just(1) | st.integers(1, 4),
        "normalize": st.booleans(),
        "initial_gain": st.floats(-1, 1) | st.integers(0, 1),
        "overlap": st.booleans(),
        **SOFTMAX,
    },
}
BY_OPTIONS = [name for name, options in OPTIONS.items() for _ in range(len(options))]  # each as often as it has
#: What no size may be.
NO_SIZE = st.integers(max_value=0) | st.floats() | st.sampled_from([True, None, "8", (8,)])


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All models here are tiny."""


def attempt(call: Callable[[], Any], *words: str) -> Any:
    """What a call gives, or None where it raises a ValueError that starts with some of the words."""
    try:
        return call()
    except ValueError as error:
        if not str(error).startswith(words):
            raise
        return None


@st.composite
def architectures(choose: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = choose(st.sampled_from(BY_OPTIONS))
    options = choose(st.fixed_dictionaries(OPTIONS[name]))
    if every := options.get("route_every"):
        options["chunk_size"] = every * min(options["chunk_size"], 2**60)
    return name, options


def stir(module: Any, seed: int) -> Any:
    """In fp64, with every parameter moved from its start."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return module


@st.composite
def attentions(choose: st.DrawFn) -> Attention:
    """Any that can be built; where its options do not go together, that is what the error says."""
    name, options = choose(architectures())
    heads, width = choose(st.integers(1, 4)), choose(st.integers(1, 8))
    odd = (options.get("key_dim", 128) if name == "gau" else width) % 2 and options.get("rope", name == "retnet")
    undivided = width % options.get("compression_factor", 1)
    biases = options.get("published", False) and options["chunk_size"] > 512
    words = (*([UNDIVIDED] if undivided else []), *(ODD if odd else []), *([TOO_LONG] if biases else []))

    def build() -> Attention:
        attention = ARCHITECTURES[name](heads * width, heads, **options)
        attention(torch.zeros(1, 1, heads * width))
        return attention

    attention = attempt(build, *words)
    assert (attention is None) == bool(words)
    assume(attention is not None)
    return stir(attention, choose(SEEDS))


@st.composite
def sequences(choose: st.DrawFn, attention: Attention, batch: int = 3, longest: int = 20) -> torch.Tensor:
    """(B, T, D) in fp64: tokens all different or from a vocabulary of a few, large or small."""
    B, T = choose(st.integers(1, batch)), choose(st.integers(1, longest))
    vocabulary, scale = choose(st.sampled_from([1, 2, B * T])), choose(st.sampled_from([1.0, 0.01, 3.0]))
    random = torch.Generator().manual_seed(choose(SEEDS))
    tokens = torch.randn(vocabulary, attention.hidden_dim, generator=random, dtype=torch.float64)
    return scale * tokens[torch.randperm(B * T, generator=random).view(B, T) % vocabulary]


@given(st.data(), attentions(), st.sampled_from(list(TOLERANCE)))
def test_forward_is_the_definition_and_decoding(data, attention, dtype):
    x = data.draw(sequences(attention))
    split = data.draw(st.integers(1, x.shape[1]))
    exact = 30 * TOLERANCE[torch.float64]  # over so few numbers, rounding does not average out
    forward = results(type(attention).forward, attention, x)
    assert_close(forward, results(definition, attention, x), exact)
    output = {"output": forward["output"]}  # whose gradients are not unique where equal chunks compete for top_k
    assert_close(results(decode, attention, x), output if getattr(attention, "retrieval_top_k", 0) else forward, exact)
    assert_close({"output": decode(attention, x, split).detach()}, output, exact)
    low, x = attention.to(dtype), x.to(dtype)
    assert_close({"output": low(x).detach()}, {"output": definition(low, x).detach()}, 3 * TOLERANCE[dtype])


@given(st.data(), attentions(), st.sampled_from(list(TOLERANCE)))
def test_nothing_is_seen_of_the_future(data, attention, dtype):
    attention, x = attention.to(dtype), data.draw(sequences(attention)).to(dtype)
    t = data.draw(st.integers(0, x.shape[1] - 1))
    changed = torch.cat((x[:, :t], data.draw(sequences(attention)).to(dtype)[:1, :1].expand_as(x[:, t:])), 1)
    assert torch.equal(attention(changed)[:, :t], attention(x)[:, :t])


@given(st.data(), attentions())
def test_costs_are_those_of_the_closed_forms(data, attention):
    x = data.draw(sequences(attention, batch=1))
    states = [attention.init_state(1)]
    for x_t in x.unbind(1):
        states.append(attention.step(x_t, states[-1])[1])
    for T, state in [*enumerate(states), (x.shape[1], attention.prefill(x)[1])]:
        assert sum(part.numel() for part in state if isinstance(part, torch.Tensor)) == attention.state_size(T)
    assert all(0 < less < more for less, more in pairwise(map(attention.flops, range(1, 40))))


@given(st.data(), st.sampled_from(list(ARCHITECTURES)), NO_SIZE)
def test_an_option_that_is_no_size_is_named(data, name, value):
    parameters = inspect.signature(ARCHITECTURES[name]).parameters
    counts = [option for option in OPTIONS[name] if parameters[option].annotation in (int, int | None)]
    option = data.draw(st.sampled_from(["hidden_dim", "num_heads", *sorted(counts)]))
    optional = [(name, None) for name in ("retrieval_top_k", "route_every", "router_dim", "head_dim")]
    assume((option, value) not in [*optional, ("num_updates", 0)])
    with pytest.raises(ValueError, match=rf"{option} must be (a positive integer|0 or more|a divisor)"):
        ARCHITECTURES[name](**{"hidden_dim": 4, "num_heads": 2} | {option: value})


@st.composite
def models(choose: st.DrawFn) -> LanguageModel:
    """One to three layers, each of any architecture that its options allow."""
    factories = [
        partial(ARCHITECTURES[name], **options)
        for name, options in choose(st.lists(architectures(), min_size=1, max_size=3))
    ]
    heads = choose(st.integers(1, 3))
    sizes = {"vocab_size": choose(st.integers(1, 20)), "ff_dim": choose(st.none() | st.integers(0, 9))}
    sizes |= {"hidden_dim": 4 * heads, "num_layers": len(factories), "num_heads": heads}

    def build() -> LanguageModel:
        model = LanguageModel(factories, **sizes)
        model(torch.zeros(1, 1, dtype=torch.long))
        return model

    model = attempt(build, UNDIVIDED, TOO_LONG, *ODD)
    assume(model is not None)
    return stir(model, choose(SEEDS)).train(choose(st.booleans()))


@given(st.data(), models(), SEEDS)
def test_a_model_decodes_and_generates_what_it_says(data, model, seed):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 12)))
    ids = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    logits, states, steps = model(ids), model.init_state(shape[0]), []
    for column in ids.unbind(1):
        step, states = model.step(column, states)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.prefill(ids)[0], logits[:, -1], rtol=1e-9, atol=1e-9)

    training, new = model.training, data.draw(st.integers(0, 4))
    top_k = data.draw(st.none() | st.integers(1, 30))
    temperature = data.draw(st.just(0) | st.floats(0, 1e300) | st.sampled_from([1.0, 5e-324]))
    text = model.generate(ids, new, temperature, top_k, seed)
    assert torch.equal(text[:, : shape[1]], ids)
    assert text.shape == (shape[0], shape[1] + new)
    assert torch.equal(model.generate(ids, new, temperature, top_k, seed), text)
    assert model.training == training
    said = model(text)
    for place in range(shape[1], shape[1] + new):
        kept = model.vocab_size if top_k is None or temperature == 0 else min(top_k, model.vocab_size)
        best = said[:, place - 1].topk(1 if temperature == 0 else kept).values[:, -1]
        assert (said[:, place - 1].gather(1, text[:, place, None])[:, 0] >= best - 1e-9).all()


#: Arguments of `generate`, of `LanguageModel` and of `LanguageModule`, and what they must not be.
NO_NUMBER = st.sampled_from([True, "1", (1,), math.nan, math.inf, -math.inf])
BELOW_0 = NO_NUMBER | st.floats(max_value=-1e-300)
NO_SHARE = NO_NUMBER | st.floats().filter(lambda value: not 0 <= value <= 1)
WRONG = {
    **{name: NO_SIZE for name in ("vocab_size", "hidden_dim", "num_layers", "num_heads")},
    "ff_dim": NO_SIZE.filter(lambda value: value is not None and value != 0),
    **{name: NO_SIZE.filter(lambda value: value != 0) for name in ("warmup_steps", "max_new_tokens", "seed")},
    "top_k": NO_SIZE.filter(lambda value: value is not None),
    **{name: BELOW_0 | st.none() for name in ("temperature", "weight_decay")},
    "learning_rate": BELOW_0 | st.sampled_from([None, 0]),
    **{name: NO_SHARE | st.none() for name in ("min_learning_rate", "beta1", "beta2", "dropout")},
    "beta": BELOW_0 | st.just(0),
    "attention": st.sampled_from([None, 3, "bsbr", "nothing", {}, [None], []]),
}
RIGHT = (LanguageModule, "bsbr")  # it names an architecture


@given(st.data(), st.sampled_from(list(WRONG)))
def test_a_wrong_argument_is_named(data, name):
    value = data.draw(WRONG[name])
    right = {"attention": ARCHITECTURES["standard"], "vocab_size": 5, "hidden_dim": 4, "num_layers": 1, "num_heads": 2}
    if name in ("temperature", "max_new_tokens", "top_k", "seed"):
        model = LanguageModel(**right)
        with pytest.raises(ValueError, match=f"{name} must be"):
            model.generate(torch.zeros(1, 1, dtype=torch.long), **{"max_new_tokens": 1} | {name: value})
        return
    sizes = inspect.signature(LanguageModel).parameters
    for cls in (LanguageModel, LanguageModule, partial(ARCHITECTURES["hopfield"], 4, 2)):
        takes = name in {*inspect.signature(cls).parameters, *(sizes if cls is LanguageModule else ())}
        if takes and (cls, value) != RIGHT:
            with pytest.raises(ValueError, match=f"{name} must"):
                cls(**({} if name == "beta" else right) | {name: value})


IDS = st.integers(-3, 8) | st.sampled_from([-(2**63), 2**63 - 1])


@given(st.lists(st.lists(IDS, min_size=2, max_size=2), max_size=3), st.sampled_from([torch.int64, torch.float32]))
def test_ids_are_checked(rows, dtype):
    model, ids = LanguageModel(ARCHITECTURES["bsbr"], 5, 4, 1, 2), torch.tensor(rows, dtype=dtype)
    if rows and dtype == torch.int64 and ids.min() >= 0 and ids.max() < 5:
        assert model(ids).shape == (*ids.shape, 5)
        return
    for call in (model, model.prefill, model.get_attention_weights, partial(model.generate, max_new_tokens=1)):
        with pytest.raises(ValueError, match="input_ids must"):
            call(ids)
        assert model.training


@cache
def trainer() -> Trainer:
    return Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")


SHARES = st.floats(0, 1, exclude_max=True)
NUMBERS = st.fixed_dictionaries(
    {"learning_rate": st.floats(1e-30, 1e30), "weight_decay": st.floats(0, 1e30)},
    optional={name: SHARES for name in ("dropout", "min_learning_rate", "beta1", "beta2")},
)
COUNTS = st.fixed_dictionaries({}, optional={"ff_dim": st.none() | st.integers(0, 9), "warmup_steps": st.integers(0)})


@given(st.lists(architectures(), min_size=1, max_size=3), NUMBERS, COUNTS, st.sampled_from([float, np.float64]))
def test_a_module_comes_back_as_it_was_saved(chosen, numbers, counts, kind):
    """Also where its numbers came from numpy, whose types a checkpoint that runs no code cannot hold."""

    def given_as(values: dict[str, Any]) -> dict[str, Any]:
        return {name: kind(value) if type(value) is float else value for name, value in values.items()}

    def build() -> LanguageModule:
        factories = [partial(ARCHITECTURES[name], **given_as(options)) for name, options in chosen]
        sizes = {"hidden_dim": 16, "num_layers": len(chosen), "num_heads": 2}
        module = LanguageModule(factories, 7, **sizes, **given_as(numbers), **counts)
        module(ids)
        return module.eval()

    ids = torch.arange(7)[None]
    module = attempt(build, UNDIVIDED, TOO_LONG, *ODD)
    assume(module is not None)
    assert {name: module.hparams[name] for name in {**numbers, **counts}} == {**numbers, **counts}
    with TemporaryDirectory() as folder:
        module.trainer = trainer()
        trainer().strategy.connect(module)
        trainer().save_checkpoint(Path(folder) / "a.ckpt")
        again = LanguageModule.load(Path(folder) / "a.ckpt")
    assert again.hparams == module.hparams
    for attention, (name, options) in zip(again.hparams["attention"], chosen, strict=True):
        assert attention == {
            "class_path": f"bsbr_pl.attention.{name}.{ARCHITECTURES[name].__name__}",
            "init_args": options,
        }
    assert torch.equal(again(ids), module(ids))
