"""Change the structure of a checkpoint and open it by evaluate.py and by train.py: one sentence, or the same content.

    python tests/faults/fuzz_checkpoints.py                    # 500 mutations
    python tests/faults/fuzz_checkpoints.py --mutations=20 --seed=1

A mutation changes the archive (members swapped, doubled, cut, renamed, deflated, with gaps; two archives in a row), the
pickle (an instruction left out, doubled, replaced; other numbers, types and storages of tensors), or a value (another
type, nesting, tensors that are complex, sparse, quantized or overlap). Checksums are right. Each is opened in a process
of its own with 10 seconds and 2 GB. It must be refused in one sentence, or give the weights of the original:
those that are evaluated, and those after two more steps of training. `other` counts mutations that are a file of
another run, as another number or two tensors of one size exchanged: no file can show that.
"""

import argparse
import collections
import copy
import io
import itertools
import os
import pickletools
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.damage import equal, evaluated, quiet, tiny, weights  # noqa: E402
from faults.kill_and_resume import start  # noqa: E402

import train  # noqa: E402

SECONDS, BYTES = 10, 2 * 2**30
Parts = list[tuple[str, bytes]]


def parts_of(content: bytes) -> Parts:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(part.filename, archive.read(part)) for part in archive.infolist()]


def pack(parts: Parts, gap: bytes = b"", deflated: int = -1, wrong: dict[int, dict[str, int]] | None = None) -> bytes:
    """An archive as torch writes it, with right checksums.

    Args:
        parts: names and contents.
        gap: bytes between the members.
        deflated: the number of a member to deflate.
        wrong: by number of a member: fields of its entry in the directory (crc, size, offset), added to.
    """
    out, directory = bytearray(), bytearray()
    for number, (name, content) in enumerate(parts):
        at, label = len(out), name.encode()
        packed, method = content, 0
        if number == deflated:
            shrink = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed, method = shrink.compress(content) + shrink.flush(), 8
        crc = zlib.crc32(content)
        out += struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, method, 0, 0, 0, 0, 0, len(label), 0)[:-2]
        padding = -(len(out) + 2 + len(label) + 4) % 64
        out += struct.pack("<H", padding + 4) + label + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        out += packed + struct.pack("<4s3I", b"PK\7\x08", crc, len(packed), len(content)) + gap
        fields = {"crc": crc, "size": len(content), "offset": at}
        for field, change in (wrong or {}).get(number, {}).items():
            fields[field] = (fields[field] + change) % 2**32
        sizes = (len(packed) if method else fields["size"], fields["size"])
        directory += struct.pack("<4s6H3I", b"PK\1\2", 0, 0, 0x808, method, 0, 0, fields["crc"], *sizes)
        directory += struct.pack("<5H2I", len(label), 0, 0, 0, 0, 0, fields["offset"]) + label
    at, count = len(out), len(parts)
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 30, 45, 0, 0, count, count, len(directory), at)
    wide += struct.pack("<4sIQI", b"PK\6\7", 0, at + len(directory), 1)
    short = min(count, 0xFFFF)
    return bytes(out + directory + wide) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, short, short, len(directory), at, 0)


