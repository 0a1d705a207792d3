"""Folders in the layouts that data sets have on disk: their own splits by their names, as `datasets` finds them."""

import json
from pathlib import Path

import datasets
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from bsbr_pl.data.base import SPLITS
from bsbr_pl.data.opening import Options, open_source
from bsbr_pl.data.sources import Files, HeldOut, OneFile, OwnFiles, Rows

HELD_OUT = HeldOut(0.05, 0.05)
Layout = dict[str, list[str]]

#: Names of files without .jsonl or .txt, by the split that they must be in.
LAYOUTS: dict[str, Layout] = {
    "files": {"train": ["train"], "val": ["validation"], "test": ["test"]},
    "short names": {"train": ["train"], "val": ["val"], "test": ["eval"]},
    "no test": {"train": ["train"], "val": ["valid"]},
    "no validation": {"train": ["train"], "test": ["test"]},
    "wikitext": {"train": ["wiki.train"], "val": ["wiki.valid"], "test": ["wiki.test"]},
    "parts": {"train": ["train_1", "train_2", "train part"], "val": ["my-dev"], "test": ["test2"]},
    "numbers": {"train": ["train.00000-of-00002", "train.00001-of-00002"], "val": ["c4-validation.00000-of-00001"]},
    "folders": {"train": ["train/a", "train/b"], "val": ["dev/a"], "test": ["test/a"]},
    "deep": {"train": ["x/train/y/a"], "val": ["x/validation/y/a", "x/validation/z"], "test": ["z/test-clean/a"]},
    "two words": {"train": ["train", "training_more"], "val": ["dev", "valid"], "test": ["test", "test-eval"]},
    "long words": {"train": ["training/a"], "test": ["testing/contest"]},
    "shards": {
        "train": ["data/train-00000-of-00002", "data/train-00001-of-00002"],
        "val": ["data/validation-00000-of-00001"],
        "test": ["data/test-00000-of-00001-0a1b2c"],
    },
}


def write(folder: Path, names: list[str], suffix: str) -> None:
    """Files that hold their own name, in lines or in rows."""
    for name in names:
        file = folder / (name + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) if suffix.lower() == ".jsonl" else name)


