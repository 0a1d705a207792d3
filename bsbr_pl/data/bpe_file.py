"""The schema of a tokenizer.json with a byte-level BPE: what is checked before the library `tokenizers` sees it."""

import json
from itertools import chain
from operator import itemgetter
from typing import Any

LARGEST_VOCABULARY = 1_000_000  # `tokenizers` allocates tables of this size before it counts anything
_LONGEST_PATTERN = 10_000  # characters
_DEEPEST = 12  # lists and objects within each other
_BEHAVIORS = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")  # "Removed" would lose text
_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}  # ids to bytes
#: Option -> its default, or its type if it has none, of each pre-tokenizer that keeps all text.
_STEPS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "Split": {"pattern": dict, "behavior": str, "invert": False},
    "Digits": {"individual_digits": False},
    "Punctuation": {"behavior": "Isolated"},
}


def parse_bpe(spec: str) -> tuple[list[bytes], dict[str, int], dict[str, Any]]:
    """Check a tokenizer.json, and reduce it to what decides the ids of a text.

    Returns:
        The bytes of every id, none for added tokens; the ids of added tokens by name; and a tokenizer.json of the
        vocabulary, the merges and the pre-tokenizer, for the library.

    Raises:
        ValueError: it is not a byte-level BPE, some of the 256 bytes are missing, or a value has another type.
    """
    table = _parsed(spec)
    model = table.get("model") if isinstance(table, dict) else None
    if not isinstance(model, dict) or model.get("type") not in ("BPE", None):
        raise _invalid("holds no BPE model")
    affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if affixes:
        raise _invalid(f"is not byte-level: {affixes[0]}={model[affixes[0]]!r}")
    vocabulary, added = _ids(model.get("vocab"), "vocab"), _added(table.get("added_tokens"))
    missing = [i for i, byte in enumerate(byte_characters()) if byte not in vocabulary or byte in added]
    if missing:
        raise _invalid(f"is not byte-level: {len(missing)} of the 256 bytes have no id (first: {missing[0]:#04x})")
    _check_dense(vocabulary, added)
    steps = _steps(table.get("pre_tokenizer"))
    if sum(step["type"] == "ByteLevel" for step in steps) != 1:
        raise _invalid("is not byte-level: its pre_tokenizer needs one step of type 'ByteLevel'")
    clean = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": _merges(model.get("merges"), vocabulary, added),
            "ignore_merges": _typed(model, "ignore_merges", False),
        },
    }
    return _pieces(vocabulary, added), added, clean


def write_bpe(clean: dict[str, Any], special: dict[str, int]) -> str:
    """A tokenizer.json of a vocabulary without special tokens, and special tokens with their ids.

    The library numbers special tokens that are not in the vocabulary from its end. So those with an id below the end
    are added to the vocabulary, where no merge leads to them.
    """
    vocabulary = clean["model"]["vocab"]
    end = max(vocabulary.values())
    vocabulary = vocabulary | {name: i for name, i in special.items() if i < end}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, **plain, "special": True} for name, i in special.items()]
    return json.dumps(
        clean
        | {"added_tokens": sorted(added, key=itemgetter("id")), "decoder": _DECODER}
        | {"model": clean["model"] | {"vocab": vocabulary}}
    )


def _parsed(spec: str) -> Any:
    try:
        table = json.loads(spec)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"is not JSON ({error})") from error
    inside = [table] if isinstance(table, dict | list) else []
    for _ in range(_DEEPEST):
        values = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in inside)
        inside = [value for value in values if isinstance(value, dict | list)]
    if inside:
        raise _invalid(f"has more than {_DEEPEST} lists and objects within each other")
    return table


def _invalid(what: str) -> ValueError:
    return ValueError(f"tokenizer.json {what[:300]}: export a byte-level BPE, or use tokenizer='bpe' or 'bytes'")


def _typed(table: dict[str, Any], name: str, default: Any) -> Any:
    """A value of the type of the default, or of the type `default`; the default if there is none."""
    kind = default if isinstance(default, type) else type(default)
    value = table.get(name)
    if value is None and kind is not default:
        return default
    if type(value) is not kind:
        raise _invalid(f"has {name}={value!r}, which is not of type {kind.__name__}")
    return value


