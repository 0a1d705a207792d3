"""Preparation: once, whole or not at all, and noticed if it was damaged afterwards."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import environment

from bsbr_pl.data import TextData, corpus
from bsbr_pl.data.base import SPLITS
from bsbr_pl.data.corpus import Corpus, find_prepared
from bsbr_pl.data.files import Piece
from bsbr_pl.data.tokenizer import train_bpe


def text_data(source: Path, cache: Path, tokenizer: str = "bpe") -> TextData:
    return TextData(
        str(source), tokenizer, 300, context_length=16, cache_dir=str(cache), val_fraction=0.15, test_fraction=0.1
    )


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> tuple[TextData, Path]:
    data = text_data(folder, tmp_path)
    return data, data.corpus.folder


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_streams_hold_the_text_and_nothing_else(folder: Path, tmp_path: Path, tokenizer: str) -> None:
    subject = text_data(folder, tmp_path, tokenizer).corpus
    raw = {file.read_bytes() for file in folder.rglob("*.txt")} - {b""}
    seen = []
    for split in SPLITS:
        tokens, offsets = subject.tokens(split), subject.documents(split)
        assert tokens.dtype == np.uint16
        assert tokens[0] == subject.tokenizer.eos_id
        documents = [tokens[a:b] for a, b in pairwise(offsets)]
        assert all(document[-1] == subject.tokenizer.eos_id for document in documents)
        assert 1 + sum(map(len, documents)) == len(tokens)
        texts = [subject.tokenizer.decode_bytes(document) for document in documents]
        assert b"".join(texts) == subject.text(split)
        assert len(subject.text(split)) == subject.meta["splits"][split]["bytes"]
        seen += texts
    assert sorted(seen) == sorted(raw)
    with pytest.raises(ValueError, match="split='validation' is unknown: one of train, val, test"):
        subject.tokens("validation")


def test_both_tokenizers_count_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    bpe, by_byte = text_data(folder, tmp_path), text_data(folder, tmp_path, "bytes")
    for split in SPLITS:
        assert bpe.text(split) == by_byte.text(split)
    assert len(bpe.corpus.tokens("train")) < 0.7 * len(by_byte.corpus.tokens("train"))


def test_second_start_is_quick_and_equal(prepared: tuple[TextData, Path], folder: Path, tmp_path: Path) -> None:
    first, path = prepared
    stamp = (path / "tokens.bin").stat().st_mtime_ns
    start = time.perf_counter()
    second = text_data(folder, tmp_path)
    assert second.vocab_size == 300
    assert time.perf_counter() - start < 1
    assert second.fingerprint == first.fingerprint
    assert (path / "tokens.bin").stat().st_mtime_ns == stamp


def test_the_same_source_gives_the_same_bytes(prepared: tuple[TextData, Path], folder: Path, tmp_path: Path) -> None:
    again = text_data(folder, tmp_path / "elsewhere").corpus
    for name in ("tokens.bin", "documents.npy", "tokenizer.json"):
        assert (again.folder / name).read_bytes() == (prepared[1] / name).read_bytes()
    assert again.meta["source_sha256"] == prepared[0].corpus.meta["source_sha256"]


def test_whatever_decides_the_tokens_is_in_the_fingerprint(tmp_path: Path, some_text: Callable[..., str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text(some_text(100))
    common = {"source": str(source), "tokenizer": "bpe", "bpe_vocab_size": 300, "cache_dir": str(tmp_path / "cache")}

    def fingerprint(**options: object) -> str:
        return TextData(**{**common, "val_fraction": 0.0, "test_fraction": 0.0, **options}).fingerprint  # type: ignore[arg-type]

    plain = fingerprint()
    assert fingerprint(context_length=4, seed=3, batch_size=1) == plain
    others = [fingerprint(tokenizer="bytes"), fingerprint(bpe_vocab_size=301), fingerprint(test_fraction=1e-9)]
    (source / "a.txt").write_text(some_text(100) + ".")
    others.append(fingerprint())
    assert len({plain, *others}) == 5


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "removed"])
def test_damage_is_noticed_and_mended(
    prepared: tuple[TextData, Path], folder: Path, tmp_path: Path, name: str, damage: str
) -> None:
    data, path = prepared
    whole = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "meta.json"}
    file = path / name
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-3])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"is truncated or damaged|is not a prepared corpus"):
        Corpus(path)
    again = text_data(folder, tmp_path)
    assert again.fingerprint == data.fingerprint
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.name != "meta.json"} == whole


def test_a_large_file_is_hashed_again_only_if_it_was_touched(
    prepared: tuple[TextData, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "HASH_EVERY_TIME", 0)
    path = prepared[1]
    Corpus(path)
    os.utime(path / "tokens.bin")
    Corpus(path)  # touched, but whole
    with (path / "tokens.bin").open("r+b") as stream:
        stream.write(b"\xff")
    with pytest.raises(ValueError, match="is truncated or damaged"):
        Corpus(path)


def test_leftovers_of_a_killed_process_are_not_believed(folder: Path, tmp_path: Path) -> None:
    fingerprint = text_data(folder, tmp_path / "other").fingerprint
    half = tmp_path / f".{fingerprint}-killed"
    half.mkdir()
    (half / "tokens.bin").write_bytes(b"half")
    data = text_data(folder, tmp_path)
    assert data.vocab_size == 300
    assert not half.exists()


def prepare(source: str, cache: str, answers: Any, most: int | None = None) -> None:
    """What a process does, which can write files of `most` bytes; the answer is a fingerprint, or what went wrong."""
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        answers.put(text_data(Path(source), Path(cache)).fingerprint)
    except OSError as error:
        answers.put(str(error))


def answers_of(processes: int, *options: Any) -> list[str]:
    """What these processes answer, forked from one that has imported everything."""
    environment.preload("faults.environment")
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    started = [context.Process(target=prepare, args=(*map(str, options[:2]), answers, *options[2:]))
               for _ in range(processes)]  # fmt: skip
    for process in started:
        process.start()
    found = [answers.get(timeout=100) for _ in started]
    for process in started:
        process.join()
    return found


def test_two_processes_may_start_together(folder: Path, tmp_path: Path) -> None:
    answers = answers_of(2, folder, tmp_path)
    visible = [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")]
    assert answers == 2 * visible
    Corpus(tmp_path / visible[0])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_said_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (error,) = answers_of(1, folder, tmp_path, 9000)
    assert f"not enough disk space in {tmp_path} to prepare source='{folder}'" in error
    assert "set cache_dir to another disk" in error
    assert [file for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []
    assert text_data(folder, tmp_path).vocab_size == 300  # with room again, it is made


def test_meta_names_versions_and_content(prepared: tuple[TextData, Path]) -> None:
    meta = json.loads((prepared[1] / "meta.json").read_text())
    assert meta["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"numpy", "tokenizers", "datasets"} == meta["versions"].keys()
    state = prepared[0].state_dict()
    assert state == {name: meta[name] for name in ("fingerprint", "source_sha256", "python")}


def test_importing_the_room_is_light() -> None:
    code = "import sys, bsbr_pl.data; print([m for m in ('datasets', 'pyarrow', 'tokenizers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_prepared_tokens_are_found_without_their_source(tmp_path):
    (tmp_path / "text.txt").write_text("one\ntwo\n" * 200)
    data = TextData(str(tmp_path / "text.txt"), "bytes", cache_dir=str(tmp_path / "cache"))
    fingerprint, text = data.fingerprint, data.text("val")
    (tmp_path / "text.txt").unlink()
    found = find_prepared(fingerprint, tmp_path / "cache")
    assert found is not None
    assert (found.fingerprint, found.text("val")) == (fingerprint, text)
    assert find_prepared("0" * 32, tmp_path / "cache") is None
    (tmp_path / "cache" / ("0" * 32)).symlink_to(found.folder)
    assert find_prepared("0" * 32, tmp_path / "cache") is None, "its own record says another fingerprint"
    (found.folder / "tokens.bin").write_bytes(b"")
    assert find_prepared(fingerprint, tmp_path / "cache") is None


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index, and give the files and the index the checksums of what they hold now."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    meta["files"] = {name: corpus._checksums(folder / name) for name in meta["files"]}
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": corpus._json_sha256(meta)}))


INDEXES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda meta: meta.update(files={}),
    "a foreign file": lambda meta: meta["files"].update({"/etc/hostname": meta["files"]["tokens.bin"]}),
    "dtype": lambda meta: meta.update(dtype="uint32"),
    "an object dtype": lambda meta: meta.update(dtype="O"),
    "smaller vocabulary": lambda meta: meta.update(vocab_size=299),
    "larger vocabulary": lambda meta: meta.update(vocab_size=301),
    "vocabulary as text": lambda meta: meta.update(vocab_size="300"),
    "another fingerprint": lambda meta: meta.update(fingerprint="0" * 32),
    "no splits": lambda meta: meta.update(splits={}),
    "splits overlap": lambda meta: meta["splits"]["val"]["tokens"].__setitem__(0, 0),
    "split ends early": lambda meta: meta["splits"]["test"]["tokens"].__setitem__(1, 5),
    "documents move": lambda meta: [
        meta["splits"]["train"]["documents"].__setitem__(1, 3),
        meta["splits"]["val"]["documents"].__setitem__(0, 3),
    ],
    "offsets as fractions": lambda meta: meta["splits"]["train"]["tokens"].__setitem__(0, 0.0),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_contradicts_its_files_is_made_again(
    prepared: tuple[TextData, Path], folder: Path, tmp_path: Path, name: str
) -> None:
    data, path = prepared
    good = (path / "meta.json").read_bytes()
    forge(path, lambda meta: None)
    Corpus(path)  # with checksums of its own it is accepted, so the checksums are not what fails below
    forge(path, lambda meta: INDEXES[name](meta) and None)
    with pytest.raises(ValueError, match=r"is truncated or damaged|is not a prepared corpus"):
        Corpus(path)
    again = text_data(folder, tmp_path)
    assert again.fingerprint == data.fingerprint
    old, new = json.loads(good), json.loads((path / "meta.json").read_bytes())
    assert {key: new[key] for key in ("splits", "dtype", "vocab_size")} == {
        key: old[key] for key in ("splits", "dtype", "vocab_size")
    }


@pytest.mark.parametrize("what", ["out of range", "no EOS at an end", "documents out of order", "floats", "pickled"])
def test_tokens_and_offsets_are_checked(prepared: tuple[TextData, Path], what: str) -> None:
    path = prepared[1]
    tokens, starts = np.fromfile(path / "tokens.bin", np.uint16), np.load(path / "documents.npy")
    if what == "out of range":
        tokens[5] = 300
    elif what == "no EOS at an end":
        tokens[starts[1] - 1] = 0
    elif what == "documents out of order":
        starts[[1, 2]] = starts[[2, 1]]
    tokens.tofile(path / "tokens.bin")
    changed = {"floats": starts.astype(float), "pickled": starts.astype(object)}.get(what, starts)
    np.save(path / "documents.npy", changed, allow_pickle=True)
    forge(path, lambda meta: None)
    with pytest.raises(ValueError, match=r"is truncated or damaged|is not a prepared corpus"):
        Corpus(path)


@pytest.mark.parametrize("kind", ["file", "link to another cache", "broken link"])
def test_what_stands_in_the_place_of_a_cache_is_replaced(folder: Path, tmp_path: Path, kind: str) -> None:
    fingerprint = text_data(folder, tmp_path / "other").fingerprint
    target = tmp_path / "other" / fingerprint
    if kind == "link to another cache":
        other = text_data(folder, tmp_path / "other", "bytes").fingerprint
        target = tmp_path / "other" / other
    place = tmp_path / "cache" / fingerprint
    place.parent.mkdir()
    place.write_text("a file") if kind == "file" else place.symlink_to(target if "cache" in kind else "nowhere")
    data = text_data(folder, tmp_path / "cache")
    assert data.vocab_size == 300
    assert not place.is_symlink()
    assert target.is_dir(), "what a link led to is not touched"


def test_a_tokenizer_file_that_changes_meanwhile(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read once: the tokens are those of the fingerprint."""
    file = tmp_path / "tokenizer.json"
    specs = [train_bpe(["ab" * 100], 258), train_bpe(["cd" * 100], 258)]
    file.write_text(specs[0])
    write = corpus._write
    monkeypatch.setattr(corpus, "_write", lambda *arguments: (file.write_text(specs[1]), write(*arguments)))
    data = TextData(str(folder), str(file), cache_dir=str(tmp_path / "cache"))
    assert (data.corpus.folder / "tokenizer.json").read_text() == specs[0]
    assert TextData(str(folder), str(file), cache_dir=str(tmp_path / "cache")).fingerprint != data.fingerprint


