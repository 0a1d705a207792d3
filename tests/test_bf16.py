"""Mixed bfloat16 trains every architecture, to the loss of fp32; the long form is study/bf16.py."""

from pathlib import Path

import pytest

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
