"""Write the site's pages into build/docs: `python docs/generate.py`. `make docs` builds the site from build/docs.

The script copies the pages of this folder, the pages in PAGES and the published reports. It generates a page for each
architecture in ARCHITECTURES, with its formulas set (`formulas.py`), the reference of every public module, and the
notebook with its outputs. So no page lists architectures or modules by hand.
"""

import inspect
import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(DOCS)]

import formulas  # noqa: E402

import bsbr_pl  # noqa: E402
import callbacks  # noqa: E402
from bsbr_pl.attention import ARCHITECTURES, Attention, base  # noqa: E402

#: Pages outside docs/ -> their path in the site.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
    "benchmarks/README.md": "benchmarks.md",
    "results/README.md": "study.md",
}
OVERVIEW = "README.md#the-architectures"  # a table whose place in the site is a page
LENGTHS = (256, 1024, 4096, 16384, 65536)  # tokens, for the tables of costs
HIDDEN_DIM, NUM_HEADS = 256, 4
REPORTS = sorted(ROOT.glob("results/*/report.html"))
TABLE, FINDINGS = "<!-- the table of the study -->", "<!-- the findings of the study -->"  # in index.md
IMAGE = re.compile(r"(!\[[^\]\n]*\]\()([^):\s]+)\)")
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def main(out: Path = ROOT / "build" / "docs") -> None:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(DOCS, out, ignore=shutil.ignore_patterns("*.py", "*.ipynb", "__pycache__"))
    pages = {path: path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    for source, page in (pages | {ROOT / name: page for name, page in PAGES.items()}).items():
        text = with_links(source.read_text(), source, page)
        write(out / page, with_pictures(text, source, page, out))
    home, readme = out / "index.md", ROOT / "README.md"
    found = with_links(findings(readme), readme, "index.md")
    home.write_text(home.read_text().replace(TABLE, first_table(readme)).replace(FINDINGS, found))
    for report in REPORTS:
        shutil.copy(report, out / f"report_{report.parent.name}.html")
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
    """The text with links that work in the site. A link to a file outside the site becomes its label."""
    places = PAGES | {f"bsbr_pl/attention/{key}.py": f"architectures/{key}.md" for key in ARCHITECTURES}
    places |= {f"results/{path.parent.name}/report.html": f"report_{path.parent.name}.html" for path in REPORTS}

    def place(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        file = (source.parent / target).resolve()
        if file.is_relative_to(DOCS) and file.suffix != ".py":
            to = file.relative_to(DOCS).as_posix().replace(".ipynb", ".md")
        elif f"{os.path.relpath(file, ROOT)}{anchor}" == OVERVIEW:
            to, anchor = "architectures/index.md", None
        else:
            to = places.get(os.path.relpath(file, ROOT))
        return f"[{label}]({os.path.relpath(to, Path(page).parent)}{anchor or ''})" if to else label

    return LINK.sub(place, text)


def with_pictures(text: str, source: Path, page: str, out: Path) -> str:
    """The text with pictures that exist in the site. Pictures outside docs/ are copied to the top of the site."""

    def place(match: re.Match[str]) -> str:
        label, target = match.groups()
        file = (source.parent / target).resolve()
        to = file.relative_to(DOCS).as_posix() if file.is_relative_to(DOCS) else file.name
        if not file.is_relative_to(DOCS):
            shutil.copy(file, out / to)
        return f"{label}{os.path.relpath(to, Path(page).parent)})"

    return IMAGE.sub(place, text)


def first_table(page: Path) -> str:
    """The first table of a page that begins with the column `model`."""
    return re.findall(r"^\| model .*\n(?:\|.*\n)+", page.read_text(), re.M)[0]


def findings(page: Path) -> str:
    """What a page says between two comments."""
    return re.findall(r"<!-- findings -->\n(.*?)<!-- end of findings -->", page.read_text(), re.DOTALL)[0]


# -- architectures -----------------------------------------------------------------------------------------------------


def documentation(architecture: type[Attention]) -> tuple[str, str, str]:
    """Split the docstring of an architecture's module: its name, the summary sentence, the rest as HTML."""
    summary, _, body = (sys.modules[architecture.__module__].__doc__ or "").partition("\n\n")
    body = re.sub(r"\n(?=(Source|Differences?|Cost|Decode state): )", "\n\n", body)  # one paragraph each
    options = [name for name in inspect.signature(architecture).parameters if "_" in name]
    return re.split("[:,.]", summary)[0], " ".join(summary.split()), formulas.set_text(body, options)


def legend() -> str:
    """The letters and signs that `base.py` defines, as HTML."""
    letters = re.findall(r"\b([A-Z])  (.+?)(?=  |$)", base.__doc__ or "", re.M)
    signs = (base.__doc__ or "").rpartition("\n\n")[2]
    text = f"Letters: {', '.join(f'{letter}: {meaning}' for letter, meaning in letters)}. {signs}"
    return f"<p>{formulas.set_prose(text, letters='A')}</p>"


def amount(value: float) -> str:
    return f"{value:,.0f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    lines += [["---"] + ["---:"] * (len(lines[0]) - 1), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def costs(architecture: type[Attention], length: int) -> tuple[int, int, float]:
    """FLOPs per token, numbers in the decode state, and their ratio to the 2 T D numbers of a KV cache."""
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
    quantities = ("FLOPs per token", "decode state")
    head = ["architecture", *(f"{quantity} at {T:,}" for quantity in quantities for T in (short, long))]
    return f"""# All architectures

Each architecture is one file with the contract of [`Attention`](../api/bsbr_pl.attention.md). Its definition
(a matrix), the fast form for training and the step for decoding give the same outputs and gradients.

The table is computed from closed forms, for one layer with `hidden_dim={HIDDEN_DIM}, num_heads={NUM_HEADS}` and default
options. The decode state is the number of stored values for one sequence.

{table(head, rows)}
Costs in seconds and bytes: [benchmarks](../benchmarks.md). Limits: [limits](../limits.md).
"""


def architecture_page(key: str, architecture: type[Attention]) -> str:
    name, summary, body = documentation(architecture)
    rows = [
        [f"{length:,}", amount(flops), amount(state), f"{share:.3g}"]
        for length in LENGTHS
        for flops, state, share in [costs(architecture, length)]
    ]
    heads = ["tokens", "FLOPs per token", "decode state, numbers", "relative to a KV cache"]
    return f"""# {name}

{summary}

```bash
python train.py fit --config configs/{key}.yaml
```

## Definition

<div class="definition">
{body}
{legend()}
</div>

## Options

On the command line: `--model.attention.NAME=VALUE`. In YAML: `model.attention.init_args`.

::: {architecture.__module__}.{architecture.__qualname__}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      members: false

## Attention map

{picture(key)}

## Costs

Closed forms for one layer with default options. `tests/utils/test_flops.py` compares them with two FLOP counters.

```python
from bsbr_pl.attention import ARCHITECTURES

attention = ARCHITECTURES["{key}"](hidden_dim={HIDDEN_DIM}, num_heads={NUM_HEADS})
attention.flops({LENGTHS[0]}) // {LENGTHS[0]}, attention.state_size({LENGTHS[0]})
```

{table(heads, rows)}
A multiply-add counts as 2 FLOPs. The last column is the decode state divided by 2 T D, the size of a KV cache.
"""


def picture(key: str) -> str:
    command = f"python docs/attention_maps.py {key}"
    if not (DOCS / "img" / "architectures" / f"{key}.png").exists():
        print(f"no picture of {key}: `{command}` draws it")
        return f"There is no picture yet: `{command}` draws it."
    return f"""![attention maps of {key}](../img/architectures/{key}.png)

Rows are queries, columns are keys. White is exactly 0, red is positive, blue is negative. `{command}` draws the map:
it trains two layers briefly on the source code of Python's standard library, and shows the first 128 tokens of the
validation text. Chunks and windows have 32 tokens here, so that their edges are visible.
"""


# -- reference ---------------------------------------------------------------------------------------------------------


def reference(package) -> Iterable[tuple[str, str]]:
    """(name, page): one for a package without subpackages, otherwise one for each module and subpackage."""
    inside = list(pkgutil.iter_modules(package.__path__, f"{package.__name__}."))
    if any(module.ispkg for module in inside):
        yield from ((module.name, reference_page(module)) for module in inside if is_public(module.name))
    else:
        yield package.__name__, reference_page(pkgutil.ModuleInfo(None, package.__name__, True))


def is_public(name: str) -> bool:
    return not name.rpartition(".")[2].startswith("_")


def reference_page(module: pkgutil.ModuleInfo) -> str:
    """The page of a module, or of a package: its docstring, then its public modules."""
    own = f"# {module.name}\n\n::: {module.name}\n    options:\n"
    own += "      show_root_heading: false\n      show_root_toc_entry: false\n"
    if not module.ispkg:
        return own
    inside = pkgutil.walk_packages([str(ROOT / module.name.replace(".", "/"))], f"{module.name}.")
    return own + "      members: false\n" + "".join(f"\n::: {m.name}\n" for m in inside if is_public(m.name))


def notebook(path: Path, out: Path) -> None:
    """Write the notebook as Markdown, with its saved outputs."""
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
