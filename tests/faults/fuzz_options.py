"""Random values of options and random YAML for train.py: a short training, or one sentence and exit code 1 or 2.

    python tests/faults/fuzz_options.py                                  # 300 of each
    python tests/faults/fuzz_options.py --what yaml --draws=20 --seed=1

Every draw is a process of its own with 10 seconds and 2 GB. The options are those of `train.py fit --help`, of the data
and of the architecture, but for processes and machines, for which a run waits, and torch.compile, which takes longer.
"""

import argparse
import contextlib
import inspect
import io
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.damage import tiny  # noqa: E402
from faults.environment import preload  # noqa: E402
from faults.fuzz_checkpoints import limit  # noqa: E402
from faults.kill_and_resume import start  # noqa: E402

import train  # noqa: E402
from bsbr_pl.attention import BSBRAttention  # noqa: E402
from bsbr_pl.data import TextData  # noqa: E402

LEFT_OUT = ("devices", "num_nodes", "strategy", "compile", "help", "print_config", "ckpt_path")
WORDS = """
null true false ~ - -- 0 -0.0 1 2 -1 3 7 17 64 1.5 0.5 -0.5 0.0001 1e9 1e308 1e-308 1e400 nan .nan inf -inf .inf -.inf
0x10 1_000 .5 2147483648 9223372036854775807 9223372036854775808 -9223372036854775809 x é ' " %s {0} $HOME ../.. / .
/dev/null /dev/zero /proc/self/mem nowhere/x [] {} [1,2] [1,[2]] [null] {a:1} 2001-01-01 00:00:00:01 bsbr linear
standard [bsbr,linear] cuda auto cpu 16-mixed bf16 last best stdlib bytes bpe norm value TextData MQARData CSVLogger *a
"""
NUMBERS = (
    0,
    1,
    2,
    3,
    5,
    8,
    16,
    17,
    32,
    64,
    100,
    1000,
    65_536,
    2**31,
    10**9,
    -1,
    -2,
    0.5,
    1.0,
    0.1,
    0.99,
    1e-9,
    2.5,
    "true",
)
VALUES = (
    *WORDS.split(),
    *("", "9" * 400, "1" + "0" * 40, "x" * 5000, "\u202e", "\U0001f600", "a b", "a\nb", "\t", "[" * 100, "{a: " * 30),
    *("{a: 1}", "{1: 2}", "&a [*a]", "!!binary aGk=", "!!python/name:os.system", "{class_path: linear}"),
    *("{class_path: os.system}", "{init_args: {}}", "{class_path: bsbr, init_args: 3}", "[{class_path: StepTimer}]"),
)
YAML = """seed_everything: 1
trainer:
  max_steps: 2
  val_check_interval: 2
  gradient_clip_val: 1.0
  callbacks:
    - class_path: callbacks.StepTimer
      init_args: {warmup_steps: 1}
model:
  attention:
    class_path: bsbr_pl.attention.BSBRAttention
    init_args:
      chunk_size: 16
  hidden_dim: 16
  num_layers: 1
data:
  class_path: bsbr_pl.data.TextData
  init_args:
    context_length: 32
    batch_size: 4
"""
PIECES = (
    *(*":[]{},#|>'@`~é", '"', "null", "\U0001f600", "\ufeff", "\x00", "\x85"),
    *("- ", "  ", "    ", "\t", "\n", "&a ", "*a", "<<: *a", "!!str ", "!x ", "? ", "\r\n", "[" * 50),
    *("---\n", "...\n", "%YAML 1.1\n", "a: &a {b: 1}\n", "!!python/object/apply:os.system [ls]"),
    *("trainer: {max_steps: 2}\n", "model:\n"),
)


