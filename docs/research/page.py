"""Put the scripts of this folder and what they printed into README.md: `python docs/research/page.py`."""

import re
from pathlib import Path

HERE = Path(__file__).parent
BLOCK = re.compile(r"<!-- (\S+)\.(py|txt) -->\n```\w*\n.*?^```\n", re.DOTALL | re.MULTILINE)


def render(page):
    """The page with every block `<!-- file -->` filled from its file."""

    def fill(match):
        stem, kind = match.groups()
        file = HERE / f"{stem}.{kind}"
        text = file.read_text() if file.exists() else "(not run yet)\n"
        return f"<!-- {file.name} -->\n```{'python' if kind == 'py' else 'text'}\n{text}```\n"

    return BLOCK.sub(fill, page)


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(render(readme.read_text()))