def test_pieces_are_tokenized_in_batches_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 10)
    pieces = [Piece("train", "x" * size, True) for size in (4, 4, 4, 30, 1, 2)]
    assert [[len(piece.text) for piece in batch] for batch in corpus._batches(pieces)] == [[4, 4, 4], [30], [1, 2]]


def test_sizes_of_splits(prepared: tuple[TextData, Path]) -> None:
    data = prepared[0]
    for split in SPLITS:
        tokens = data.corpus.tokens(split)
        documents = int((tokens == data.tokenizer.eos_id).sum()) - 1
        assert data.sizes[split] == {"documents": documents, "tokens": len(tokens), "bytes": len(data.text(split))}
    assert sum(sizes["documents"] for sizes in data.sizes.values()) == 59


def test_another_format_is_another_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = text_data(folder, tmp_path, "bytes").fingerprint
    monkeypatch.setattr(corpus, "FORMAT", corpus.FORMAT + 1)
    assert text_data(folder, tmp_path, "bytes").fingerprint != before


def test_bpe_is_learnt_from_the_training_text_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abab " * 200)
    for split in ("val", "test"):
        (tmp_path / f"{split}.txt").write_text(f"zqzq {split} " * 2000)
    tokenizer = TextData(str(tmp_path), "bpe", 260, cache_dir=str(tmp_path / "cache")).tokenizer
    assert len(tokenizer.encode("abab")) == 1
    assert len(tokenizer.encode("zqzq")) == 4


def test_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    """The end of text has id 65,792, behind 256 bytes and every pair of them; two pairs are merged."""
    spec = json.loads(train_bpe(["ab"], 257))
    letters = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)[:256]
    pairs = [a + b for a in letters for b in letters if a + b not in ("ab", "cd")]
    vocab = {token: i for i, token in enumerate([*letters, *pairs, "ab", "cd"])}
    spec["model"] |= {"vocab": vocab, "merges": [["a", "b"], ["c", "d"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": []}))
    (tmp_path / "text.txt").write_text("abcdab")
    common = {"val_fraction": 0.0, "test_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    data = TextData(str(tmp_path / "text.txt"), str(tmp_path / "tokenizer.json"), **common)  # type: ignore[arg-type]
    assert data.corpus.tokens("train").tolist() == [65_792, 65_790, 65_791, 65_790, 65_792]
    assert data.text("train") == b"abcdab"
