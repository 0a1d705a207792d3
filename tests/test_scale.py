"""configs/scale: each preset has the size that its name says."""

from pathlib import Path

import pytest
import torch
import yaml

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.model import LanguageModel

ROOT = Path(__file__).parents[1]
SIZES = {"1m": 1.1e6, "10m": 10e6, "100m": 100e6, "350m": 330e6}


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_its_size(name):
    preset = yaml.safe_load((ROOT / "configs" / "scale" / f"{name}.yaml").read_text())
    model, data = preset["model"], preset["data"]["init_args"]
    sizes = {key: model[key] for key in ("hidden_dim", "num_layers", "num_heads")}
    with torch.device("meta"):
        built = LanguageModel(ARCHITECTURES["standard"], vocab_size=data["bpe_vocab_size"], **sizes)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert parameters == pytest.approx(SIZES[name], rel=0.1)
    tokens = data["batch_size"] * data["context_length"] * preset["trainer"]["accumulate_grad_batches"]
    text = (ROOT / "configs" / "scale" / f"{name}.yaml").read_text()
    assert f"{tokens:,} tokens per optimiser step" in text