def of_archive(content: bytes, state: random.Random) -> tuple[str, bytes]:
    """A mutation of the archive around the content."""
    parts = parts_of(content)
    i, j = state.randrange(len(parts)), state.randrange(len(parts))
    name, part = parts[i]
    other = pack([(n, bytes(len(p)) if n.endswith("data/0") else p) for n, p in parts])
    old = io.BytesIO()
    torch.save({"state_dict": {}}, old, _use_new_zipfile_serialization=False)
    swapped = parts.copy()
    swapped[i], swapped[j] = parts[j], parts[i]
    cut = state.randrange(len(part) + 1)
    field, change = state.choice(["crc", "size", "offset"]), state.choice([1, -1, 64, 2**31])
    choices: dict[str, Callable[[], bytes]] = {
        "written anew": lambda: pack(parts),
        f"members {i} and {j} swapped": lambda: pack(swapped),
        f"contents of {i} and {j} swapped": lambda: pack(
            [(n, {i: parts[j][1], j: part}.get(k, p)) for k, (n, p) in enumerate(parts)]
        ),
        f"{name} twice": lambda: pack([*parts, (name, part)]),
        f"{name} twice, other content": lambda: pack([*parts[:i], (name, b"x" + part[1:]), *parts[i:]]),
        f"{name} left out": lambda: pack(parts[:i] + parts[i + 1 :]),
        f"{name} renamed": lambda: pack(
            [*parts[:i], (state.choice([name + "0", "../" + name, "x", ""]), part), *parts[i + 1 :]]
        ),
        f"{name} cut to {cut}": lambda: pack([*parts[:i], (name, part[:cut]), *parts[i + 1 :]]),
        f"{name} longer": lambda: pack([*parts[:i], (name, part + b"\0" * state.choice([1, 64])), *parts[i + 1 :]]),
        f"{name} deflated": lambda: pack(parts, deflated=i),
        "a gap": lambda: pack(parts, gap=b"\0" * state.choice([1, 16, 64])),
        f"{field} of {name} wrong by {change}": lambda: pack(parts, wrong={i: {field: change}}),
        "another member": lambda: pack(
            [*parts, (parts[0][0].partition("/")[0] + state.choice(["/data/999", "/code/a.py", "/x"]), b"x")]
        ),
        "another folder": lambda: pack([*parts[:i], ("other/" + name.partition("/")[2], part), *parts[i + 1 :]]),
        "two archives": lambda: other + content,
        "two archives, the other way": lambda: content + other,
        "an old file before it": lambda: old.getvalue() + content,
        "a prefix": lambda: b"x" * state.choice([1, 64, 1000]) + content,
        "a suffix": lambda: content + b"\0" * state.choice([1, 22, 64]),
        "a comment": lambda: content[:-2] + b"\4\0abcd",
        "cut": lambda: content[: state.randrange(len(content))],
        "zipped again": lambda: _zipped(parts, zipfile.ZIP_STORED),
        "zipped again, deflated": lambda: _zipped(parts, zipfile.ZIP_DEFLATED),
        "a bomb": lambda: _zipped([*parts, ("archive/data/999", bytes(30_000_000))], zipfile.ZIP_DEFLATED),
    }
    what = state.choice(list(choices))
    return what, choices[what]()


