"""The tokens that a run is announced with are those that it reads."""

import pytest

from bsbr_pl.attention import StandardAttention
from bsbr_pl.data import MQARData
from bsbr_pl.module import LanguageModule
from callbacks import RunSummary

ONE, TWO = ((16, 2, 40),), ((16, 2, 20), (32, 2, 20))  # 10 batches of 4 samples each


@pytest.mark.parametrize(
    ("segments", "options", "words", "exact"),
    [
        (ONE, {"max_steps": 3}, "3 steps of 64 tokens: 192 tokens", True),
        # steps of 8 batches and of the 2 that are left of an epoch
        (ONE, {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 8},
         "4 steps of at most 512 tokens: 1,280 tokens", True),
        # steps of 4, 3 and 4 batches
        (ONE, {"max_steps": 3, "limit_train_batches": 0.7, "accumulate_grad_batches": 4},
         "3 steps of at most 256 tokens: 704 tokens", True),
        (ONE, {"max_steps": 5, "overfit_batches": 2}, "5 steps of 64 tokens: 320 tokens", True),
        (TWO, {"max_steps": 10}, "10 steps of at most 128 tokens: at most 1,280 tokens", False),
    ],
)  # fmt: skip
def test_a_run_reads_as_many_tokens_as_announced(segments, options, words, exact, make_trainer, capsys):
    data = MQARData(128, train_segments=segments, test_segments=((64, 2, 4),), batch_size=4)
    module = LanguageModule(StandardAttention, 128, hidden_dim=8, num_layers=1, num_heads=2)
    make_trainer(callbacks=[RunSummary(num_tokens=0)], limit_val_batches=0, **options).fit(module, datamodule=data)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  run ")]
    assert said == f"  run       {words}"
    promised = int(words.split(": ")[1].removeprefix("at most ").removesuffix(" tokens").replace(",", ""))
    assert promised == module.seen["tokens"] if exact else promised > module.seen["tokens"]