def read(folder: Path, options: Options | None = None) -> Layout:
    """The texts of each split."""
    found: Layout = {}
    for piece in open_source(str(folder), HELD_OUT, options).pieces():
        assert piece.end
        found.setdefault(piece.split, []).append(piece.text)
    return {split: sorted(texts) for split, texts in found.items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".TXT", ".JSONL"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_folders_own_splits(tmp_path: Path, layout: Layout, suffix: str) -> None:
    names = [name for some in layout.values() for name in some]
    write(tmp_path, names, suffix)
    write(tmp_path, ["README", ".hidden"], ".md")
    write(tmp_path, ["LICENSE", ".gitattributes"], "")
    (tmp_path / "dataset_infos.json").write_text("{}")
    source = open_source(str(tmp_path), HELD_OUT)
    assert isinstance(source, OwnFiles if suffix.lower() == ".txt" else Rows)
    missing = set(SPLITS) - layout.keys()
    if missing and len(layout["train"]) == 1 and suffix.lower() == ".txt":
        return  # cut by position: see test_a_missing_split_is_held_out
    found = read(tmp_path)
    for split in layout.keys() - {"train"}:
        assert found[split] == sorted(layout[split])
    rest = [text for split in ("train", *missing) for text in found.get(split, [])]
    assert sorted(rest) == sorted(layout["train"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_datasets_finds_the_same_splits(tmp_path: Path, layout: Layout) -> None:
    write(tmp_path, [name for some in layout.values() for name in some], ".jsonl")
    files = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), base_path=str(tmp_path))
    ours = {"train": "train", "validation": "val", "test": "test"}
    theirs = {  # sets, because a file with two words for its split is listed twice
        ours[str(split)]: {Path(file).relative_to(tmp_path).as_posix().removesuffix(".jsonl") for file in some}
        for split, some in files.items()
    }
    assert theirs == {split: set(names) for split, names in layout.items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_upper_case_names(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, ["TRAIN", "Validation", "TEST/a"], suffix)
    assert read(tmp_path) == {"train": ["TRAIN"], "val": ["Validation"], "test": ["TEST/a"]}


@pytest.mark.parametrize(
    "names",
    [
        ["latest", "contest", "validate", "retrain", "developer", "medieval"],
        ["json", "test_json", "test_csv"],
        ["a", "b", "training_notes"],
        ["go", "go_test"],
        ["train_test", "other"],
    ],
)
def test_texts_whose_names_mean_no_split(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, names, ".txt")
    source = open_source(str(tmp_path), HELD_OUT)
    assert isinstance(source, Files)
    expected: Layout = {}
    for name in sorted(names):
        expected.setdefault(HELD_OUT.split_of(f"{name}.txt".encode()), []).append(name)
    assert read(tmp_path) == expected


def test_rows_whose_names_mean_no_split(tmp_path: Path) -> None:
    names = ["latest", "contest", "validate"]
    write(tmp_path, names, ".jsonl")
    assert read(tmp_path) == read_one_by_one(names)


def read_one_by_one(texts: list[str]) -> Layout:
    found: Layout = {}
    for text in sorted(texts):
        found.setdefault(HELD_OUT.split_of(text.encode()), []).append(text)
    return found


@pytest.mark.parametrize(
    ("names", "suffix", "without"),
    [
        (["train", "notes"], ".txt", "notes.txt"),
        (["corpus", "test"], ".txt", "corpus.txt"),
        (["wiki", "wiki.valid"], ".txt", "wiki.txt"),
        (["src/a", "test/a"], ".py", "src/a.py"),
        (["train_model", "test_model", "util"], ".py", "util.py"),
        (["train", "extra"], ".jsonl", "extra.jsonl"),
        (["rows", "rows_test"], ".jsonl", "rows.jsonl"),
        (["train", "test", "train-test"], ".jsonl", "train-test.jsonl"),
    ],
)
def test_some_names_with_a_split_and_some_without(tmp_path: Path, names: list[str], suffix: str, without: str) -> None:
    write(tmp_path, names, suffix)
    with pytest.raises(
        ValueError, match=rf"has a split in its name, but '{without}' has none: rename or remove one, or"
    ):
        open_source(str(tmp_path), HELD_OUT)
    everything = read(tmp_path, Options(train_split="all"))
    assert sorted(text for texts in everything.values() for text in texts) == sorted(names)


def test_a_folder_without_a_training_split(tmp_path: Path) -> None:
    write(tmp_path, ["validation", "test"], ".jsonl")
    match = "has no training split, only 'test', 'validation': set train_split to one of them, or to 'all'"
    with pytest.raises(ValueError, match=match):
        open_source(str(tmp_path), HELD_OUT)
    found = read(tmp_path, Options(train_split="validation"))
    assert found.pop("test") == ["test"]
    assert list(found.values()) == [["validation"]]
    assert read(tmp_path, Options(train_split="all")) == read_one_by_one(["validation", "test"])


def test_splits_are_chosen_by_their_own_names(tmp_path: Path) -> None:
    names = ["train", "dev", "val", "test", "data/odd_one-00000-of-00001"]
    write(tmp_path, names, ".jsonl")
    assert read(tmp_path) == {"train": ["train"], "val": ["dev", "val"], "test": ["test"]}  # as `datasets` does
    assert read(tmp_path, Options(val_split="dev")) == {"train": ["train"], "val": ["dev"], "test": ["test"]}
    odd = Options(train_split="odd_one", val_split="test", test_split="val")
    assert read(tmp_path, odd) == {"train": ["data/odd_one-00000-of-00001"], "val": ["test"], "test": ["val"]}
    own = "its own are 'dev', 'odd_one', 'test', 'train', 'val'"
    for option in ("train_split", "val_split", "test_split"):
        with pytest.raises(ValueError, match=f"{option}='nonsense' is no split of source=.*: {own}"):
            open_source(str(tmp_path), HELD_OUT, Options(**{option: "nonsense"}))
    for same in (
        Options(val_split="test", test_split="test"),
        Options(val_split="train"),
        Options(train_split="all", test_split="test"),
    ):
        with pytest.raises(ValueError, match="overlap: use each split once, and nothing else with 'all'"):
            open_source(str(tmp_path), HELD_OUT, same)


@pytest.mark.parametrize("name", [None, ""])
def test_no_name_for_training(tmp_path: Path, name: str) -> None:
    write(tmp_path, ["train", "test"], ".jsonl")
    for source in (str(tmp_path), "owner/name"):
        with pytest.raises(ValueError, match=f"train_split={name!r} is empty: remove it to use 'train'"):
            open_source(source, HELD_OUT, Options(train_split=name))


def test_a_folder_without_splits_takes_no_names_of_splits(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], ".jsonl")
    for option in ("train_split", "val_split", "test_split"):
        with pytest.raises(ValueError, match=f"{option}='validation' has no effect: no file .* has a split in its"):
            open_source(str(tmp_path), HELD_OUT, Options(**{option: "validation"}))


@pytest.mark.parametrize("kind", ["several files", "one file", "rows"])
def test_a_missing_split_is_held_out(tmp_path: Path, kind: str) -> None:
    (tmp_path / "train").mkdir()
    texts = [f"document {i}\n" for i in range(200)]
    if kind == "several files":
        for i, text in enumerate(texts):
            (tmp_path / "train" / f"{i}.txt").write_text(text)
    elif kind == "one file":
        (tmp_path / "train" / "all.txt").write_text("".join(texts))
    else:
        (tmp_path / "train" / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    write(tmp_path, ["valid"], ".jsonl" if kind == "rows" else ".txt")
    pieces = list(open_source(str(tmp_path), HeldOut(0.0, 0.2)).pieces())
    assert [piece.text for piece in pieces if piece.split == "val"] == ["valid"]
    train, test = ([piece.text for piece in pieces if piece.split == split] for split in ("train", "test"))
    if kind == "one file":
        assert "".join(train + test) == "".join(texts)
        assert abs(len(test[0]) - 0.2 * len("".join(texts))) < 1
    else:
        names = [f"{i}.txt" for i in range(200)]
        keys = [f"train/{name}" for name in names] if kind == "several files" else texts
        held_out = {
            text for key, text in zip(keys, texts, strict=True) if HeldOut(0, 0.2).split_of(key.encode()) == "test"
        }
        assert set(test) == held_out
        assert set(train) == set(texts) - held_out


def test_a_fraction_for_a_split_that_is_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path, ["train", "valid"], ".jsonl")
    with pytest.raises(
        ValueError, match=r"val_fraction=0.3 has no effect: source=.* has its own val split. Remove val_fraction"
    ):
        open_source(str(tmp_path), HeldOut(0.3, 0.1))
    assert open_source(str(tmp_path), HeldOut(0.0, 0.1)).held_out == HeldOut(0.0, 0.1)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_only_training_named_is_as_if_none_were(tmp_path: Path, suffix: str) -> None:
    texts = [f"a/train/{i}" for i in range(40)]
    write(tmp_path, texts, suffix)
    named = open_source(str(tmp_path), HELD_OUT)
    assert isinstance(named, Files if suffix == ".txt" else Rows)
    assert named.identity() == open_source(str(tmp_path), HELD_OUT, Options(train_split="all")).identity()
    keys = [f"{text}.txt" for text in texts] if suffix == ".txt" else texts
    assert {piece.text for piece in named.pieces() if piece.split == "train"} == {
        text for key, text in zip(keys, texts, strict=True) if HELD_OUT.split_of(key.encode()) == "train"
    }


def test_a_folder_of_one_text_is_that_text(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("line\n" * 100)
    (tmp_path / "empty.txt").touch()
    folder, file = (open_source(str(path), HELD_OUT) for path in (tmp_path, tmp_path / "only.txt"))
    assert isinstance(folder, OneFile)
    assert folder.identity() == file.identity()
    assert [piece.text for piece in folder.pieces()] == [piece.text for piece in file.pieces()]


def test_splits_that_only_the_card_names(tmp_path: Path) -> None:
    """They would be trained on otherwise."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n"
    write(tmp_path, ["a", "b"], ".jsonl")
    (tmp_path / "README.md").write_text(card + "---\n- split: test\n")
    assert read(tmp_path) == read_one_by_one(["a", "b"])
    (tmp_path / "README.md").write_text(card + "  - split: 'test'\n    path: b.jsonl\n---\n# The data\n")
    with pytest.raises(
        ValueError, match=r"README.md lists files of the splits train, test, but no file name contains a split"
    ):
        open_source(str(tmp_path), HELD_OUT)
    assert read(tmp_path, Options(train_split="all")) == read_one_by_one(["a", "b"])
    (tmp_path / "a.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "b.jsonl").rename(tmp_path / "test.jsonl")
    assert read(tmp_path)["test"] == ["b"]


def table(prefix: str, size: int = 3) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"{prefix} {i}" for i in range(size)], "other": list(range(size))})


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def test_a_saved_data_set(tmp_path: Path) -> None:
    table("row", 50).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "cache-12ab.arrow").write_bytes((tmp_path / "data-00000-of-00002.arrow").read_bytes())
    assert read(tmp_path) == read_one_by_one([f"row {i}" for i in range(50)])
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state.json does not list the files of a saved data set"):
        open_source(str(tmp_path), HELD_OUT)


def test_saved_splits_have_the_names_they_were_saved_by(tmp_path: Path) -> None:
    names = ("train", "validation", "test", "unsupervised")
    datasets.DatasetDict({name: table(name) for name in names}).save_to_disk(tmp_path)
    texts = {name: [f"{name} {i}" for i in range(3)] for name in names}
    assert read(tmp_path) == {"train": texts["train"], "val": texts["validation"], "test": texts["test"]}
    assert read(tmp_path, Options(train_split="unsupervised"))["train"] == texts["unsupervised"]
    with pytest.raises(ValueError, match="its own are 'train', 'validation', 'test', 'unsupervised'"):
        open_source(str(tmp_path), HELD_OUT, Options(val_split="valid"))
    (tmp_path / "dataset_dict.json").write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_dict.json does not list the splits of a saved data set"):
        open_source(str(tmp_path), HELD_OUT)


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    write(tmp_path, ["elsewhere/deep/a"], ".jsonl")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert read(folder) == read_one_by_one(["elsewhere/deep/a"])
    for name, target in (("up", tmp_path), ("self", tmp_path / "elsewhere"), ("back", folder)):
        (tmp_path / "elsewhere" / name).symlink_to(target)
    names = [piece.text for piece in open_source(str(folder), HELD_OUT).pieces()]
    assert set(names) == {"elsewhere/deep/a"}
    (folder / "b.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"b.jsonl is a broken link: restore the file, or remove the link"):
        open_source(str(folder), HELD_OUT)


def test_a_link_may_name_the_split(tmp_path: Path) -> None:
    write(tmp_path, ["store/1", "store/2", "store/3"], ".jsonl")
    for name, target in (("train", "1"), ("valid", "2"), ("test", "3")):
        (tmp_path / "named").mkdir(exist_ok=True)
        (tmp_path / "named" / f"{name}.jsonl").symlink_to(tmp_path / "store" / f"{target}.jsonl")
    assert read(tmp_path / "named") == {"train": ["store/1"], "val": ["store/2"], "test": ["store/3"]}


def test_what_is_about_rows_is_no_row(tmp_path: Path) -> None:
    write(tmp_path, ["a"], ".jsonl")
    write(tmp_path, ["README", ".cache/x"], ".md")
    write(tmp_path, ["LICENSE", "NOTICE", ".gitattributes"], "")
    for name in ("dataset_infos.json", "dataset_info.json", "_SUCCESS"):
        (tmp_path / name).write_text("" if name == "_SUCCESS" else "{}")
    assert read(tmp_path) == read_one_by_one(["a"])
    write(tmp_path, ["chapter"], ".md")
    with pytest.raises(ValueError, match=r"mixes raw text \('chapter.md'\) and rows \('a.jsonl'\)"):
        open_source(str(tmp_path), HELD_OUT)
    (tmp_path / "a.jsonl").unlink()
    texts = [text for texts in read(tmp_path).values() for text in texts]
    assert sorted(texts) == ["LICENSE", "NOTICE", "README", "chapter"]  # among texts they are texts