def _zipped(parts: Parts, method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return out.getvalue()


NUMBERS = (-1, 0, 1, 2, 7, 255, 65_536, 2**31 - 1)
INSTRUCTIONS = (
    *(b"N", b"0", b"(", b")", b"]", b"}", b"R", b"b", b"s", b"a", b"u", b"e", b"t", b"\x85", b"\x86", b"\x81", b"\x8f"),
    *(b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", b"Q", b"."),
    *(b"cos\nsystem\n", b"ctorch\nComplexFloatStorage\n", b"ctorch\nByteStorage\n", b"ctorch\nDoubleStorage\n"),
    b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R0",  # 64 GB
    b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R0",
    b"X\xff\xff\xff\xffabc",
    b"(" * 10_000,
    b"]" * 10_000 + b"a" * 9_999 + b"0",
    b"]q\xff" + b"h\xffa" * 3,
)


def of_pickle(content: bytes, state: random.Random) -> tuple[str, bytes]:
    """A mutation of the pickle in the archive."""
    parts = parts_of(content)
    script = parts[0][1]
    found = list(pickletools.genops(script))
    starts = [position for *_, position in found] + [len(script)]
    steps = [script[a:b] for a, b in itertools.pairwise(starts)]
    numbers = [k for k, (op, *_) in enumerate(found) if op.name in ("BININT", "BININT1", "BININT2")]
    texts = [k for k, (op, *_) in enumerate(found) if op.name == "BINUNICODE"]
    names = [k for k, (op, *_) in enumerate(found) if op.name == "GLOBAL"]
    k, other = state.randrange(len(steps)), state.randrange(len(steps))
    what = state.choice(["left out", "doubled", "inserted", "swapped", "number", "number", "number", "text", "name"])
    if what == "left out":
        steps[k] = b""
    elif what == "doubled":
        steps[k] *= 2
    elif what == "inserted":
        steps[k] = state.choice(INSTRUCTIONS) + steps[k]
    elif what == "swapped":
        steps[k], steps[other] = steps[other], steps[k]
    elif what == "number":
        k = state.choice(numbers)
        steps[k] = b"J" + struct.pack("<i", state.choice(NUMBERS))
    elif what == "text":
        k = state.choice(texts)
        text = state.choice([b"", b"0", b"1", b"storage", b"x" * 1000, b"\xed\xa0\x80"])
        steps[k] = b"X" + struct.pack("<I", len(text)) + text
    else:
        k = state.choice(names)
        steps[k] = state.choice([i for i in INSTRUCTIONS if i[:1] == b"c" and i[-1:] == b"\n"])
    return f"pickle, instruction {k} ({found[k][0].name}) {what}", pack([(parts[0][0], b"".join(steps)), *parts[1:]])


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def laughs() -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


#: Values of other types, or of no meaning.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "x",
    "a number": lambda: -1,
    "a large number": lambda: 2**70,
    "1e308": lambda: 1e308,
    "NaN": lambda: float("nan"),
    "a truth": lambda: True,
    "a list": list,
    "a dict": dict,
    "a dict with numbers as keys": lambda: {1: 2},
    "pairs": lambda: [(1, 2), "x"],
    "nesting": lambda: nested(30),
    "deep nesting": lambda: nested(400),
    "many values in few": laughs,
    "a long text": lambda: "x" * 10_000_000,
    "a set": lambda: {1, 2},
    "bytes": lambda: b"x",
    "a bytearray": lambda: bytearray(3),
    "a complex number": lambda: 1j,
    "an integer tensor": lambda: torch.arange(3),
    "a tensor without elements": lambda: torch.zeros(0),
    "a complex tensor": lambda: torch.zeros(3, dtype=torch.complex64),
    "a stretched tensor": lambda: torch.zeros(1).expand(1_000_000_000),
    "overlapping windows": lambda: torch.zeros(100).unfold(0, 10, 1),
    "a sparse tensor": lambda: torch.zeros(3, 3).to_sparse(),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "a tensor on meta": lambda: torch.zeros(3, device="meta"),
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(3)),
    "a dtype": lambda: torch.float32,
    "a device": lambda: torch.device("cpu"),
    "a size": lambda: torch.Size([2, 3]),
    "a path": lambda: Path("x"),
}


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested dicts and lists."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*where, key)
            yield from places(value[key], (*where, key))


def of_values(content: bytes, state: random.Random) -> tuple[str, bytes]:
    """A mutation of one value. A place nearer to the root is likelier."""
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    every = list(places(checkpoint))
    length = state.randint(1, max(map(len, every)))
    *above, key = state.choice([place for place in every if len(place) == length])
    within = checkpoint
    for part in above:
        within = within[part]
    how = (
        state.choice(["left out", "under another name", "a copy"])
        if state.random() < 0.2
        else state.choice(list(VALUES))
    )
    where = "/".join(map(str, (*above, key)))
    was = within[key]
    if how == "left out":
        del within[key]
    elif how == "under another name" and isinstance(within, dict):
        within["renamed"] = within.pop(key)
    elif how == "a copy":
        within[key] = copy.deepcopy(was)
    else:
        within[key] = VALUES.get(how, list)()
    number = isinstance(was, int | float) and isinstance(
        within.get(key) if isinstance(within, dict) else 0, int | float
    )
    out = io.BytesIO()
    torch.save(checkpoint, out)
    return f"{'number ' if number else ''}{where}: {how}", out.getvalue()


