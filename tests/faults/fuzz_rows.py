"""Changes rows of results and records in checkpoints at random: is there still a report, and one sentence for the bad?

    python tests/faults/fuzz_rows.py --count 500 --seed 0

Half of the cases put changed lines into a results.jsonl among good ones and run `report`. The other half change what a
checkpoint says of its run and data, and run `evaluate` on it and a good one. Each case is a process of its own, which
must end with exit code 0 within 10 seconds of the processor and 2 GB, without a traceback; the report must have the
good rows or the good checkpoint; a line or file that is left out must be named in one line. Prints every case that does
otherwise, then counts. The exit code is 1 if there is one.
"""

import argparse
import collections
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lightning import Trainer  # noqa: E402

import bsbr_pl.evals.commands  # noqa: E402 - with the next: or every case would import it
import bsbr_pl.report  # noqa: E402, F401
from bsbr_pl.__main__ import main as command  # noqa: E402
from bsbr_pl.attention import ARCHITECTURES  # noqa: E402
from bsbr_pl.data import InductionData  # noqa: E402
from bsbr_pl.module import LanguageModule  # noqa: E402
from callbacks import RunRecorder  # noqa: E402

SECONDS, GIGABYTES = 10, 2.0
LONGEST_LINE = 1500  # characters of a message
ROWS = (ROOT / "results" / "longer" / "results.jsonl", ROOT / "results" / "mqar" / "results.jsonl")
PARTS = ("hyper_parameters", "datamodule_hyper_parameters", "global_step", "run", "callbacks", "initial_weights",
         "InductionData")  # fmt: skip
VALUES: tuple[Callable[[], Any], ...] = (
    *(lambda value=value: value for value in (None, True, "", "no", "x" * 2000, "1e308", [], {}, [[]], {"": ""})),
    *(lambda value=value: value for value in (0, -1, 3, 10**9, 2**62, 2**63, 10**30, -(10**400), 0.5, -0.0, 1e-300)),
    *(lambda value=value: value for value in (1e30, 1e149, 1e308, float("nan"), float("inf"), -float("inf"))),
    *(lambda value=value: value for value in ("\ud800", "\x00", "$x$ <b>", "../../etc/passwd", "owner/name")),
    lambda: [1] * 5000,
    lambda: {str(i): i for i in range(5000)},
    lambda: json.loads("[" * 500 + "]" * 500),
    lambda: "x" * (3 << 20),
)


def places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield (*path, name)
        yield from places(part, *path, name)


def change(value: Any, choose: random.Random) -> tuple[Any, str]:
    """A copy with one part replaced, removed, repeated or exchanged; and what was done."""
    changed = copy.deepcopy(value)
    # Parts near the top are as likely as the many numbers deep inside.
    depth = choose.randint(1, 6)
    found = [path for path in places(changed) if len(path) <= depth]
    *path, last = choose.choice([path for path in found if len(path) == max(map(len, found))])
    within = changed
    for name in path:
        within = within[name]
    how = choose.choice(["replace"] * 6 + ["remove", "exchange", "rename", "repeat"])
    if how == "replace":
        within[last] = choose.choice(VALUES)()
    elif how == "remove":
        del within[last]
    elif how == "exchange":
        other = choose.choice(found)
        part = value
        for name in other:
            part = part[name]
        within[last] = copy.deepcopy(part)
    elif how == "rename" and isinstance(within, dict):
        within[choose.choice(["x", "", "kind", "*", "a.b", "\ud800"])] = within.pop(last)
    else:
        within[last] = [within[last]] * choose.choice([2, 3000])
    after = within.get(last) if isinstance(within, dict) else within[:3]
    return changed, f"{how} {'.'.join(map(str, (*path, last)))} -> {repr(after)[:60]}"


def damage(line: bytes, choose: random.Random) -> tuple[bytes, str]:
    """A line of JSON with its text changed."""
    how = choose.choice(["cut", "bytes", "brackets", "twice", "constants", "bom", "joined", "comment", "strings"])
    place = choose.randrange(len(line))
    changed = {
        "cut": line[:place],
        "bytes": line[:place] + choose.randbytes(5).replace(b"\n", b" ") + line[place + 5 :],
        "brackets": choose.choice([b"[", b'{"a":']) * choose.choice([100, 5000, 200_000]),
        "twice": line[:-1] + b', "values": {}}',
        "constants": line.replace(b"0.", choose.choice([b"NaN", b"-Infinity", b"1e999", b"9" * 5000]), 3),
        "bom": b"\xef\xbb\xbf" + line + b"\r",
        "joined": line + line,
        "comment": b"# " + line,
        "strings": line.replace(b": 0", b': "0'),
    }
    return changed[how], f"{how} at {place}"


def rows_case(folder: Path, choose: random.Random, lines: list[bytes]) -> tuple[str, list[str], str]:
    """Write a results.jsonl; what was changed, the arguments, and an architecture that the report must name."""
    rows = list(map(json.loads, lines))
    chosen = choose.randrange(len(lines))
    if choose.random() < 0.7:
        row, what = change(rows[chosen], choose)
        bad = json.dumps(row).encode()
    else:
        bad, what = damage(lines[chosen], choose)
    others = [line for i, line in enumerate(lines) if i != chosen]
    others.insert(choose.randrange(len(others)), bad)
    (folder / "results.jsonl").write_bytes(b"\n".join(others) + b"\n" * choose.randrange(2))
    arguments = ["report", str(folder / "results.jsonl"), f"--output_dir={folder / 'out'}"]
    about = rows[chosen]["about"]
    others_of = [row for row in rows if row["identity"]["kind"] in ("text", "recall") and row["about"] != about]
    named = choose.choice(
        [row["about"]["architecture"] for row in others_of if row["about"]["seed"] != about.get("seed")]
    )
    return f"{rows[chosen]['identity']['kind']}: {what}", arguments, named


