"""AttentionSpec: the same attention from a class, a partial, a key, a dict or a spec, and back from what is stored."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES, BSBRAttention, HopfieldAttention, StandardAttention
from bsbr_pl.configuration import by_key
from bsbr_pl.evals.subject import describe_model, layer_names
from bsbr_pl.limits import count_parameters
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import all_sizes
from bsbr_pl.module import LanguageModule
from bsbr_pl.spec import AttentionSpec, plain_specs, specs_of

BSBR = "bsbr_pl.attention.bsbr.BSBRAttention"


class Outside(StandardAttention):
    """An architecture of somebody else's, in a module of theirs."""


@pytest.mark.parametrize(
    "value",
    [
        BSBRAttention,
        partial(BSBRAttention, chunk_size=128),
        "bsbr",
        BSBR,
        {"class_path": BSBR, "init_args": {"chunk_size": 128}},
        {"class_path": "bsbr_pl.attention.BSBRAttention", "init_args": {}},
        {"class_path": "bsbr", "init_args": None},
        {"class_path": BSBR},
        AttentionSpec(BSBRAttention),
        partial(copy.deepcopy, BSBRAttention),  # as jsonargparse binds the class to a function of its own
    ],
    ids=lambda value: "a function bound to the class" if getattr(value, "func", None) is copy.deepcopy else str(value),
)
def test_every_way_to_name_an_attention_gives_the_same_spec(value):
    spec = AttentionSpec.of(value)
    assert spec.cls is BSBRAttention
    assert spec.settings == AttentionSpec(BSBRAttention).settings
    assert str(spec) == spec.key == "bsbr"


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_a_spec_survives_the_way_to_a_checkpoint_and_back(key, tmp_path):
    spec = AttentionSpec(ARCHITECTURES[key], {"rope": False} if "rope" in AttentionSpec.of(key).settings else {})
    cls = ARCHITECTURES[key]
    assert spec.plain() == {
        "class_path": f"bsbr_pl.attention.{key}.{cls.__name__}",
        "init_args": dict(spec.options),
    }
    torch.save(spec.plain(), tmp_path / "spec.pt")
    assert AttentionSpec.of(torch.load(tmp_path / "spec.pt", weights_only=True)) == spec
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(AttentionSpec.of(spec.plain())) == hash(spec)
    built = spec(16, 2)
    assert type(built) is cls
    assert {p.shape for p in built.parameters()} == {p.shape for p in cls(16, 2, **spec.options).parameters()}


def test_the_words_of_a_spec_are_the_key_and_what_is_not_the_default():
    assert str(AttentionSpec(BSBRAttention, {"chunk_size": 64, "retrieval_top_k": None})) == "bsbr(chunk_size=64)"
    assert str(AttentionSpec(HopfieldAttention, {"beta": 0.5, "num_updates": 3})) == "hopfield(beta=0.5, num_updates=3)"
    assert str(AttentionSpec(Outside, {"rope": False})) == "Outside(rope=False)"


@pytest.mark.parametrize(
    ("attention", "architecture", "layers"),
    [
        ("3x delta_net + standard", "3x delta_net + standard", ["delta_net"] * 3 + ["standard"]),
        ("delta_net + 3x standard", "delta_net + 3x standard", ["delta_net"] + ["standard"] * 3),
        (["standard"] * 4, "standard", ["standard"]),
        (AttentionSpec(Outside, {"rope": False}), "Outside(rope=False)", [f"{__name__}.Outside(rope=False)"]),
    ],
)
def test_a_report_tells_hybrids_and_packages_apart(attention, architecture, layers):
    arguments = {"attention": specs_of(attention), "vocab_size": 7, "hidden_dim": 8, "num_layers": 4, "num_heads": 2}
    found = describe_model("x", "y", arguments, LanguageModel(**arguments))
    assert found["architecture"] == architecture
    assert layer_names(attention) == layers


def test_settings_are_all_options_with_their_defaults():
    settings = AttentionSpec(StandardAttention, {"bias": True}).settings
    assert settings == {
        **{"rope": True, "bias": True, "conv_size": 1, "conv_init": "identity", "rope_base": 10_000.0},
        **{"rope_fraction": 1.0, "qk_norm": False, "num_kv_heads": None, "sink": False, "output_gate": False},
    }
    assert AttentionSpec(BSBRAttention, {"chunk_size": 7}).settings["chunk_size"] == 7


def test_a_list_has_one_spec_a_layer():
    value = [partial(BSBRAttention, chunk_size=4), "standard"]
    assert specs_of(value) == (AttentionSpec(BSBRAttention, {"chunk_size": 4}), AttentionSpec(StandardAttention))
    assert plain_specs(value) == [
        {"class_path": BSBR, "init_args": {"chunk_size": 4}},
        {"class_path": "bsbr_pl.attention.standard.StandardAttention", "init_args": {}},
    ]
    assert specs_of(plain_specs(value)) == specs_of(value) == specs_of(specs_of(value))
    model = LanguageModel(specs_of(value), 17, hidden_dim=16, num_layers=2, num_heads=2)
    assert [type(attention) for attention in model.attentions] == [BSBRAttention, StandardAttention]


