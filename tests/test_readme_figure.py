"""README's first figure can be repeated: its command in a short form gives the same number on every machine."""

import pytest
from test_readme import ROOT

import train
from bsbr_pl.data.corpora import BUILT_IN


def test_the_short_form_of_readmes_command(tmp_path, monkeypatch, capsys):
    """10 of the 640 steps, and 4 validation batches; seed 0. The tolerance is for other CPUs and numbers of threads."""
    assert "packages" in BUILT_IN
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    short = ["--trainer.max_steps=10", "--trainer.limit_val_batches=4", "--trainer.accelerator=cpu"]
    cli = train.main(["fit", f"--config={ROOT / 'configs' / 'bsbr_pro.yaml'}", *short, "--data.cache_dir=cache"])
    assert "\n  data      packages, 8,192 token ids, sha256 4cc6f422061b\n" in capsys.readouterr().out
    assert cli.datamodule.sizes["val"] == {"documents": 59, "tokens": 221_844, "bytes": 907_086}
    assert float(cli.trainer.callback_metrics["val/bits_per_byte"]) == pytest.approx(2.6326, abs=0.02)
