"""Commands that need an extra say so where it is not installed."""

import sys

import pytest

from bsbr_pl.__main__ import main


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["export", "trained.ckpt", "exported"], "transformers", "hf"),
        (["lm-eval", "trained.ckpt", "--tasks=my_text"], "lm_eval", "lm-eval"),
    ],
)
def test_a_missing_extra_is_named(command, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        main(command)
    error = capsys.readouterr().err.splitlines()[0]
    assert error == f"bsbr: error: {package} is not installed: pip install 'bsbr-pl[{extra}]'"
