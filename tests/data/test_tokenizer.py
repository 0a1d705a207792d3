"""Tokenizers keep every byte, and know how many bytes each id stands for."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
