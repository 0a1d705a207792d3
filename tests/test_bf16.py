"""Mixed bfloat16 trains every architecture, to the loss of fp32; the long form is study/bf16.py."""

from pathlib import Path

import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import TextData
from study.bf16 import compare

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_mixed_learns_as_fp32_does(name, one_thread, tmp_path):
    text = "".join(path.read_text() for path in sorted((ROOT / "bsbr_pl").rglob("*.py")))
    (tmp_path / "text.txt").write_text(text)
    sizes = {"context_length": 32, "batch_size": 8, "eval_batch_size": 256}
    data = TextData(str(tmp_path / "text.txt"), "bytes", cache_dir=str(tmp_path), **sizes)
    training, validation = compare(name, data, steps=20)
    assert validation[0] < 3.5  # it has learnt something: ln 257 = 5.5
    for fp32, bf16 in (training, validation):
        assert bf16 == pytest.approx(fp32, rel=0.02)  # so early, rounding the first weights moves it as much
        assert bf16 != fp32


def noisy(name):
    """A layer of width 128, whose maps are large enough for its gates and decays to differ among tokens."""
    torch.manual_seed(0)
    attention = ARCHITECTURES[name](128, 1 if name == "gau" else 2)
    for module in attention.modules():
        if isinstance(module, torch.nn.Linear) and name != "rwkv7":
            torch.nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
    return attention


def error(found, expected):
    """Of the last 64 tokens, relative."""
    found, expected = found[:, -64:].float(), expected[:, -64:]
    return float(((found - expected).square().mean() / expected.square().mean()).sqrt())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_long_text_is_as_precise_as_a_short_one(name, one_thread):
    """640 tokens under autocast. A choice of MoBA or NSA may be another one; then a query reads other tokens."""
    attention, x = noisy(name), torch.randn(1, 640, 128, generator=torch.Generator().manual_seed(1))
    exact = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x)
    assert 1e-4 < error(found, exact) < {"moba": 0.2, "nsa": 0.05}.get(name, 0.02)


@torch.no_grad()
def test_fox_decodes_as_precisely_as_it_reads():
    attention, x = noisy("fox"), torch.randn(1, 640, 128, generator=torch.Generator().manual_seed(1))
    exact = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = [], attention.prefill(x[:, :-64])[1]
        for t in range(576, 640):
            y, state = attention.step(x[:, t], state)
            outputs.append(y)
    assert error(torch.stack(outputs, 1), exact) < 0.02


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_fp16_holds_the_numbers_of_every_architecture(name, one_thread):
    attention, x = noisy(name), torch.randn(1, 130, 128, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.float16):
        assert attention(x).isfinite().all()
