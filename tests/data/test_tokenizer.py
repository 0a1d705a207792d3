"""Tokenizers keep every byte, and know how many bytes each id stands for."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from faults import fuzz_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from bsbr_pl.data.bpe_file import write_bpe
from bsbr_pl.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

# Text to learn merges from: code, prose, several scripts and the name of a special token.
LESSON = "\n".join(
    f"{i} " + " ".join(["self", "naïve", "日本語", "if x:\n        pass\n", "0x1F", "<|endoftext|>"][i % 3 : i % 7])
    for i in range(300)
)
# Every character that UTF-8 can encode; lone surrogates it cannot.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["", "<|endoftext|>", "  \n\t\r\n ", "\x00\x7f", "é" * 50, "\U0001f468‍\U0001f469", "        return x\n\n\n"]
)


@cache
def bpe_spec() -> str:
    return train_bpe([LESSON], 400)


@cache
def tokenizer(kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "bytes" else BPETokenizer(bpe_spec())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(text=TEXTS)
def test_round_trip_and_byte_count_are_exact(kind: str, text: str) -> None:
    subject = tokenizer(kind)
    ids = subject.encode(text)
    assert subject.decode(ids) == text
    assert subject.decode_bytes(ids) == text.encode()
    assert subject.token_bytes[np.array(ids, np.int64)].sum() == len(text.encode())
    assert subject.eos_id not in ids
    np.testing.assert_array_equal(subject.encode_batch([text])[0], ids)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_vocabulary(kind: str) -> None:
    subject = tokenizer(kind)
    assert subject.vocab_size == len(subject.token_bytes) == (257 if kind == "bytes" else 400)
    assert subject.token_bytes[subject.eos_id] == 0
    assert subject.decode([subject.eos_id]) == ""
    for i in (-1, subject.vocab_size):
        with pytest.raises(ValueError, match=rf"token id {i} is outside the vocabulary of {subject.vocab_size}"):
            subject.decode([i])
    with pytest.raises(ValueError, match="surrogates not allowed"):
        subject.encode("\ud800")


def test_ids_that_are_no_utf8_still_decode() -> None:
    assert ByteTokenizer().decode([0xE9, 65]) == "�A"


def test_training_is_deterministic_and_size_is_the_tokenizers_own() -> None:
    assert train_bpe([LESSON], 400) == bpe_spec()
    assert BPETokenizer(train_bpe(["ab"], 400)).vocab_size == 258  # 256 bytes, one merge, end of text
    with pytest.raises(ValueError, match="bpe_vocab_size=256 is too small: at least 257"):
        train_bpe(["ab"], 256)


def test_indentation_and_word_become_few_tokens() -> None:
    subject = BPETokenizer(train_bpe([LESSON], 400))
    assert len(subject.encode("if x:\n        pass\n")) <= 5


def foreign(change: dict[str, object], tmp_path: Path) -> str:
    spec = json.loads(bpe_spec()) | change
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return str(path)


def test_special_tokens_and_normalisers_of_a_foreign_file_do_not_touch_the_text(tmp_path: Path) -> None:
    spec = json.loads(bpe_spec())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [
        {"id": 399, "content": "<|endoftext|>", **special},
        {"id": 400, "content": "<|pad|>", **special},
    ]
    spec["normalizer"] = {"type": "Lowercase"}
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    subject = load_tokenizer(foreign(spec, tmp_path))
    text = "ABC <|endoftext|> <|pad|>"
    assert subject.decode(subject.encode(text)) == text
    assert (subject.eos_id, subject.vocab_size) == (399, 401)
    assert not {399, 400} & set(subject.encode(text))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_library_reads_a_tokenizer_that_gives_the_same_ids(kind: str) -> None:
    subject = tokenizer(kind)
    library = tokenizers.Tokenizer.from_str(subject.to_json())
    library.encode_special_tokens = True
    assert library.get_vocab_size() == subject.vocab_size
    assert library.token_to_id("<|endoftext|>") == subject.eos_id
    for text in (LESSON, "<|endoftext|>", "", " \x00é\n\n  日"):
        assert library.encode(text).ids == subject.encode(text)
        assert library.decode(subject.encode(text), skip_special_tokens=False) == text


def test_a_tokenizer_that_would_lose_bytes_is_refused(tmp_path: Path) -> None:
    model = json.loads(bpe_spec())["model"]
    model["vocab"].pop("Ġ")
    model["merges"] = [pair for pair in model["merges"] if "Ġ" not in "".join(pair)]
    with pytest.raises(ValueError, match="not byte-level: 1 of the 256 bytes have no id"):
        load_tokenizer(foreign({"model": model}, tmp_path))
    with pytest.raises(ValueError, match="holds no BPE model"):
        load_tokenizer(foreign({"model": {"type": "WordPiece", "vocab": {}}}, tmp_path))
    with pytest.raises(ValueError, match=r"neither 'bpe' nor 'bytes' nor an existing tokenizer.json"):
        load_tokenizer("words")


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"dropout": 0.5}, ""),
    "unknown version": ({"version": "9.9"}, ""),
    "truncation": (
        {"truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
        "",
    ),
    "ids as text": ({"vocab": {"!": "0"}}, "has the id '0' for '!' in vocab, which is not an integer"),
    "fraction": ({"vocab": {"!": 1.5}}, "has the id 1.5 for '!' in vocab, which is not an integer"),
    "negative": ({"vocab": {"!": -1}}, "has the id -1 for '!' in vocab, which is not an integer of at least 0"),
    "huge": ({"vocab": {"!": 4_000_000_000}}, "has 399 tokens whose ids are not 0 to 398, each once"),
    "twice": ({"vocab": {"!": 1}}, "gives two tokens of vocab the same id"),
    "not a byte": ({"vocab": {"日": 399}}, "is not byte-level: token '日' .* stands for no bytes"),
    "merge of three": (
        {"merges": [["a", "b", "c"]]},
        r"has the merge \['a', 'b', 'c'\], which is not a pair of tokens",
    ),
    "unknown merge": ({"merges": ["q zz"]}, r"has the merge \['q', 'zz'\], but not its tokens"),
    "prefix": ({"continuing_subword_prefix": "##"}, "is not byte-level: continuing_subword_prefix='##'"),
    "steps": ({"pre_tokenizer": [1]}, r"has the pre_tokenizer \[1\], which may lose text"),
    "lossy steps": ({"pre_tokenizer": {"type": "Whitespace"}}, "has the pre_tokenizer .*Whitespace.* may lose text"),
    "no steps": ({"pre_tokenizer": None}, "has the pre_tokenizer None, which may lose text"),
    "no byte level": ({"pre_tokenizer": {"type": "Digits"}}, "needs one step of type 'ByteLevel'"),
    "regex": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
                    {"type": "ByteLevel"},
                ],
            }
        },
        "tokenizer.json cannot be used",
    ),
    "added twice": ({"added_tokens": [{"id": 399, "content": "<x>"}] * 2}, "lists an added token twice"),
    "added elsewhere": ({"added_tokens": [{"id": 400, "content": "<x>"}]}, "has 400 tokens whose ids are not 0 to 399"),
    "added differs": ({"added_tokens": [{"id": 399, "content": "!"}]}, "256 bytes have no id"),
    "added": ({"added_tokens": [5]}, "has added_tokens that are not a list of objects"),
    "deep": ({"normalizer": json.loads("[" * 50 + "]" * 50)}, "has more than 12 lists and objects within each other"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_is_checked_before_the_library_sees_it(name: str, tmp_path: Path) -> None:
    """What has no effect on the ids is off; all else is one sentence."""
    change, expected = CHANGES[name]
    spec = json.loads(bpe_spec())
    for key, value in change.items():
        inside = spec["model"] if key in ("vocab", "merges", "dropout", "continuing_subword_prefix") else spec
        inside[key] = inside[key] | value if key == "vocab" else value
    if not expected:
        subject, text = load_tokenizer(foreign(spec, tmp_path)), "self return naïve"
        assert [subject.encode(text) for _ in range(20)] == [tokenizer("bpe").encode(text)] * 20
        return
    with pytest.raises(ValueError, match=expected) as error:
        load_tokenizer(foreign(spec, tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "[]", '{"model": 5}', "\x00", "9" * 5000])
def test_a_file_that_is_no_tokenizer(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer.json (is not JSON|holds no BPE model)"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(ValueError, match=r"t.json' is too large: at most 32 MiB"):
        load_tokenizer(str(tmp_path / "t.json"))
    (tmp_path / "t.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"t.json' is not UTF-8"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_steps_without_options_have_those_of_the_library(tmp_path: Path) -> None:
    """GPT-2's file does not say use_regex, which is true then: 'the cat' is cut before the blank."""
    spec = json.loads(bpe_spec())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    spec["model"]["vocab"] |= {"aĠ": 399, "aĠb": 400}
    spec["model"]["merges"] = ["a Ġ", "aĠ b"]
    subject = load_tokenizer(foreign(spec, tmp_path))
    vocabulary = spec["model"]["vocab"]
    assert subject.encode("a b") == [vocabulary["a"], vocabulary["Ġ"], vocabulary["b"]]


@pytest.mark.parametrize("seed", range(0, 500, 25))
def test_a_mutated_file_is_used_or_refused(seed: int) -> None:
    """The first mutation of each process of `tests/faults/fuzz_tokenizer.py`."""
    spec, names = fuzz_tokenizer.mutated(bpe_spec(), seed)
    assert fuzz_tokenizer.outcome(spec) in ("kept", "refused"), names


def test_special_tokens_are_written_in_the_order_of_their_ids() -> None:
    """Without an order, the library would number those beyond the vocabulary as it reads them."""
    clean = {"model": {"vocab": {"a": 0, "c": 2}}}
    written = json.loads(write_bpe(clean, {"<late>": 4, "<inside>": 1, "<early>": 3}))
    assert [(token["id"], token["content"]) for token in written["added_tokens"]] == [
        (1, "<inside>"),
        (3, "<early>"),
        (4, "<late>"),
    ]
    assert written["model"]["vocab"] == {"a": 0, "c": 2, "<inside>": 1}
