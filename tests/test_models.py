"""The models by name: the one LanguageModel around the named attention, and what they say to a wrong name."""

import inspect
from functools import partial

import pytest
import torch

import bsbr_pl
from bsbr_pl.attention import ARCHITECTURES, StandardAttention
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import MODELS, model_class

SMALL = {"vocab_size": 17, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "ff_dim": 24}


@pytest.mark.parametrize("name", MODELS)
def test_a_name_is_the_language_model_around_its_attention(name):
    cls = MODELS[name]
    torch.manual_seed(0)
    named = cls(**SMALL, dropout=0.1)
    torch.manual_seed(0)
    plain = LanguageModel(partial(cls.architecture), **SMALL, dropout=0.1)
    assert isinstance(named, LanguageModel)
    assert getattr(bsbr_pl, cls.__name__) is cls
    assert {type(attention) for attention in named.attentions} == {cls.architecture}
    assert named.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(12).reshape(1, 12)
    assert torch.equal(named.eval()(ids), plain.eval()(ids))


def test_every_architecture_has_a_name():
    assert {cls.architecture for cls in MODELS.values()} <= set(ARCHITECTURES.values())
    for key, architecture in ARCHITECTURES.items():  # one without a name of its own goes by its key
        assert model_class(key).architecture is architecture


def test_options_reach_the_attention_of_every_layer():
    model = bsbr_pl.BSBRModel(**SMALL, chunk_size=5, retrieval_top_k=2)
    assert [(a.chunk_size, a.retrieval_top_k) for a in model.attentions] == [(5, 2)] * 2
    assert [a.window_size for a in bsbr_pl.SlidingWindowTransformer(**SMALL, window_size=3).attentions] == [3] * 2


def test_the_signature_shows_the_options_with_their_defaults():
    parameters = inspect.signature(bsbr_pl.BSBRModel).parameters
    assert list(parameters)[:14] == [
        "vocab_size",
        "hidden_dim",
        "num_layers",
        "num_heads",
        "ff_dim",
        "dropout",
        "positions",
        "ff_activation",
        "ff_bias",
        "out_init",
        "norm",
        "tie_embeddings",
        "bottleneck",
        "chunk_size",
    ]
    assert parameters["chunk_size"].default == 128
    assert "options" not in parameters


def test_an_unknown_option_is_an_error_that_lists_the_known():
    with pytest.raises(TypeError, match=r"BSBRModel has no argument 'chunks'.*ff_dim.*chunk_size.*retrieval_top_k"):
        bsbr_pl.BSBRModel(**SMALL, chunks=4)
    with pytest.raises(TypeError, match=r"StandardTransformer has no argument 'window_size'"):
        bsbr_pl.StandardTransformer(**SMALL, window_size=4)
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        bsbr_pl.BSBRModel(**SMALL, chunk_size=0)


def test_names_keys_and_what_is_registered_later(monkeypatch):
    class Mine(StandardAttention):
        def __init__(self, hidden_dim, num_heads, sharpness=1.0):
            super().__init__(hidden_dim, num_heads)
            self.sharpness = sharpness

    monkeypatch.setitem(ARCHITECTURES, "mine", Mine)
    assert model_class("bsbr") is model_class("BSBR") is bsbr_pl.BSBRModel
    assert model_class("sliding_window") is bsbr_pl.SlidingWindowTransformer
    model = model_class("mine")(**SMALL, sharpness=2.0)
    assert [type(a) for a in model.attentions] == [Mine, Mine]
    assert model.attentions[0].sharpness == 2.0
    with pytest.raises(ValueError, match=r"'Transformer'; there are BSBR, Linear.*mine"):
        model_class("Transformer")
