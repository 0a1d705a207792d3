"""A file with a JSON line for each measurement of a run that counts. What has a line is not measured again."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bsbr_pl.utils.files import write_whole

Line = dict[str, Any]


def add_missing(path: Path, wanted: Iterable[tuple[Line, Callable[[], Line]]]) -> list[Line]:
    """Measure what has no line yet; each line is written as soon as it is measured.

    Args:
        path: of the file.
        wanted: the fields that identify a line, and the function that measures its other fields.

    Returns:
        every line of the file.
    """
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for identity, measure in wanted:
        if not any(identity.items() <= line.items() for line in kept):
            kept.append(identity | measure())
            print(kept[-1], flush=True)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept
