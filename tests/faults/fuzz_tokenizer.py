"""Mutated tokenizer.json files: each gives a tokenizer that keeps every byte, or a ValueError of one sentence.

    python tests/faults/fuzz_tokenizer.py              # 500 mutations, in processes of 25
    python tests/faults/fuzz_tokenizer.py 1000 --seed 7

A mutation must end within 10 s of processor time, and its process may take 2 GB of memory beyond that of its imports.
Exit code 1 if one does not, or if it ends in any other way.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bsbr_pl.data.tokenizer import BPETokenizer, train_bpe

TEXT = "def f(x):\n    return 'naïve 日本 \U0001f600 <|endoftext|>' + \"0x1F\"  # don't\r\n\t"
SECONDS, MEMORY, BATCH = 10, 2 << 30, 25
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 1.5, 10**9, 10**30, 1e400, float("nan"), "", "1", "a b", "\ud800", "\x00", [], {}, [1], [[]]),
    *({"type": "BPE"}, {"a": 1}, ["a", "b", "c"], "x" * 100_000, "(a+)+$", "[", "(?<=a|bc)d", "\\p{Nope}", "(" * 5000),
)


def places(table: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand; of long lists and tables the first few and the last."""
    if not isinstance(table, dict | list):
        return [path]
    keys = list(table) if isinstance(table, dict) else list(range(len(table)))
    inside = [place for key in [*keys[:4], *keys[4:][-1:]] for place in places(table[key], (*path, key))]
    return [*([path] if path else []), *inside]


def at(table: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        table = table[key]
    return table


def replace(table: Any, random: random.Random) -> None:
    *above, key = random.choice(places(table))
    at(table, tuple(above))[key] = random.choice(STRANGE)


def remove(table: Any, random: random.Random) -> None:
    *above, key = random.choice(places(table))
    del at(table, tuple(above))[key]


def change_id(table: Any, random: random.Random) -> None:
    vocabulary = table["model"]["vocab"]
    new = (0, -1, len(vocabulary), 2 * 10**8, 4 * 10**9, 2**64, 1.0, "1", True, None)
    vocabulary[random.choice(list(vocabulary))] = random.choice(new)


def break_merges(table: Any, random: random.Random) -> None:
    merges = table["model"]["merges"]
    i = random.randrange(len(merges))
    merges[i] = random.choice(
        [[*merges[i], "a"], merges[i][:1], "".join(merges[i]), " ".join(merges[i]), ["q", "zz"], 7]
    )


def add_option(table: Any, random: random.Random) -> None:
    name, value = random.choice(
        [
            *(("dropout", 0.5), ("dropout", "x"), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>")),
            *(("unk_token", "<unk>"), ("byte_fallback", True), ("ignore_merges", True), ("ignore_merges", "yes")),
        ]
    )
    table["model"][name] = value


def add_tokens(table: Any, random: random.Random) -> None:
    names = ("<|endoftext|>", "</s>", "Ġ", "a", "<pad>", "", *list(table["model"]["vocab"])[-2:])
    ids = (len(table["model"]["vocab"]), len(table["model"]["vocab"]) + 1, 0, -1, "1", 2 * 10**8, None)
    tokens = [{"content": random.choice(names), "id": random.choice(ids)} for _ in range(random.randint(1, 3))]
    table["added_tokens"] = random.choice([tokens, tokens, tokens * 2, tokens[0], "x"])


def change_steps(table: Any, random: random.Random) -> None:
    steps = table["pre_tokenizer"]["pretokenizers"]
    deep: dict[str, Any] = {"type": "Sequence", "pretokenizers": steps}
    for _ in range(random.choice([1, 3, 200])):
        deep = {"type": "Sequence", "pretokenizers": [deep]}
    regex = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} for pattern in STRANGE]
    other = [{"type": name} for name in ("Whitespace", "Metaspace", "ByteLevel", "Digits", "Punctuation", "Nothing")]
    removed = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Removed", "invert": False}
    chosen = random.choice([deep, None, 5, {"type": ["ByteLevel"]}, *([*some, *steps] for some in ([removed], []))])
    if random.random() < 0.7:
        chosen = {"type": "Sequence", "pretokenizers": [random.choice(regex + other), *steps]}
    table["pre_tokenizer"] = chosen


