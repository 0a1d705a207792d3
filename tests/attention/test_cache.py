"""`append` and the decode states that use it: equal to `torch.cat`, without a copy of the cache for each token."""

import copy

import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES, Attention
from bsbr_pl.attention.parts import append

CACHED = ("standard", "hopfield", "fox", "moba", "nsa")


def tokens(T: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, T, 4, generator=torch.Generator().manual_seed(seed))


def build(name: str) -> tuple[Attention, torch.Tensor]:
    torch.manual_seed(0)
    return ARCHITECTURES[name](16, 2).double(), torch.randn(2, 12, 16, dtype=torch.float64)


@torch.no_grad()
def test_append_is_cat_and_copies_the_cache_a_logarithmic_number_of_times():
    whole = tokens(1200)
    cache, places = whole[:, :, :0], []
    for t in range(1200):
        cache = append(cache, whole[:, :, t : t + 1])
        places.append(cache.data_ptr())
    assert torch.equal(cache, whole)
    grown = [t for t in range(1, 1200) if places[t] != places[t - 1]]
    room, expected = 1 + 0 + 64, []  # T + T // 4 + 64, T tokens when it was made
    while room < 1200:
        expected.append(room)
        room = room + 1 + (room + 1) // 4 + 64
    assert grown == expected


@torch.no_grad()
def test_every_continuation_of_a_cache_keeps_its_own_tokens():
    start = append(tokens(5), tokens(2, 1))
    first = append(start, tokens(1, 2))
    second = append(start, tokens(3, 3))  # first is where start has room
    copied = copy.deepcopy(first)
    third, fourth = append(first, tokens(1, 4)), append(copied, tokens(1, 5))
    part = append(third[:1], tokens(1, 6)[:1])  # views of a part of the cache have no room
    shorter = append(third[:, :, :4], tokens(1, 7))
    beginning = [tokens(5), tokens(2, 1)]
    assert torch.equal(start, torch.cat(beginning, 2))
    assert torch.equal(second, torch.cat([*beginning, tokens(3, 3)], 2))
    assert torch.equal(third, torch.cat([*beginning, tokens(1, 2), tokens(1, 4)], 2))
    assert torch.equal(fourth, torch.cat([*beginning, tokens(1, 2), tokens(1, 5)], 2))
    assert torch.equal(part, torch.cat([third[:1], tokens(1, 6)[:1]], 2))
    assert torch.equal(shorter, torch.cat([tokens(5)[:, :, :4], tokens(1, 7)], 2))


def test_append_keeps_precision_and_leaves_inference_mode():
    with torch.inference_mode():
        cache = append(tokens(3).bfloat16(), tokens(1).bfloat16())
    with torch.no_grad():
        longer = append(cache, tokens(2, 1))
    assert cache.dtype == torch.bfloat16
    assert longer.dtype == torch.float32
    assert torch.equal(longer, torch.cat((tokens(3).bfloat16(), tokens(1).bfloat16(), tokens(2, 1)), 2))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_two_texts_that_continue_one_state_take_turns(name):
    """From a prefill and from a step: the outputs are those of each text alone."""
    attention, one = build(name)
    other = torch.cat((one[:, :6], -one[:, 6:]), 1)
    for prefilled in (6, 5):
        state = attention.prefill(one[:, :prefilled])[1]
        for t in range(prefilled, 6):
            state = attention.step(one[:, t], state)[1]
        states, found = [state, copy.deepcopy(state), state], [[], [], []]
        texts = (one, one, other)
        for t in range(6, 12):
            for i, text in enumerate(texts):
                output, states[i] = attention.step(text[:, t], states[i])
                found[i].append(output)
        for outputs, text in zip(found, texts, strict=True):
            torch.testing.assert_close(torch.stack(outputs, 1), attention(text)[:, 6:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CACHED)
def test_a_gradient_survives_tokens_that_are_appended_later(name):
    """A step with gradients from a state made without, which is then continued in place."""
    attention, x = build(name)
    with torch.no_grad():
        state = attention.prefill(x[:, :5])[1]
        state = attention.step(x[:, 5], state)[1]
    output, _ = attention.step(x[:, 6], state)
    with torch.no_grad():
        for t in range(7, 12):
            state = attention.step(x[:, t], state)[1]
    output.sum().backward()
    found = {name: weight.grad.clone() for name, weight in attention.named_parameters()}
    attention.zero_grad()
    with torch.no_grad():
        state = attention.prefill(x[:, :6])[1]
    attention.prefill(x[:, 6:7], state)[0].sum().backward()
    for name, weight in attention.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_decoding_writes_into_the_cache_without_moving_it(name):
    attention, x = build(name)
    state = attention.prefill(x[:, :3])[1]
    states = []
    for t in range(3, 12):
        states.append(attention.step(x[:, t], states[-1] if states else state)[1])
    for part in ("k", "v"):
        assert len({getattr(state, part).data_ptr() for state in states}) == 1
        assert [getattr(state, part).shape[2] for state in states] == list(range(4, 13))
