"""Rows of data sets on the Hugging Face Hub, read through `datasets`."""

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from .rows import check_text, missing_column


def read_hub(arguments: dict[str, Any], split: str, column: str) -> Iterator[str | None]:
    """The texts of a column of a data set's split; None for a row without text.

    Args:
        arguments: of `datasets.load_dataset`, without the split

    Raises:
        ValueError: the data set cannot be read, and what to do; or the column is missing or holds no strings.
    """
    for number, row in enumerate(_rows(arguments, split), 1):
        if column not in row:
            raise missing_column(column, arguments["path"], row)
        yield check_text(row[column], column, f"{arguments['path']}, row {number} of {split!r}")


def _rows(arguments: dict[str, Any], split: str) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.utils.logging.disable_progress_bar()
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            _check_hub_answers()
        yield from datasets.load_dataset(**arguments, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source={arguments['path']!r} (split {split!r}) cannot be read: {error}. If this machine is offline, set "
            "HF_HUB_OFFLINE=1 to use a data set that was downloaded before, or give the path of its .parquet, .jsonl "
            "or text files as source; source='packages' needs no download"
        ) from error


def _check_hub_answers() -> None:
    """ConnectionError at once; the Hub's own client would try again for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if "https" in getproxies():
        return  # only the proxy needs to be reachable from here
    host = urlsplit(ENDPOINT).hostname
    try:
        socket.create_connection((host, urlsplit(ENDPOINT).port or 443), timeout=5).close()
    except OSError as error:
        raise ConnectionError(f"{host} does not answer ({error})") from error