def test_a_spec_does_not_change_with_what_it_was_made_of():
    options = {"chunk_size": 4}
    spec = AttentionSpec(BSBRAttention, options)
    options["chunk_size"] = 8
    spec.plain()["init_args"]["chunk_size"] = 16
    spec.settings["chunk_size"] = 32
    assert spec == AttentionSpec(BSBRAttention, {"chunk_size": 4})


def test_numbers_of_numpy_become_plain(tmp_path):
    spec = AttentionSpec.of(partial(HopfieldAttention, beta=np.float64(0.5), num_updates=np.int64(2)))
    assert [type(value) for value in spec.options.values()] == [float, int]
    torch.save(spec.plain(), tmp_path / "spec.pt")
    assert torch.load(tmp_path / "spec.pt", weights_only=True)["init_args"] == {"beta": 0.5, "num_updates": 2}


def test_an_attention_from_elsewhere_is_found_where_its_module_is_imported():
    spec = AttentionSpec(Outside, {"rope": False})
    assert spec.key == spec.plain()["class_path"] == f"{__name__}.Outside"
    rebuilt = AttentionSpec.of(spec.plain())(16, 2)
    assert type(rebuilt) is Outside
    assert rebuilt.rope is False


def test_a_registered_class_is_found_wherever_it_was_defined(monkeypatch):
    class Mine(StandardAttention):
        pass

    spec = AttentionSpec(Mine)
    with pytest.raises(ValueError, match=r"<locals>\.Mine'$"):
        AttentionSpec.of(spec.plain())
    monkeypatch.setitem(ARCHITECTURES, "mine", Mine)
    assert AttentionSpec.of(spec.plain()) == spec == AttentionSpec.of("mine")
    assert str(spec) == "mine"


def test_a_registered_module_needs_no_trust(monkeypatch):
    """Who registers a class has run its code; on a command line it becomes a ForeignAttention."""
    monkeypatch.setitem(ARCHITECTURES, "identity", torch.nn.Identity)
    assert AttentionSpec.of("identity") == AttentionSpec(torch.nn.Identity)
    path = "torch.nn.modules.linear.Identity"
    assert by_key("identity") == {
        "class_path": "bsbr_pl.foreign.ForeignAttention",
        "init_args": {"module": path, "options": {}},
    }
    assert AttentionSpec.of(path) == AttentionSpec.of("identity")


@pytest.mark.parametrize(
    "class_path", ["torch.nn.Linear", "os.system", "antigravity.fly", "Nowhere", "bsbr_pl.nothing.X", "bsrb", "", 3]
)
def test_a_name_of_no_attention_is_refused_and_not_imported(class_path):
    words = "attention must be one of standard, .*, bsbr, or a class of a package that is trusted .*, got "
    with pytest.raises(ValueError, match=words):
        AttentionSpec.of({"class_path": class_path, "init_args": {}})


@pytest.mark.parametrize("value", [lambda d, h: StandardAttention(d, h), torch.Tensor, 3, None, {}, partial(print)])
def test_what_is_no_attention_is_refused(value):
    with pytest.raises(ValueError, match=r"^attention must be an Attention class or a functools.partial of one, got "):
        AttentionSpec.of(value)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("3x gated_delta_net + standard", ["gated_delta_net"] * 3 + ["standard"]),
        ("[gla, standard]", ["gla", "standard"]),
        ("bsbr+standard", ["bsbr", "standard"]),
        ("2x kda", ["kda", "kda"]),
        (" sliding_window + 2x fox ", ["sliding_window", "fox", "fox"]),
    ],
)
def test_a_hybrid_in_one_line(words, names):
    assert [spec.key for spec in specs_of(words)] == names
    module = LanguageModule(words, vocab_size=11, hidden_dim=8, num_heads=2, num_layers=2 * len(names))
    layers = [type(attention) for attention in module.model.attentions]
    assert layers == [ARCHITECTURES[name] for name in names] * 2
    again = LanguageModule(**module.hparams)
    assert [type(attention) for attention in again.model.attentions] == layers
    sizes = all_sizes("test", vocab_size=11, hidden_dim=8, num_heads=2, num_layers=2 * len(names))
    assert count_parameters(words, sizes) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("words", ["BSBRAttention + gla", "[BSBRAttention, gla]", ["BSBRAttention", "gla"]])
def test_a_list_may_name_classes(words):
    """As `--model.attention=BSBRAttention` does; jsonargparse finds a class by its name."""
    assert by_key(words) == ["BSBRAttention", "bsbr_pl.attention.gla.GLAAttention"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("3x gated_delta_net + mamba", "attention must be one of .* got 'mamba'"),
        ("3x + standard", "write a hybrid as .* got '3x'"),
        ("3 x bsbr + standard", "write a hybrid as '3x gated_delta_net \\+ standard', got '3 x bsbr'"),
        ("bsbr + ", "write a hybrid as .* got ''"),
        ("0x bsbr + standard", "write a hybrid as .* got '0x bsbr'"),
        ("gla, standard", "write a hybrid as .* got 'gla, standard'"),
        ("9999x bsbr", "a hybrid has 1 to 1024 layers, got 9999"),
        ("99999x bsbr", "write a hybrid as"),
    ],
)
def test_a_hybrid_that_is_none(words, message):
    with pytest.raises(ValueError, match=message):
        specs_of(words)
