"""Fair budgets: what was solved is counted again on real models, and against every setting there is."""

import functools
import json
from functools import partial

import pytest
import torch
import yaml

from bsbr_pl.__main__ import main
from bsbr_pl.attention import ARCHITECTURES, BSBRAttention, LinearAttention, StandardAttention
from bsbr_pl.evals import compare_models, matching
from bsbr_pl.evals.matching import DEFAULTS, budgets, get_size, match, reach_option, set_size, size_values
from bsbr_pl.model import LanguageModel
from bsbr_pl.module import LanguageModule
from bsbr_pl.spec import AttentionSpec

TOKENS = 64
SIZES = {"vocab_size": 32, "hidden_dim": 32, "num_layers": 1, "num_heads": 2}
OPTIONS = {"sliding_window": {"window_size": 16}, "gau": {"key_dim": 16}, "bsbr": {"chunk_size": 20}}
OPTIONS["log_linear"] = {"key_dim": 8}  # a state for each of 7 levels
SMALL = {name: {"attention": partial(cls, **OPTIONS.get(name, {})), **SIZES} for name, cls in ARCHITECTURES.items()}
OPTION = {"sliding_window": "window_size", "gau": "chunk_size", "bsbr": "chunk_size"}


@functools.cache
def solved(quantity):
    return match(quantity, SMALL, TOKENS, "standard")


def counted(quantity, arguments, tokens=TOKENS):
    """On a model with memory; the state as it is after a prefill of every length."""
    torch.manual_seed(0)
    model = LanguageModel(**arguments)
    if quantity == "params":
        return sum(parameter.numel() for parameter in model.parameters())
    if quantity == "flops":
        return model.flops(tokens)
    largest = 0
    with torch.no_grad():
        state = model.init_state(1)
        for _ in range(tokens):
            state = model.step(torch.zeros(1, dtype=torch.long), state)[1]
            numbers = sum(part.numel() for one in state for part in one if isinstance(part, torch.Tensor))
            largest = max(largest, 4 * numbers)
    return largest


@pytest.mark.parametrize("quantity", ["params", "flops", "state_bytes"])
def test_what_is_solved_is_what_the_models_have(quantity):
    found = solved(quantity)
    assert list(found) == list(SMALL)
    target = counted(quantity, found["standard"].arguments)
    assert not found["standard"].changed
    assert found["standard"].mismatch_percent == 0
    for name, one in found.items():
        value = counted(quantity, one.arguments)
        assert one.value == value, name
        assert one.reference == target
        assert one.mismatch_percent == pytest.approx(100 * (value - target) / target)
        given = budgets(SMALL[name], TOKENS)[quantity]
        assert abs(value - target) <= abs(given - target), "never further away than what was given"
        assert abs(one.mismatch_percent) < (13 if name == "gau" else 5), "its width, in whole heads, has coarse steps"
        assert one.problem is None
        changed = {key for key in one.arguments if key in SIZES and one.arguments[key] != SIZES[key]}
        assert changed <= set(one.changed)
        assert "attention" not in one.changed


def test_the_size_follows_from_the_quantity_and_the_architecture():
    changed = {name: set(one.changed) for name, one in solved("params").items()}
    assert changed["bsbr"] == changed["delta_net"] == {"ff_dim"}, "the attention is left alone"
    assert set(solved("flops")["gau"].changed) == {"hidden_dim"}, "it has no feed-forward networks"
    changed = {name: set(one.changed) for name, one in solved("state_bytes").items()}
    assert {name: changed[name] for name in OPTION} == {name: {option} for name, option in OPTION.items()}
    assert changed["linear"] == {"num_heads", "hidden_dim"}
    assert changed["hopfield"] == set(), "it has the same already"


def test_the_three_matrices_of_a_gated_network_are_counted():
    """As many parameters in the networks and the head: 2 * 32 * 90 = 3 * 32 * 60, and a head of its own counts too."""
    plain, gated = SMALL["standard"] | {"ff_dim": 90}, SMALL["standard"] | {"ff_activation": "swiglu"}
    found = match("params", {"plain": plain, "gated": gated}, 16, "plain")["gated"]
    assert (found.changed, found.value) == ({"ff_dim": 60}, found.reference)
    found = match("params", {"plain": plain, "gated": gated | {"tie_embeddings": False}}, 16, "plain")["gated"]
    assert found.arguments["ff_dim"] == 60 - round(32 * 32 / (3 * 32))


@pytest.mark.parametrize("name", OPTION)
def test_no_other_setting_of_the_option_is_nearer(name):
    tokens = 90
    reference = {"attention": LinearAttention, **SIZES, "hidden_dim": 64, "num_heads": 1}
    target = budgets(reference, tokens)["state_bytes"]
    found = match("state_bytes", {"r": reference, name: SMALL[name]}, tokens, "r")[name]
    given = DEFAULTS | SMALL[name] | {"attention": AttentionSpec.of(SMALL[name]["attention"])}
    every = size_values(given, OPTION[name], tokens)
    values = [budgets(set_size(given, OPTION[name], i), tokens)["state_bytes"] for i in every]
    nearest = min(values, key=lambda value: abs(value - target))
    assert set(found.changed) == {OPTION[name]}
    assert found.value == nearest


