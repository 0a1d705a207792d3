"""The bottleneck of MAD's compression task: its formula, what passes it, and decoding."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bsbr_pl.attention import ARCHITECTURES, StandardAttention
from bsbr_pl.bottleneck import sinusoids
from bsbr_pl.evals.certificate import certify
from bsbr_pl.model import LanguageModel
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.flops import count_flops

MARK = 9


def make(attention=StandardAttention, **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(attention, MARK + 1, 16, num_layers=2, num_heads=2, bottleneck=True, **options).double()


def ids_with_marks() -> torch.Tensor:
    """Rows with a mark at 4, at 2 and 7, at the start, and without one."""
    ids = torch.randint(0, MARK, (4, 12), generator=torch.Generator().manual_seed(1))
    ids[0, 4] = ids[1, 2] = ids[1, 7] = ids[2, 0] = MARK
    return ids


def test_it_is_its_formula() -> None:
    model, ids = make(norm="rms"), ids_with_marks()
    plain = LanguageModel(StandardAttention, MARK + 1, 16, num_layers=2, num_heads=2, norm="rms").double()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "bottleneck" not in name})
    plain.norm = torch.nn.Identity()  # the layers' output
    found, x = model.hidden(ids), plain.hidden(ids)
    first, second = model.bottleneck.decoder[1], model.bottleneck.decoder[4]
    for row, marks in enumerate([[4], [2, 7], [0], []]):
        for t in range(12):
            before = [m for m in marks if m <= t]
            y = x[row, t]
            if before:
                far = t - before[-1]
                angles = [far / 10_000 ** (j / 7) for j in range(8)]
                waves = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
                y = x[row, before[-1]] + waves
                for layer in (first, second):
                    y = F.gelu(F.rms_norm(y, (16,), eps=1e-5) @ layer.weight.mT + layer.bias)
            expected = F.rms_norm(y, (16,), model.norm.weight, eps=1e-5)
            torch.testing.assert_close(found[row, t], expected, rtol=1e-6, atol=1e-6)


def test_nothing_else_passes() -> None:
    """Whatever stands after the mark, the answers are the same; a token before it changes them."""
    model, ids = make(), ids_with_marks()[:1]
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % MARK
    assert torch.equal(model(ids)[:, 4:], model(other)[:, 4:])
    other[:, 0] = (other[:, 0] + 1) % MARK
    assert (model(ids)[:, 4:] != model(other)[:, 4:]).any(-1).all()


@pytest.mark.parametrize("name", ["standard", "bsbr", "delta_net"])
def test_decoding_is_the_same_model(name: str) -> None:
    model, ids = make(ARCHITECTURES[name]), ids_with_marks()
    whole = model(ids)
    for cut in (1, 3, 5, 8, 11):
        logits, states = model.prefill(ids[:, :cut])
        torch.testing.assert_close(logits, whole[:, cut - 1])
        continued, _ = model.prefill(ids[:, cut:], states)
        torch.testing.assert_close(continued, whole[:, -1])
    states = model.init_state(4)
    for t in range(12):
        logits, states = model.step(ids[:, t], states)
        torch.testing.assert_close(logits, whole[:, t])


def test_it_is_causal_and_counted() -> None:
    module = LanguageModule(StandardAttention, MARK + 1, hidden_dim=16, num_layers=1, num_heads=2, bottleneck=True)
    assert certify(module.model).passed
    without = LanguageModel(StandardAttention, MARK + 1, 16, num_layers=1, num_heads=2)
    ids = torch.zeros(1, 64, dtype=torch.long)
    assert module.model.flops(64) - without.flops(64) == 2 * 64 * 2 * 16 * 16
    assert count_flops(module.model, ids) == pytest.approx(module.model.flops(64), rel=0.02)
    assert module.model.state_size(64) - without.state_size(64) == 16 + 1


def test_the_first_loss_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    model = LanguageModel(partial(StandardAttention), 64, 64, num_layers=2, num_heads=2, bottleneck=True)
    ids = torch.randint(0, 64, (64, 32))
    ids[:, 15] = 63
    loss = F.cross_entropy(model(ids)[:, 15:].flatten(0, 1), ids[:, :17].flatten())
    assert float(loss.detach()) == pytest.approx(math.log(64), abs=0.1)


def test_odd_widths_have_positions() -> None:
    waves = sinusoids(torch.tensor([[0, 3]]), torch.zeros(1, 5))
    expected = [[0, 0, 1, 1, 0], [math.sin(3), math.sin(3e-4), math.cos(3), math.cos(3e-4), 0]]
    torch.testing.assert_close(waves[0], torch.tensor(expected))