def checkpoint_case(folder: Path, choose: random.Random, whole: dict[str, Any]) -> tuple[str, list[str], str]:
    """Write a good and a changed checkpoint."""
    torch.save(whole, folder / "good.ckpt")
    facts = {name: whole[name] for name in PARTS if name in whole}
    changed, what = change(facts, choose)
    bad = {name: value for name, value in whole.items() if name not in PARTS} | changed
    bad["state_dict"] = {name: tensor + 0.01 for name, tensor in whole["state_dict"].items()}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    torch.save(bad, folder / "bad.ckpt")
    sys.setrecursionlimit(limit)
    options = ["--lengths=[]", "--multiples=[1]", "--device=cpu", f"--output_dir={folder / 'out'}"]
    return f"checkpoint: {what}", ["evaluate", str(folder), *options], "good.ckpt"


def run(arguments: list[str], output: Path) -> tuple[int, float, float]:
    """Run a command in a process of its own: exit code, seconds of the processor, gigabytes."""
    child = os.fork()
    if not child:
        code = 99
        try:
            with output.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            signal.alarm(20 * SECONDS)
            resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
            resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, resource.RLIM_INFINITY))
            code = command(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:  # the child must never go on with the parent's work
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def faults(folder: Path, arguments: list[str], words: str) -> Iterator[str]:
    """Everything that is wrong with one case."""
    code, seconds, gigabytes = run(arguments, folder / "output")
    said = (folder / "output").read_text(errors="replace")
    if code:
        yield f"exit code {code}: {said[-600:]}"
    if "Traceback" in said:
        yield f"traceback: {said[-600:]}"
    if seconds > SECONDS or gigabytes > GIGABYTES:
        yield f"{seconds:.1f} s, {gigabytes:.2f} GB"
    if any(len(line) > LONGEST_LINE for line in said.splitlines()):
        yield "a message is too long"
    page = folder / "out" / "report.html"
    if not page.exists() or words not in page.read_text().replace("<wbr>", ""):
        yield f"the report lacks {words}"


def trained(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint of a tiny model that was trained for a few steps."""
    data = InductionData(8, 16, [16], num_train=64, num_test=16, batch_size=8)
    attention = partial(ARCHITECTURES["bsbr"], chunk_size=8)  # its certificate is short
    module = LanguageModule(attention, data.vocab_size, hidden_dim=8, num_layers=1, num_heads=1)
    trainer = Trainer(
        **{"default_root_dir": folder, "logger": False, "callbacks": [RunRecorder()], "accelerator": "cpu"},
        **{"max_epochs": -1, "max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None},
        **{"use_distributed_sampler": False, "num_sanity_val_steps": 0, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1},
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "whole.ckpt")
    return torch.load(folder / "whole.ckpt", weights_only=True)


def good_lines() -> list[bytes]:
    """Some published rows of every kind: of two checkpoints with the same data."""
    found: dict[str, list[bytes]] = collections.defaultdict(list)
    for path in ROWS:
        for line in path.read_bytes().splitlines():
            kind = json.loads(line)["identity"]["kind"]
            if len(found[kind]) < 4:
                found[kind].append(line)
    for line in found["text"][:3:2]:
        row = json.loads(line)
        timing = {"seconds": 0.5, "interval": [0.4, 0.6], "samples": [0.4, 0.5, 0.6]}
        row["identity"] |= {
            "kind": "cost",
            "checkpoint": row["about"]["checkpoint"]["digest"],
            "length": 256,
            "rounds": 3,
        }
        row["values"] = {"forward": timing, "training": timing, "decode": timing, "forward_bytes": 10, "state_bytes": 8}
        found["cost"] += [json.dumps(row | {"identity": row["identity"] | {"length": n}}).encode() for n in (256, 512)]
    return [line for lines in found.values() for line in lines]


def fuzz(count: int, seed: int) -> collections.Counter[str]:
    """Run the cases and print those that are wrong; number of cases by outcome."""
    outcomes: collections.Counter[str] = collections.Counter()
    torch.set_num_threads(1)  # a forked process has no other
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        with contextlib.redirect_stderr(None):
            whole = trained(Path(place))
        lines = good_lines()
        for number in range(count):
            folder = Path(place) / str(number)
            folder.mkdir()
            choose = random.Random(f"{seed} {number}")
            if number % 2:
                what, arguments, words = checkpoint_case(folder, choose, whole)
            else:
                what, arguments, words = rows_case(folder, choose, lines)
            wrong = list(faults(folder, arguments, words))
            for fault in wrong:
                print(f"{seed} {number}: {what}: {fault}", flush=True)
            outcomes["wrong" if wrong else "right"] += 1
            shutil.rmtree(folder)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = fuzz(options.count, options.seed)
    print(f"{options.count} cases: {dict(outcomes)}")
    return int(outcomes["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
