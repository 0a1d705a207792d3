"""Write the site's pages into build/docs: `python docs/generate.py`. The builder (`make docs`) reads only those.

Copied are this folder's pages and those in PAGES. Made are a page for each architecture in ARCHITECTURES, the reference
of every public module, and the notebook with its outputs: no page lists architectures or modules by hand.
"""

import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

import bsbr_pl  # noqa: E402
import callbacks  # noqa: E402
from bsbr_pl.attention import ARCHITECTURES, Attention  # noqa: E402

#: Pages that stand elsewhere in the repository -> where they go in the site.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
    "benchmarks/README.md": "benchmarks.md",
    "results/README.md": "study.md",
}
LENGTHS = (256, 1024, 4096, 16384, 65536)  # tokens, at which the closed forms are shown
HIDDEN_DIM, NUM_HEADS = 256, 4
IMAGE = re.compile(r"!\[[^\]\n]*\]\(([^):\s]+)\)")  # of a page in PAGES
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def main(out: Path = ROOT / "build" / "docs") -> None:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(DOCS, out, ignore=shutil.ignore_patterns("*.py", "*.ipynb", "__pycache__"))
    for path in out.rglob("*.md"):
        source = path.relative_to(out).as_posix()
        path.write_text(with_links(path.read_text(), DOCS / source, source))
    for source, page in PAGES.items():
        text = with_links((ROOT / source).read_text(), ROOT / source, page)
        for picture in IMAGE.findall(text):
            shutil.copy((ROOT / source).parent / picture, out / Path(picture).name)
        write(out / page, IMAGE.sub(lambda match: match[0].replace(match[1], Path(match[1]).name), text))
    write(out / "architectures" / "index.md", overview())
    for key, architecture in ARCHITECTURES.items():
        write(out / "architectures" / f"{key}.md", architecture_page(key, architecture))
    for package in (bsbr_pl, callbacks):
        for name, text in reference(package):
            write(out / "api" / f"{name}.md", text)
    notebook(DOCS / "quickstart.ipynb", out)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def with_links(text: str, source: Path, page: str) -> str:
    """The text of a file of the repository for its place in the site: links to what is not in the site are its name."""
    places = PAGES | {f"bsbr_pl/attention/{key}.py": f"architectures/{key}.md" for key in ARCHITECTURES}

    def place(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        file = (source.parent / target).resolve()
        if file.is_relative_to(DOCS) and file.suffix != ".py":
            to = file.relative_to(DOCS).as_posix().replace(".ipynb", ".md")
        else:
            to = places.get(os.path.relpath(file, ROOT))
        return f"[{label}]({os.path.relpath(to, Path(page).parent)}{anchor or ''})" if to else label

    return LINK.sub(place, text)


# -- architectures -----------------------------------------------------------------------------------------------------


def documentation(architecture: type[Attention]) -> tuple[str, str, str]:
    """Of an architecture's module: its name, what it is in a sentence, and all that follows."""
    summary, _, body = (sys.modules[architecture.__module__].__doc__ or "").partition("\n\n")
    body = re.sub(r"\n(?=(Source|Cost|Decode state): )", "\n\n", body)  # a paragraph each
    return re.split("[:,.]", summary)[0], " ".join(summary.split()), body.strip("\n")


def amount(value: float) -> str:
    return f"{value:,.0f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    lines += [["---"] + ["---:"] * (len(lines[0]) - 1), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def costs(architecture: type[Attention], length: int) -> tuple[int, int, float]:
    """FLOPs a token, numbers of decode state, and how many times the 2 T D numbers of a key-value cache that is."""
    attention = architecture(HIDDEN_DIM, NUM_HEADS)
    state = attention.state_size(length)
    return attention.flops(length) // length, state, state / (2 * length * HIDDEN_DIM)


def overview() -> str:
    short, long = LENGTHS[1], LENGTHS[-2]
    rows = []
    for key, architecture in ARCHITECTURES.items():
        name = documentation(architecture)[0]
        (few, small, _), (many, large, _) = costs(architecture, short), costs(architecture, long)
        rows.append([f"[{name}]({key}.md)", amount(few), amount(many), amount(small), amount(large)])
    head = ["architecture"] + [f"{what} at {T:,}" for what in ("FLOPs a token", "decode state") for T in (short, long)]
    return f"""# All architectures

Each is one file under the contract of [`Attention`](../api/bsbr_pl.attention.md): its definition as a matrix, the fast
form that trains, and the step that decodes say the same, outputs and gradients. The figures are closed forms, as every
page computes them, of one layer with `hidden_dim={HIDDEN_DIM}, num_heads={NUM_HEADS}` and default options; the
decode state is in numbers, of one sequence.

{table(head, rows)}
What each costs in seconds and bytes: [benchmarks](../benchmarks.md). What none of them can do: [limits](../limits.md).
"""


def architecture_page(key: str, architecture: type[Attention]) -> str:
    name, summary, body = documentation(architecture)
    rows = [
        [f"{length:,}", amount(flops), amount(state), f"{share:.3g}"]
        for length in LENGTHS
        for flops, state, share in [costs(architecture, length)]
    ]
    heads = ["tokens", "FLOPs a token", "decode state, numbers", "times a key-value cache"]
    return f"""# {name}

{summary}

```bash
python train.py fit --config configs/{key}.yaml
```

## Definition

The letters are those of [`bsbr_pl.attention.base`](../api/bsbr_pl.attention.md).

{body}

## Options

On the command line `--model.attention.NAME=VALUE`, in YAML `model.attention.init_args`.

::: {architecture.__module__}.{architecture.__qualname__}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      members: false

## What it attends to

{picture(key)}

## What it costs

Closed forms of one layer, default options; `tests/utils/test_flops.py` holds them to two counters.

```python
from bsbr_pl.attention import ARCHITECTURES

attention = ARCHITECTURES["{key}"](hidden_dim={HIDDEN_DIM}, num_heads={NUM_HEADS})
attention.flops({LENGTHS[0]}) // {LENGTHS[0]}, attention.state_size({LENGTHS[0]})
```

{table(heads, rows)}
A multiply-add is 2. The key-value cache that the last column divides by holds 2 T D numbers.
"""


def picture(key: str) -> str:
    command = f"python docs/attention_maps.py {key}"
    if not (DOCS / "img" / "architectures" / f"{key}.png").exists():
        print(f"no picture of {key}: `{command}` draws it")
        return f"There is no picture yet: `{command}` draws it."
    return f"""![attention maps of {key}](../img/architectures/{key}.png)

Rows are queries, columns what they attend to; white is exactly 0, red positive, blue negative. Drawn by
`{command}`, which trains two layers on the standard library's source code for a short while (its text
says how) and shows the first 128 tokens of the validation text. Chunks and windows are of 32 tokens there, to be seen.
"""


# -- reference ---------------------------------------------------------------------------------------------------------


def reference(package) -> Iterable[tuple[str, str]]:
    """(name, page) of a package without packages inside, or of every module and package in it."""
    inside = list(pkgutil.iter_modules(package.__path__, f"{package.__name__}."))
    if any(module.ispkg for module in inside):
        yield from ((module.name, reference_page(module)) for module in inside if is_public(module.name))
    else:
        yield package.__name__, reference_page(pkgutil.ModuleInfo(None, package.__name__, True))


def is_public(name: str) -> bool:
    return not name.rpartition(".")[2].startswith("_")


def reference_page(module: pkgutil.ModuleInfo) -> str:
    """A module; or a package's own words, then the public modules in it, by which its names are defined."""
    own = f"# {module.name}\n\n::: {module.name}\n    options:\n"
    own += "      show_root_heading: false\n      show_root_toc_entry: false\n"
    if not module.ispkg:
        return own
    inside = pkgutil.walk_packages([str(ROOT / module.name.replace(".", "/"))], f"{module.name}.")
    return own + "      members: false\n" + "".join(f"\n::: {m.name}\n" for m in inside if is_public(m.name))


def notebook(path: Path, out: Path) -> None:
    """The notebook as Markdown, with the outputs it was kept with."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path))
    for name, content in resources["outputs"].items():
        folder = out / "quickstart_files"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        text = text.replace(f"]({name})", f"](quickstart_files/{name})")
    write(out / "quickstart.md", text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
