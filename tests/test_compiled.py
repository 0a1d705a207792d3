"""The compiled form: it is the model, and the comparison of its gradients may not fit into memory."""

import pytest
import torch

from bsbr_pl.attention import StandardAttention
from bsbr_pl.compiled import CompiledHidden
from bsbr_pl.model import LanguageModel

MARK = 9
OPTIONS = [{}, {"bottleneck": True}, {"positions": 12}, {"norm": "rms", "ff_dim": 0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_compiled_form_is_the_model(options, monkeypatch):
    """With a compiler that changes nothing; a bottleneck was once left out."""
    monkeypatch.setattr(torch, "compile", lambda form: form)
    torch.manual_seed(0)
    model = LanguageModel(StandardAttention, MARK + 1, 16, num_layers=2, num_heads=2, **options)
    ids = torch.randint(0, MARK, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 4] = MARK
    assert torch.equal(CompiledHidden(model)(ids), model.hidden(ids))