def test_more_of_the_reference_asks_for_more():
    """Along a growing reference, every size rises."""
    for quantity, name, size, widths in (
        ("params", "bsbr", "ff_dim", (32, 40, 48)),
        ("flops", "gau", "hidden_dim", (32, 40, 48)),
        ("state_bytes", "sliding_window", "window_size", (16, 20, 24)),
    ):
        settings = []
        for width in widths:
            reference = {"attention": StandardAttention, **SIZES, "hidden_dim": width}
            one = match(quantity, {"r": reference, name: SMALL[name]}, 40, "r")[name]
            settings.append(get_size(one.arguments, size))
        assert settings == sorted(set(settings)), (quantity, name)


def test_the_most_that_a_state_holds_is_found_in_the_last_chunk():
    for name in ARCHITECTURES:
        for chunk in (5, 16, 70):
            options = {OPTION[name]: chunk} if name in OPTION else {}
            arguments = {"attention": partial(ARCHITECTURES[name], **options), **SIZES}
            model = LanguageModel(**arguments)
            for tokens in (1, 15, 16, 63, 100):
                most = 4 * max(model.state_size(t) for t in range(1, tokens + 1))
                assert budgets(arguments, tokens)["state_bytes"] == most, (name, chunk, tokens)


def test_what_was_chosen_stays_unless_it_is_a_size():
    chosen = {"attention": partial(BSBRAttention, chunk_size=8, rope=False), **SIZES, "dropout": 0.1, "ff_dim": 100}
    models = {"standard": SMALL["standard"], "bsbr": chosen}
    found = match("params", models, TOKENS, "standard")["bsbr"]
    assert AttentionSpec.of(found.arguments["attention"]).options == {"chunk_size": 8, "rope": False}
    assert found.arguments["dropout"] == 0.1
    assert set(found.changed) == {"ff_dim"}
    assert chosen["ff_dim"] == 100, "the arguments given are not altered"
    found = match("state_bytes", models, TOKENS, "standard")["bsbr"]
    assert AttentionSpec.of(found.arguments["attention"]).options["rope"] is False
    assert found.arguments["ff_dim"] == 100


def test_what_cannot_be_matched_is_said_with_the_nearest():
    models = {name: SMALL[name] for name in ("linear", "standard", "hopfield")}
    found = match("state_bytes", models, 4096, "linear")
    assert found["linear"].problem is None
    for name in ("standard", "hopfield"):
        assert found[name].changed == {"hidden_dim": 8}, "a quarter of what it was"
        assert found[name].value == 4 * 2 * 4096 * 8
        assert found[name].mismatch_percent > 1000
        assert found[name].problem.startswith(
            f"state_bytes of {name} stays above that of the reference with hidden_dim"
        )
        assert "\n" not in found[name].problem


class Unknown(LinearAttention):
    """Not in the registry, with another name for its chunk."""


@pytest.mark.parametrize("quantity", ["params", "flops", "state_bytes"])
def test_an_unknown_architecture_is_matched_by_widths(quantity):
    models = {"standard": SMALL["standard"], "new": {"attention": Unknown, **SIZES}}
    found = match(quantity, models, TOKENS, "standard")["new"]
    assert abs(found.mismatch_percent) < 5
    assert set(found.changed) <= {"hidden_dim", "num_heads", "ff_dim"}
    layers = {"standard": SMALL["standard"], "mixed": {"attention": [LinearAttention, BSBRAttention], **SIZES}}
    layers["mixed"]["num_layers"] = 2
    mixed = match("params", layers, TOKENS, "standard")["mixed"]
    assert mixed.value == counted("params", mixed.arguments)
    assert json.loads(json.dumps(mixed.as_dict()))["arguments"]["attention"][1]["class_path"].endswith("BSBRAttention")


def test_step_time_is_solved_by_steps_timed_in_the_same_rounds(monkeypatch):
    """With a clock that a model's parameters drive: then it is known which sizes take how long."""
    asked = []

    def times(models, num_tokens, batch_size, rounds, device):
        asked.append(set(models))
        return {name: 1e-6 * budgets(one, num_tokens)["params"] for name, one in models.items()}

    monkeypatch.setattr(matching, "step_times", times)
    models = {name: SMALL[name] for name in ("standard", "gau", "bsbr")}
    models["standard"] = {**SMALL["standard"], "hidden_dim": 64}
    found = match("step_time", models, TOKENS, "standard")
    assert all("standard" in names for names in asked)
    assert asked[-1] == set(models), "what is reported was measured together"
    for name in ("gau", "bsbr"):
        assert abs(found[name].mismatch_percent) <= 5
        assert found[name].arguments["hidden_dim"] > 32


