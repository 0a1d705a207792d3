"""The attention maps that rows hold."""

import base64

from .plots import Picture
from .sources import of_map, problem, subject
from .studies import Findings

PNG, LARGEST = b"\x89PNG\r\n\x1a\n", 60_000  # bytes


def pictures(findings: Findings) -> list[Picture | str]:
    """The map of one checkpoint of each label and data set; and in words, which have none."""
    rows = findings.of("map")
    found: dict[tuple[str, str], Picture | str] = {}
    for digest, checkpoint in findings.checkpoints.items():
        label = findings.labels[digest]
        if digest in rows and (checkpoint.fingerprint, label) not in found:
            values = rows[digest]["values"]
            png = base64.b64decode(values["png"])
            caption = f"{checkpoint.name}. {values['caption']}"
            sound = png.startswith(PNG) and len(png) <= LARGEST
            shown = Picture(f"attention_{len(found) + 1}", f"Attention of {label}", caption, png)
            found[checkpoint.fingerprint, label] = shown if sound else f"Without a map: {label}: its row holds no picture."
    missing = sorted(f"Without a map: {subject(row)}: {problem(row)}." for row in findings.problems if of_map(row))
    return [*found.values(), *missing]