def mutation(content: bytes, number: int, seed: int) -> tuple[str, bytes]:
    """Mutation number `number`: what it is, and the file."""
    state = random.Random(f"{seed} {number}")
    return state.choice([of_archive, of_pickle, of_values, of_values])(content, state)


def trained(path: Path, options: list[str]) -> dict[str, torch.Tensor]:
    with quiet():
        return weights(train.main(["fit", *options, "--trainer.max_steps=4", f"--ckpt_path={path}"]).model)


def outcome(open_it: Callable[[], dict[str, torch.Tensor]], expected: Path) -> str:
    """`refused`, `equal`, `other`, or anything else that happened."""
    try:
        found = open_it()
    except train.USER_ERRORS as error:
        said = str(error)
        return "refused" if said and "\n" not in said and len(said) < 1000 else f"WRONG: {said[:300]!r}"
    except SystemExit as ended:
        return "finished" if not ended.code else f"WRONG: exit code {ended.code}"
    except BaseException as error:
        return f"WRONG: {type(error).__name__}: {str(error)[:200]}"
    return "equal" if equal(found, torch.load(expected, weights_only=True)) else "other"


def limit() -> None:
    """Leave this process 10 seconds of a processor and 2 GB; the machine may be busy with other work."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    signal.alarm(20 * SECONDS)


def job(path: str, *options: str) -> None:
    """Open a file by both doors, within the limits; writes the outcomes to outcomes.txt."""
    torch.set_num_threads(1)
    limit()
    by_evaluate = outcome(lambda: evaluated(Path(path)), Path("evaluated.pt"))
    Path("outcomes.txt").write_text(by_evaluate)
    by_train = outcome(lambda: trained(Path(path), list(options)), Path("trained.pt"))
    Path("outcomes.txt").write_text(f"{by_evaluate}\n{by_train}")
    os._exit(0)  # no threads to wait for


def prepare(folder: Path) -> tuple[bytes, list[str]]:
    """Train a tiny model in `folder`, and keep what the original gives; its checkpoint and its options."""
    options = [*tiny(folder), "--trainer.logger=false", f"--trainer.default_root_dir={folder / 'new'}"]
    with quiet():
        train.main(["fit", *options])
    whole = next(folder.glob("new/*/checkpoints/last.ckpt"))
    torch.save(evaluated(whole), folder / "evaluated.pt")
    torch.save(trained(whole, options), folder / "trained.pt")
    return whole.read_bytes(), options


def attempt(folder: Path, content: bytes, options: list[str]) -> list[str]:
    """The outcomes of one file by evaluate.py and by train.py."""
    path = folder / "mutated.ckpt"
    path.write_bytes(content)
    (folder / "outcomes.txt").write_text("")
    process = start(folder, job, str(path), *options)
    process.join()
    found = (folder / "outcomes.txt").read_text().split("\n")
    return [*filter(None, found), *([] if process.exitcode == 0 else [f"WRONG: exit code {process.exitcode}"])]


def run(mutations: int, seed: int, first: int = 0) -> int:
    """Print what goes wrong and the counts; the number of wrong outcomes."""
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content, options = prepare(folder)
        for number in range(first, first + mutations):
            what, mutated = mutation(content, number, seed)
            found = attempt(folder, mutated, options)
            if "other" in found and not re.match(r"number|contents|pickle.* number$", what):
                found = ["WRONG: loaded as something else" if each == "other" else each for each in found]
            counts.update(each.split(":")[0] for each in found)
            for each in found:
                if each.startswith("WRONG"):
                    print(f"{number}: {what}: {each}", flush=True)
    print(f"{mutations} mutations by 2 doors: {', '.join(f'{k} {v}' for k, v in sorted(counts.items()))}")
    return counts["WRONG"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.argv = sys.argv[:1]  # Lightning warns about other arguments
    from faults.environment import preload

    preload("faults.fuzz_checkpoints")
    return int(run(given.mutations, given.seed, given.first) > 0)


if __name__ == "__main__":
    from faults import fuzz_checkpoints  # under the name that the forked processes know

    sys.exit(fuzz_checkpoints.main())