def _ids(table: Any, where: str) -> dict[str, int]:
    """Ids by token, if they are integers, each once."""
    if not isinstance(table, dict):
        raise _invalid(f"has no object {where!r} of tokens and ids")
    wrong = next((token for token, i in table.items() if type(i) is not int or i < 0), None)
    if wrong is not None:
        raise _invalid(f"has the id {table[wrong]!r} for {wrong!r} in {where}, which is not an integer of at least 0")
    if len(set(table.values())) < len(table):
        raise _invalid(f"gives two tokens of {where} the same id")
    return table


def _added(tokens: Any) -> dict[str, int]:
    tokens = [] if tokens is None else tokens
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise _invalid("has added_tokens that are not a list of objects")
    table = {_typed(token, "content", str): token.get("id") for token in tokens}
    if len(table) < len(tokens):
        raise _invalid("lists an added token twice")
    return _ids(table, "added_tokens")


def _check_dense(vocabulary: dict[str, int], added: dict[str, int]) -> None:
    """All ids are 0 to n - 1. A token may be in both tables, with the same id."""
    differ = next((token for token in added.keys() & vocabulary.keys() if added[token] != vocabulary[token]), None)
    if differ is not None:
        raise _invalid(f"gives {differ!r} the ids {vocabulary[differ]} and {added[differ]}")
    ids = {*vocabulary.values(), *added.values()}
    count = len(vocabulary | added)
    if count > LARGEST_VOCABULARY:
        raise _invalid(f"has {count} tokens, at most {LARGEST_VOCABULARY} are allowed")
    if len(ids) < count or max(ids, default=0) != count - 1:
        raise _invalid(f"has {count} tokens whose ids are not 0 to {count - 1}, each once")


def _merges(merges: Any, vocabulary: dict[str, int], added: dict[str, int]) -> list[list[str]]:
    """Pairs of tokens, if the pair and its result are in the vocabulary. A pair may be written "left right"."""
    if not isinstance(merges, list):
        raise _invalid("has no list 'merges'")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if not isinstance(pair, list) or [type(token) for token in pair] != [str, str]:
            raise _invalid(f"has the merge {pair!r}, which is not a pair of tokens")
        whole = "".join(pair)
        if not {*pair, whole} <= vocabulary.keys() or whole in added:
            raise _invalid(f"has the merge {pair!r}, but not its tokens and their result in the vocabulary")
    return pairs


def _steps(step: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, one after another, each with its own options alone."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        return [part for inner in _typed(step, "pretokenizers", list) for part in _steps(inner)]
    if not isinstance(kind, str) or kind not in _STEPS:
        raise _invalid(f"has the pre_tokenizer {step!r}, which may lose text: known are {', '.join(_STEPS)}")
    clean = {name: _typed(step, name, default) for name, default in _STEPS[kind].items()}
    if clean.get("behavior", "Isolated") not in _BEHAVIORS:
        raise _invalid(f"has behavior={clean['behavior']!r}, which may lose text: known are {', '.join(_BEHAVIORS)}")
    if kind == "Split":
        form, pattern = next(iter(clean["pattern"].items()), ("", ""))
        if form not in ("String", "Regex") or not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN:
            raise _invalid(f"has the pattern {clean['pattern']!r}, which is no String or Regex")
        clean["pattern"] = {form: pattern}
    if kind == "ByteLevel":
        clean["add_prefix_space"] = False  # it would add a byte to every text
    return [{"type": kind, **clean}]


def _pieces(vocabulary: dict[str, int], added: dict[str, int]) -> list[bytes]:
    """The bytes of every id; added tokens have none."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    pieces = [b""] * len(vocabulary | added)
    for token, i in vocabulary.items():
        if token not in added:
            if not token or not set(token) <= byte_of.keys():
                raise _invalid(f"is not byte-level: token {token!r} (id {i}) stands for no bytes")
            pieces[i] = bytes(byte_of[character] for character in token)
    return pieces


def byte_characters() -> list[str]:
    """The visible character that stands for each byte in byte-level BPE (Radford et al. 2019, `bytes_to_unicode`)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 0x100 + hidden.index(byte)) for byte in range(256)]
