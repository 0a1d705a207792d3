"""Pictures show the numbers, and the numbers are right for maps that can be computed by hand."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.visualization import (
    attention_inputs,
    draw_maps,
    map_statistics,
    maps_image,
    shrink,
    visualize_attention,
)

mpl.use("Agg")


def test_numbers_of_an_even_map():
    T = 6
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    found = map_statistics(even)
    assert found["entropy_nats"] == pytest.approx(np.mean([math.log(t + 1) for t in range(T)]))
    assert found["distance_tokens"] == pytest.approx(np.mean([t / 2 for t in range(T)]))
    assert found["sparsity"] == pytest.approx(15 / 36)
    assert set(found) == {"entropy_nats", "distance_tokens", "sparsity"}


def test_signs_and_scale_do_not_matter_and_empty_rows_are_left_out():
    signed = torch.tensor([[0.0, 0.0, 0.0], [-3.0, 3.0, 0.0], [0.0, -5.0, 0.0]])
    found = map_statistics(signed[None], exact=torch.eye(3, dtype=torch.bool))
    assert found["entropy_nats"] == pytest.approx(math.log(2) / 2)
    assert found["distance_tokens"] == pytest.approx((0.5 + 1) / 2)
    assert found["outside_share"] == pytest.approx((0.5 + 1) / 2)
    assert set(map_statistics(torch.zeros(2, 3, 3))) == {"sparsity"}, "a number without rows is absent"


def test_induction_is_mass_on_what_followed_the_same_token():
    ids = torch.tensor([7, 8, 9, 7, 8])
    perfect = torch.eye(5)
    perfect[3], perfect[4] = torch.eye(5)[1], torch.eye(5)[2]  # 7 -> the 8 behind the first 7, 8 -> the 9
    assert map_statistics(perfect, ids)["induction_share"] == 1.0
    assert map_statistics(torch.eye(5), ids)["induction_share"] == 0.0
    assert "induction_share" not in map_statistics(torch.eye(3), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inputs_give_the_maps_of_the_model(name):
    torch.manual_seed(0)
    model = LanguageModel(ARCHITECTURES[name], 31, 32, num_layers=2, num_heads=2).eval()
    ids = torch.arange(20)[None] % 31
    pairs = attention_inputs(model, ids)
    ours = torch.stack([attention.attention_map(x) for attention, x in pairs])
    assert torch.equal(ours, model.get_attention_weights(ids))
    assert not any(attention._forward_pre_hooks for attention in model.attentions)


def test_hooks_are_removed_when_the_model_fails():
    model = LanguageModel(ARCHITECTURES["standard"], 31, 32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        attention_inputs(model, torch.tensor([[99]]))
    assert not model.attentions[0]._forward_pre_hooks


def test_shrinking_keeps_the_largest_by_size_and_leaves_short_maps_alone():
    long = np.zeros((1, 10, 10), np.float32)
    long[0, 1, 0], long[0, 9, 9], long[0, 2, 2] = -2.0, 1.0, 0.5
    small = shrink(long, cells=4)
    assert small.shape == (1, 4, 4)
    assert small[0, 0, 0] == -2.0
    assert small[0, 3, 3] == 1.0
    assert np.count_nonzero(small) == 2
    assert shrink(long, cells=10) is long


def test_the_current_figure_shows_every_map_with_one_colour_bar():
    import matplotlib.pyplot as plt

    weights = torch.rand(3, 2, 4, 8, 8).tril()
    figure = plt.figure()
    axes = visualize_attention(weights)
    plt.title("still mine")
    assert plt.gcf() is figure
    assert len(figure.axes) == 2, "the maps and the colour bar"
    drawn = axes.images[0].get_array()
    assert drawn.shape == (3 * 34 - 2, 4 * 34 - 2), "8 tokens of 4 cells, and gaps of 2"
    panel = drawn[34:66:4, 68:100:4].filled(0)
    assert np.allclose(panel, weights[1, 0, 2].numpy()), "layer 1, head 2, first of the batch"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 1", "layer 2"]
    plt.close(figure)
    with pytest.raises(ValueError, match=r"attention_weights must be .* got shape \(4, 8, 8\)"):
        visualize_attention(weights[0, 0])


def test_zeros_are_white_positive_red_negative_blue():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    draw_maps(axes, {0: torch.tensor([[[0.0, 1.0], [-1.0, 0.5]]])})
    image = axes.images[0]
    (zero, positive), (negative, _) = image.to_rgba(image.get_array())[::16, ::16, :3]
    assert np.allclose(zero, 1.0)
    assert positive[0] > 2 * positive[2]
    assert negative[2] > 2 * negative[0]
    plt.close(figure)


def test_labels_are_written_for_short_sequences_whatever_they_hold():
    tokens = ["a", "日", "\n", "$x$", "\ufffd"]
    weights = torch.rand(2, 5, 5).tril()
    labelled, plain = maps_image({0: weights}, tokens), maps_image({0: weights})
    assert labelled.dtype == np.uint8
    assert labelled.shape[2] == 3
    assert labelled.shape != plain.shape
    assert maps_image({0: weights, 1: weights[:1]}).shape[0] > plain.shape[0], "layers may differ in heads"


@pytest.mark.parametrize(
    ("shape", "tokens", "words"),
    [
        ((1, 1, 2, 3, 3), ["a", "b"], "tokens must hold 3, one for each row of a map, got 2"),
        ((1, 0, 2, 3, 3), None, r"attention_weights is empty, its shape is \(1, 0, 2, 3, 3\)"),
        ((1, 1, 2, 0, 0), [], "attention_weights is empty"),
        ((1, 1, 2, 3, 5), None, r"must be \(layers, batch, heads, T, T\), got shape \(1, 1, 2, 3, 5\)"),
    ],
)
def test_maps_and_tokens_fit(shape, tokens, words):
    with pytest.raises(ValueError, match=words):
        visualize_attention(torch.zeros(shape), tokens)


def test_a_map_that_is_not_finite_is_refused_and_any_array_is_drawn():
    weights = torch.zeros(2, 1, 2, 3, 3)
    assert visualize_attention(weights.numpy()) is not None
    weights[1, 0, 1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="the attention weights of layer 1 are not finite, so there is no map"):
        visualize_attention(weights)


def test_pictures_touch_no_random_state_and_no_figure():
    import matplotlib.pyplot as plt

    state, open_figures = torch.get_rng_state(), plt.get_fignums()
    maps_image({0: torch.zeros(1, 3, 3)})
    assert torch.equal(torch.get_rng_state(), state)
    assert plt.get_fignums() == open_figures
