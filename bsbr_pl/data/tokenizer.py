"""Byte-exact tokenizers: text in, ids out, and the number of raw bytes of every id.

Both tokenizers end their vocabulary with an end-of-text id that no text can produce: a literal `<|endoftext|>` in a
document is encoded as ordinary text. `decode(encode(text)) == text` for every text that UTF-8 can encode, and the
byte lengths of the ids add up to the length of the raw text, which is what makes bits per byte comparable between them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .bpe_file import LARGEST_VOCABULARY, byte_characters, parse_bpe, write_bpe

if TYPE_CHECKING:
    import tokenizers

# How text is cut before the merges are learnt. A word is letters and digits ("utf8", "0x1F"), with the one character
# before it (" self", ".join", "_name"). Punctuation includes the blanks, line breaks and indentation that follow it
# (", ", "):\n        "). Eleven ways to cut were tried, among them those of GPT-2 and GPT-4. This one needs the fewest
# tokens for source code: 11 % fewer than GPT-2's on validation text of the standard library at 4,096 ids.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{N}]+"
    r"| ?[^\s\p{L}\p{N}]+\s*"
    r"|\s*[\r\n][ \t]*"
    r"|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
LARGEST_FILE = 32 << 20  # bytes of a tokenizer.json; parsed, they take up to 25 times as much memory


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids
        eos_id: ends every document; no text contains it
        token_bytes: (vocab_size,) int64, the raw bytes of each id; 0 for the end of text
    """

    def __init__(self, pieces: Sequence[bytes], eos_id: int) -> None:
        self._pieces, self.eos_id, self.vocab_size = pieces, eos_id, len(pieces)
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int64)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            ValueError: the text has lone surrogates, which have no bytes.
        """
        text.encode()
        return self.encode_batch([text])[0].tolist()

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The raw bytes of ids; the end of text has none.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return b"".join([self._pieces[i] for i in self._checked(ids).tolist()])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not valid UTF-8 (a model may write them) become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    @abstractmethod
    def to_json(self) -> str:
        """A tokenizer.json that gives the same ids, for the library `tokenizers`.

        The end of text is a special token. A reader must not look for special tokens in text
        (`encode_special_tokens = True`, in transformers `split_special_tokens=True`): no text contains one.
        """

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, np.int64)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size} ids (0 to {self.vocab_size - 1})"
            )
        return array


class ByteTokenizer(Tokenizer):
    """Every byte is its own id (0..255); 256 is the end of text."""

    def __init__(self) -> None:
        super().__init__([*(bytes([byte]) for byte in range(256)), b""], 256)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = self._checked(ids)
        return ids[ids != self.eos_id].astype(np.uint8).tobytes()

    def to_json(self) -> str:
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        one_word = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        return write_bpe({"version": "1.0", "pre_tokenizer": one_word, "model": model}, {END_OF_TEXT: self.eos_id})


class BPETokenizer(Tokenizer):
    """A byte-level BPE in the `tokenizer.json` format.

    Only vocabulary, merges and pre-tokenizer of a file are used. Added tokens and normalisers are dropped, because both
    change the text: added tokens turn raw text into special ids, normalisers rewrite it. Post-processors, dropout,
    truncation and padding are off. An added token keeps its id, unused; a known end-of-text name becomes `eos_id`.

    Args:
        spec: the content of a tokenizer.json

    Raises:
        ValueError: not a byte-level BPE, or some of the 256 bytes are missing.
    """

    _END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|eos|>")

    def __init__(self, spec: str) -> None:
        from tokenizers import Tokenizer as Backend

        pieces, added, clean = parse_bpe(spec)
        ends = [added[name] for name in self._END_NAMES if name in added]
        eos_id = ends[0] if ends else len(pieces)
        super().__init__(pieces if ends else [*pieces, b""], eos_id)
        with _library_errors():
            self._backend: tokenizers.Tokenizer = Backend.from_str(json.dumps(clean))
        if not ends:
            free = (name for name in self._END_NAMES if name not in clean["model"]["vocab"] | added)
            added = added | {next(free, "<|end of text|>"): eos_id}
        self._added = added

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _library_errors():
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def to_json(self) -> str:
        return write_bpe(json.loads(self._backend.to_str()), self._added)


@contextmanager
def _library_errors() -> Iterator[None]:
    """`tokenizers` raises bare Exceptions, and BaseExceptions where its Rust code panics."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"tokenizer.json cannot be used ({why}): export it again, or use 'bpe'") from error
        raise


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Learn a byte-level BPE of `vocab_size` ids, the end of text included; returns its tokenizer.json.

    Raises:
        ValueError: vocab_size is below 257 (256 bytes and the end of text) or too large.
    """
    _check_vocab_size(vocab_size)
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # The whole alphabet from the start: otherwise a byte that is not in the training text would be dropped silently.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def _check_vocab_size(size: int) -> None:
    if size < 257:
        raise ValueError(f"bpe_vocab_size={size} is too small: at least 257, for 256 bytes and the end of text")
    if size > LARGEST_VOCABULARY:
        raise ValueError(f"bpe_vocab_size={size} is too large: at most {LARGEST_VOCABULARY}")


def tokenizer_identity(name: str, bpe_vocab_size: int, spec: str | None) -> dict[str, str | int]:
    """Everything that determines the ids, for the fingerprint: kind and options, or the content of a tokenizer.json."""
    if spec is not None:
        return {"kind": "file", "sha256": hashlib.sha256(spec.encode()).hexdigest()}
    if name == "bytes":
        return {"kind": "bytes"}
    _check_vocab_size(bpe_vocab_size)
    return {"kind": "bpe", "vocab_size": bpe_vocab_size, "split": SPLIT}


def load_tokenizer(path: str) -> BPETokenizer:
    """The tokenizer of a tokenizer.json."""
    return BPETokenizer(read_spec(path))


def read_spec(name: str) -> str:
    """The content of the tokenizer.json of this path."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"tokenizer={name!r} is neither 'bpe' nor 'bytes' nor an existing tokenizer.json file")
    with path.open("rb") as stream:
        content = stream.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"tokenizer={name!r} is too large: at most {LARGEST_FILE >> 20} MiB")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer={name!r} is not UTF-8 ({error}): export it again") from error
