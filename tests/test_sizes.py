"""Sizes are declared by LanguageModel alone: everything else takes its names, its types and its defaults from there."""

import inspect
import sys
from pathlib import Path

import pytest
import yaml

import train
from bsbr_pl import BSBRModel
from bsbr_pl.attention import StandardAttention
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import SIZES, all_sizes
from bsbr_pl.module import LanguageModule

ROOT = Path(__file__).parent.parent
NAMES = [
    *("vocab_size", "hidden_dim", "num_layers", "num_heads", "ff_dim"),
    *("dropout", "positions", "ff_activation", "ff_bias", "out_init", "norm", "tie_embeddings", "bottleneck"),
]
OWN = {
    **{"learning_rate": 3e-3, "min_learning_rate": 0.0, "warmup_steps": 50, "weight_decay": 0.1},
    **{"beta1": 0.9, "beta2": 0.95, "compile": "auto"},
}


def defaults() -> dict[str, object]:
    """Of the sizes that have one, read from the signature of LanguageModel."""
    parameters = inspect.signature(LanguageModel).parameters
    return {name: parameters[name].default for name in NAMES[1:]}


def printed(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", *options])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


def test_the_sizes_are_the_arguments_of_the_language_model():
    assert [size.name for size in SIZES] == NAMES
    assert all_sizes("X", vocab_size=10) == {"vocab_size": 10, **defaults()}
    module = LanguageModule(StandardAttention, 17, hidden_dim=8, num_layers=1, num_heads=1)
    kept = dict(module.hparams)
    assert kept.pop("attention")["class_path"] == "bsbr_pl.attention.standard.StandardAttention"
    assert kept == {"vocab_size": 17, **defaults(), "hidden_dim": 8, "num_layers": 1, "num_heads": 1, **OWN}


def test_the_printed_configuration_holds_every_size_and_its_default(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "BASE_CONFIG", tmp_path / "none.yaml")  # base.yaml sets some of them
    config = yaml.safe_load(printed(capsys, "--model.attention=standard", "--data=TextData", "--print_config"))
    found = dict(config["model"])
    assert found.pop("attention")["class_path"] == "bsbr_pl.attention.StandardAttention"
    assert found == {**defaults(), **OWN}


def test_the_help_shows_every_size_with_its_words_type_and_default(capsys):
    said = " ".join(printed(capsys, "--help").split())
    for name in NAMES[1:]:
        assert f"--model.{name} " in said
    assert "--model.num_layers NUM_LAYERS number of layers. (type: int, default: 2)" in said
    assert "4 * hidden_dim if None (`swiglu`: 8/3 * hidden_dim), 0 for none. (type: int | null, default: null)" in said
    assert "(type: bool, default: False)" in said
    assert "--model.vocab_size" not in said, "the data gives it"
    assert "--model.sizes" not in said


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.hiden_dim=8", "there is no option --model.hiden_dim: did you mean --model.hidden_dim?"),
        ("--model.ff_dims=8", "there is no option --model.ff_dims: did you mean --model.ff_dim?"),
        ("--model.sizes={}", "there is no option --model.sizes"),
        ("--model.ff_bias=3", "model.ff_bias=3: must be true or false"),
    ],
)
def test_a_mistyped_size_is_refused_with_a_suggestion(option, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "--model.attention=standard", option])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_mistyped_size_in_python_is_refused_with_the_known_ones():
    known = ", ".join(NAMES)
    with pytest.raises(TypeError, match=f"^LanguageModule has no argument 'hiden_dim'; it has {known}$"):
        LanguageModule(StandardAttention, 17, hiden_dim=8)
    with pytest.raises(TypeError, match=f"^BSBRModel has no argument 'hiden_dim'; it has {known}, chunk_size, "):
        BSBRModel(17, hiden_dim=8)
    with pytest.raises(TypeError, match="vocab_size"):
        LanguageModule(StandardAttention)
    with pytest.raises(TypeError, match="positional argument"):  # no size can be taken for a learning rate
        LanguageModule(StandardAttention, 17, 8)


def test_sizes_may_be_given_in_order_to_a_named_model():
    model = BSBRModel(17, 8, 1, 2, chunk_size=4)
    assert (model.vocab_size, model.embedding.weight.shape, len(model.attentions)) == (17, (17, 8), 1)
    assert model.attentions[0].chunk_size == 4
