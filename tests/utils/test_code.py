"""What decides a result that is no argument: code, and what it refers to."""

import math

import torch
from torch import nn

from bsbr_pl.attention import LinearAttention
from bsbr_pl.utils import code
from bsbr_pl.utils.code import foreign_code, source_code


class Part(nn.Module):
    scale = 1.0

    def forward(self, x):
        return x * self.scale * math.pi


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return self.part(x)


def closed_over(window):
    class Local(nn.Module):
        def forward(self, x):
            return x * window

    return Local


def test_the_code_of_every_part_counts(monkeypatch):
    before = foreign_code(Whole())
    assert foreign_code(Whole()) == before
    assert [text.splitlines()[0] for text in before] == ["class Whole(nn.Module):", "class Part(nn.Module):"]
    monkeypatch.setattr(Part, "scale", 2.0)
    assert foreign_code(Whole()) != before
    assert foreign_code(LinearAttention(8, 2)) == [], "versions tell the code of this package"


def test_what_is_closed_over_counts():
    three, again, four = (source_code(closed_over(window)) for window in (3, 3, 4))
    assert three == again
    assert {*three.splitlines()} ^ {*four.splitlines()} == {"forward.window = 3", "forward.window = 4"}
    tensors = [source_code(closed_over(torch.full((2,), value))) for value in (1.0, 1.0, 2.0)]
    assert tensors[0] == tensors[1] != tensors[2]


def test_ignored_attributes_do_not_count(monkeypatch):
    before = source_code(Part, ["scale"])
    monkeypatch.setattr(Part, "scale", 2.0)
    assert source_code(Part, ["scale"]) == before


def test_installed_code_is_not_followed(monkeypatch):
    """Of a class in a folder of packages, its own code and that of its bases counts."""
    assert "scale = 1.0" in source_code(Part).splitlines()
    monkeypatch.setattr(code, "INSTALLED", ["tests"])
    assert source_code(Part) == source_code(Part).strip("\n") + "\n"
    assert "scale = 1.0" not in source_code(Part).splitlines()


def typed(times: int, more: int) -> type:
    """A class in no file."""
    names = {"__name__": "typed", "TIMES": times}
    exec(f"class Typed:\n    def f(self, x):\n        return [x * TIMES + {more} for _ in [0]]", names)
    return names["Typed"]


def test_classes_that_were_typed_in_are_told_apart():
    first = source_code(typed(2, 1))
    assert source_code(typed(2, 1)) == first
    assert " at 0x" not in first
    assert len({first, source_code(typed(3, 1)), source_code(typed(2, 5))}) == 3
