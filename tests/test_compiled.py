"""The compiled form: it is the model, and the comparison of its gradients may not fit into memory."""

import pytest
import torch
from test_module import AsOnCuda, loader, module_of, trainer

from bsbr_pl import compiled
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


@pytest.mark.parametrize("compile", [True, "auto"])
def test_without_memory_for_the_comparison_the_compiled_form_is_trained(compile, tmp_path, monkeypatch):
    """One warning, and training goes on with the compiled form."""
    gradients, emptied = compiled._gradients, []

    def out_of_memory(*_):
        monkeypatch.setattr(compiled, "_gradients", gradients)  # the compiled form fits
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled, "_gradients", out_of_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    seen = AsOnCuda(lambda hidden: hidden)
    run = trainer(tmp_path, max_epochs=-1, max_steps=3, callbacks=[seen])
    what = "compiled gradients are not compared"
    with pytest.warns(UserWarning, match=what) as told:
        run.fit(module_of(compile=compile), loader())
    assert len([w for w in told if what in str(w.message)]) == 1
    assert not [w for w in told if "training goes on without torch.compile" in str(w.message)]
    assert seen.used == [True] * 3
    assert emptied