def add_settings(table: Any, random: random.Random) -> None:
    length = random.choice([0, 1, 2**40, -1, "x"])
    table["truncation"] = {"max_length": length, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    table["padding"] = {"strategy": {"Fixed": length}, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    table["normalizer"] = random.choice([{"type": "Lowercase"}, {"type": "Nothing"}, [1]])
    table["version"] = random.choice(["1.0", "9.9", 1, None])


def mutate_text(text: str, random: random.Random) -> str:
    """Bytes that are no JSON, or JSON that is too deep or too long."""
    i = random.randrange(len(text))
    deep = random.choice([100, 5000, 100_000])
    return random.choice(
        [
            *(text[:i], text[:i] + random.choice('[]{}",:\\') + text[i + 1 :], "[" * deep, "[" * deep + "]" * deep),
            *('{"model":' * deep + "1" + "}" * deep, text.replace('"vocab"', '"vocab": {}, "vocab"'), "", "null", "[]"),
        ]
    )


OPERATORS: tuple[Callable[[Any, random.Random], None], ...] = (
    *(replace, replace, remove, change_id, break_merges, add_option, add_tokens, change_steps, add_settings),
)


def mutated(spec: str, seed: int) -> tuple[str, str]:
    """A tokenizer.json with one to three mutations, and their names."""
    chooser = random.Random(seed)
    if seed % 8 == 0:
        return mutate_text(spec, chooser), "mutate_text"
    table, names = json.loads(spec), []
    for _ in range(chooser.randint(1, 3)):
        operator = chooser.choice(OPERATORS)
        try:
            operator(table, chooser)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError):
            continue  # an earlier mutation took away what this one changes
        names.append(operator.__name__)
    return json.dumps(table), "+".join(names)


def outcome(spec: str) -> str:
    """`kept` or `refused`; anything else is a fault."""
    start = time.process_time()
    try:
        tokenizer = BPETokenizer(spec)
        ids = tokenizer.encode(TEXT)
    except ValueError as error:
        found = "refused" if 0 < len(str(error)) < 1000 and "\n" not in str(error) else f"not a sentence: {error}"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    else:
        lossless = tokenizer.decode(ids) == TEXT and tokenizer.token_bytes[ids].sum() == len(TEXT.encode())
        found = "kept" if lossless and max(ids) < tokenizer.vocab_size else "loses bytes"
    return found if time.process_time() - start < SECONDS else f"took more than {SECONDS} s: {found}"


def run(count: int, seed: int) -> dict[int, str]:
    """The outcomes of `count` mutations from `seed` on, by seed; in this process."""
    spec = train_bpe([TEXT * 20], 400)
    return {i: outcome(mutated(spec, i)[0]) for i in range(seed, seed + count)}


def child(count: int, seed: int) -> dict[int, str]:
    """As `run`, in a process that is killed if it takes too much."""
    command = [sys.executable, __file__, str(count), "--seed", str(seed), "--here"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {seed: f"the process ended with {done.returncode}: {done.stderr[-300:]}"}
    return {int(i): found for i, found in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="in this process, outcomes as JSON")
    asked = parser.parse_args()
    if asked.here:
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (BATCH * SECONDS, BATCH * SECONDS))
        print(json.dumps(run(asked.count, asked.seed)))
        return
    outcomes: dict[int, str] = {}
    for first in range(0, asked.count, BATCH):
        outcomes |= child(min(BATCH, asked.count - first), asked.seed + first)
    faults = {i: found for i, found in outcomes.items() if found not in ("kept", "refused")}
    print(dict(Counter(outcomes.values()) if not faults else {"faults": len(faults)}), *faults.items(), sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
