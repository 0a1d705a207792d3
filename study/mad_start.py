"""train.py, with the weights of a new model as mad-lab starts them, for `study/run.py --train study/mad_start.py`.

Embeddings start at N(0, 0.02^2), all linear maps, the head's too, at U(-1, 1) / sqrt(fan_in), and the weights of the
last norm at 1 (github.com/athms/mad-lab, mad/model/language_model.py). `LanguageModel` describes its own start.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from bsbr_pl.model import LanguageModel


@torch.no_grad()
def start(model: LanguageModel, out_init: float) -> None:
    """Replaces `LanguageModel._init_weights`; `out_init` has no effect."""
    nn.init.normal_(model.embedding.weight, std=0.02)
    nn.init.ones_(model.norm.weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)


LanguageModel._init_weights = start  # type: ignore[method-assign]

if __name__ == "__main__":
    train.command_line()