def known_options() -> list[str]:
    """The names of the options, without dashes."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        train.main(["fit", "--help"])
    names = re.findall(r"^  --([\w.]+)", said.getvalue(), re.MULTILINE)
    names += [f"data.{name}" for name in inspect.signature(TextData).parameters]
    names += [f"model.attention.{name}" for name in list(inspect.signature(BSBRAttention).parameters)[2:]]
    return [name for name in dict.fromkeys(names) if name.rpartition(".")[2] not in LEFT_OUT]


def draw_option(state: random.Random, names: list[str]) -> list[str]:
    """One or two options; most values are numbers, which most options take."""
    chosen = [
        (state.choice(names), state.choice(state.choice([NUMBERS, NUMBERS, VALUES])))
        for _ in range(state.choice([1, 1, 2]))
    ]
    return [f"--{name}{state.choice(['='] * 9 + ['+='])}{value}" for name, value in chosen]


def draw_yaml(state: random.Random) -> str:
    """The configuration above with one to three changes, half of them of its text and half of its values."""
    return change_text(state) if state.random() < 0.5 else change_values(state)


def change_values(state: random.Random) -> str:
    """Valid YAML in which one or two values are others, or are left out, or are in a list."""
    config = yaml.safe_load(YAML)
    for _ in range(state.randint(1, 2)):
        place, name = state.choice(list(places(config)))
        how = state.randrange(8)
        if how == 0:
            del place[name]
        elif how == 1:
            place[name] = [place[name]]
        elif how == 2:
            place[name] = None
        else:
            place[name] = state.choice(state.choice([NUMBERS, VALUES]))
    return yaml.safe_dump(config)


def places(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every value of a configuration, as the dict that holds it and its name there."""
    for name, value in section.items():
        yield section, name
        if isinstance(value, dict):
            yield from places(value)


def change_text(state: random.Random) -> str:
    """One to three changes of the text, most of which are no valid YAML."""
    lines = YAML.splitlines(keepends=True)
    for _ in range(state.randint(1, 3)):
        i, j = state.randrange(len(lines)), state.randrange(len(lines))
        place = state.randrange(len(lines[i]) + 1)
        how = state.randrange(12)
        if how == 0:
            lines[i] = ""
        elif how == 1:
            lines[i] *= 2
        elif how == 2:
            lines[i], lines[j] = lines[j], lines[i]
        elif how == 3:
            lines[i] = " " * state.randint(0, 9) + lines[i].lstrip()
        elif how == 4:
            lines[i] = lines[i][:place] + state.choice(PIECES) + lines[i][place:]
        elif how == 5:
            lines[i] = lines[i][:place] + lines[i][place + 1 :]
        else:
            lines[i] = lines[i].partition(":")[0] + f": {state.choice(state.choice([NUMBERS, VALUES]))}\n"
    return "".join(lines)


def job(*options: str) -> None:
    """Train within the limits; the exit code is that of train.py."""
    torch.set_num_threads(1)
    limit()
    try:
        train.command_line(["fit", *options])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else int(bool(ended.code)))
    os._exit(0)


def attempt(folder: Path, more: list[str]) -> str:
    """`trained`, `refused`, or what else happened."""
    bounds = [
        "--trainer.logger=false",
        f"--trainer.default_root_dir={folder / 'new'}",
        "--trainer.max_time=00:00:00:02",
    ]
    process = start(folder, job, *tiny(folder), *bounds, *more)
    process.join()
    said = (folder / "output.txt").read_text(errors="replace")
    (folder / "output.txt").unlink()
    *_, last = [line for line in said.splitlines() if ": error: " in line] or [""]
    if process.exitcode == 0 and "Traceback" not in said:
        return "trained"
    if process.exitcode in (1, 2) and "Traceback" not in said and 0 < len(last) < 1000:
        return "refused"
    return f"WRONG: exit code {process.exitcode}: {' | '.join(said.strip().splitlines()[-3:])[-500:]}"


def run(what: str, draws: int, seed: int) -> int:
    """Print what goes wrong and the counts; the number of wrong outcomes."""
    counts: dict[str, int] = {}
    names = known_options() if what == "options" else []
    for number in range(draws):
        state = random.Random(f"{what} {seed} {number}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if what == "options":
                more = draw_option(state, names)
            else:
                (folder / "drawn.yaml").write_text(draw_yaml(state), errors="surrogatepass")
                more = ["--config=drawn.yaml"]
            if any("\0" in option for option in more):
                continue
            found = attempt(folder, more)
            if found.startswith("WRONG"):
                drawn = more if what == "options" else (folder / "drawn.yaml").read_text(errors="replace")
                print(f"{number}: {str(drawn)[:600]}: {found}", flush=True)
        counts[found.split(":")[0]] = counts.get(found.split(":")[0], 0) + 1
    print(
        f"{sum(counts.values())} draws of {what}: {', '.join(f'{k} {v}' for k, v in sorted(counts.items()))}",
        flush=True,
    )
    return counts.get("WRONG", 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("options", "yaml"), default=["options", "yaml"])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.argv = sys.argv[:1]
    preload("faults.fuzz_options")
    return int(sum(run(what, given.draws, given.seed) for what in given.what) > 0)


if __name__ == "__main__":
    from faults import fuzz_options  # under the name that the forked processes know

    sys.exit(fuzz_options.main())
