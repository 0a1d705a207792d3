"""Every YAML of configs/data is read by the command line's own parser and makes its data module."""

from dataclasses import fields
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from bsbr_pl.data import MQARData, TextData, TokenData
from bsbr_pl.data.corpora import BUILT_IN
from bsbr_pl.data.opening import Options, open_source
from bsbr_pl.data.sources import HeldOut, OneFile, Rows

FILES = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
HUB = {"wikitext2", "wikitext103", "tinystories", "fineweb_edu", "pg19"}


def read(file: Path) -> TokenData:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate(parser.parse_path(file)).data
    assert isinstance(data, TokenData)
    return data


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = read(file)
    if data.hparams.get("source") in BUILT_IN:
        return  # they would prepare 20 MB; test_corpora reads them
    if not isinstance(data, TextData):
        batch = next(iter(data.train_dataloader()))
        assert batch["input_ids"].shape[0] == data.batch_size
        assert batch["input_ids"].max() < data.vocab_size
        return
    h = data.hparams
    options = Options(**{field.name: h[field.name] for field in fields(Options)})
    monkeypatch.chdir(tmp_path)
    if file.stem not in HUB:
        (tmp_path / h["source"]).write_text("a text\n" * 100)
    source = open_source(h["source"], HeldOut(h["val_fraction"], h["test_fraction"]), options)
    if file.stem in HUB:
        assert isinstance(source, Rows)
        assert source.identity()["hub"] == h["source"]
    else:
        assert isinstance(source, OneFile)
        assert (tmp_path / h["source"]).exists()


def test_all_are_found() -> None:
    assert {"packages", "gcide", "stdlib", "enwik8", "mqar", "mqar_2023", "mqar_state_size", "needle"} | HUB <= {
        file.stem for file in FILES
    }


def test_unknown_argument_and_wrong_type_are_refused(tmp_path: Path) -> None:
    text = next(file for file in FILES if file.stem == "mqar").read_text()
    for change in ("    fillers: 1\n", "    random_filler: maybe\n"):
        (tmp_path / "bad.yaml").write_text(text + change)
        with pytest.raises(Exception, match=change.strip().split(":")[0]):
            read(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text(text.replace("[[64, 4, 100000]]", "[[64, 40, 100000]]"))
    with pytest.raises(ValueError, match=r"segment \(T=64, N=40\)"):
        read(tmp_path / "bad.yaml")
    assert isinstance(read(FILES[[file.stem for file in FILES].index("mqar")]), MQARData)