def test_steps_are_real_ones(monkeypatch):
    before = torch.random.get_rng_state()
    stepped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: stepped.append(self))
    found = matching.step_times({"a": SMALL["standard"], "b": SMALL["linear"]}, 8, 2, 2, "cpu")
    assert set(found) == {"a", "b"}
    assert all(0 < seconds < 1 for seconds in found.values())
    assert len({id(optimizer) for optimizer in stepped}) == 2
    assert len(stepped) == 8, "two rounds, two before them"
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("time", SMALL, 8, "standard"), "match must be one of params, flops, state_bytes, step_time, got 'time'"),
        (("params", SMALL, 8, "x"), r"reference must be one of the models \(standard, .*\), got 'x'"),
        (("flops", SMALL, 0, "standard"), "tokens must be a positive integer, got 0"),
        (("params", {"a": {**SMALL["bsbr"], "hidden_dim": 31}}, 8, "a"), "hidden_dim must be a multiple of num_heads"),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        match(*arguments)
    assert "\n" not in str(error.value)


def test_the_command_prints_and_writes_what_can_be_trained(tmp_path, capsys):
    sizes = ["--vocab_size=64", "--hidden_dim=32", "--num_heads=2", "--tokens=64", "--architectures=[gau, bsbr]"]
    options = ['--model_options={"bsbr": {"chunk_size": 16}}', f"--out={tmp_path}"]
    assert main(["match", "--match=params", *sizes, *options]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["bsbr", "gau", "standard"]
    target = None
    for name in ("standard", "gau", "bsbr"):
        text = (tmp_path / f"{name}.yaml").read_text()
        model = yaml.safe_load(text)["model"]
        assert "vocab_size" not in model
        module = LanguageModule(**model, vocab_size=64)
        params = sum(parameter.numel() for parameter in module.model.parameters())
        target = target or params
        assert f"{params:,}" in lines[name]
        assert name == "standard" or f"{100 * (params / target - 1):+.2f} %" in lines[name]
        assert f"{100 * (params / target - 1):+.2f} % against standard" in text.splitlines()[0]
    assert yaml.safe_load((tmp_path / "bsbr.yaml").read_text())["model"]["attention"]["init_args"] == {"chunk_size": 16}
    for wrong, words in (
        (["--match=params", "--tokens=0"], "error: "),
        (["--match=params", "--reference=x"], "error: "),
        (["--match=step_time", "--device=banana"], "error: device='banana' cannot be used here: "),
        (["--match=step_time", "--device=cuda:99"], "error: device='cuda:99' cannot be used here: "),
    ):
        with pytest.raises(SystemExit):
            main(["match", *wrong, "--hidden_dim=32"])
        assert words in capsys.readouterr().err.splitlines()[0]


def test_a_comparison_can_be_matched():
    sizes = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "device": "cpu", "rounds": 1}
    results = compare_models((8, 64), ("Standard", "BSBR", "GAU"), ("flops", "state_size"), match="params", **sizes)
    matched = json.loads(json.dumps(results["matched"]))
    assert list(matched) == ["Standard", "BSBR", "GAU"]
    for name, one in matched.items():
        arguments = one["arguments"]
        model = LanguageModel(**{**arguments, "attention": AttentionSpec.of(arguments["attention"])})
        assert sum(parameter.numel() for parameter in model.parameters()) == one["value"]
        assert results[name]["flops"][1] == model.flops(64) - 2 * 64 * model.embedding.weight.numel(), (
            "what was measured"
        )
    assert abs(matched["BSBR"]["mismatch_percent"]) < 1
    assert matched["BSBR"]["arguments"]["attention"]["init_args"] == {"chunk_size": 16}, "reach"
    assert "matched" not in compare_models((8,), ("Standard",), ("flops",), **sizes)
    with pytest.raises(ValueError, match="match must be one of params"):
        compare_models((8,), ("Standard",), ("flops",), match="x", **sizes)


def test_the_option_that_sets_the_reach_is_found():
    for name, cls in ARCHITECTURES.items():
        arguments = DEFAULTS | SIZES | {"attention": AttentionSpec(cls)}
        expected = OPTION | {"moba": "chunk_size", "nsa": "chunk_size"}  # the reach, not the size of the state
        assert reach_option(arguments) == expected.get(name), name
    mixed = DEFAULTS | SIZES | {"attention": (AttentionSpec(LinearAttention), AttentionSpec(BSBRAttention))}
    assert reach_option(mixed) is None


class Banded(StandardAttention):
    """A window under a name of its own, of an even number of tokens."""

    def __init__(self, hidden_dim, num_heads, band=8, repeats=1):
        super().__init__(hidden_dim, num_heads)
        if band % 2:
            raise ValueError(f"band must be even, got {band}")
        self.band = band

    reach = property(lambda self: self.band)
    period = 1

    def state_size(self, num_tokens):
        return 2 * self.hidden_dim * min(num_tokens, self.band)


def test_an_option_of_a_new_architecture_is_matched_whatever_its_name():
    models = {"r": {"attention": StandardAttention, **SIZES, "hidden_dim": 16}, "new": {"attention": Banded, **SIZES}}
    assert reach_option(DEFAULTS | SIZES | {"attention": AttentionSpec(Banded)}) == "band"
    found = match("state_bytes", models, 40, "r")["new"]
    assert found.changed == {"band": 20}, "half the width, so half of 40 tokens"
    assert found.mismatch_percent == 0
