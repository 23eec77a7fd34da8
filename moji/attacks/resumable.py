"""Searches that can be interrupted and resumed: each row is logged as soon as it is found."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm.auto import tqdm

from vldnp._files import write_text


def resumed(
    log: Path, settings: Mapping, count: int, find: Callable[[int], dict], progress: bool = True
) -> list[dict]:
    """Rows 0 … `count` − 1 of a search; those in the log are not searched again.

    Args:
        log: JSON lines: the settings, then a row each, appended as soon as it is found. A last line
            that an interruption cut short is searched again.
        settings: all that decides the rows, JSON-able.
        find: row number n, a function of n and the settings alone.

    Raises:
        ValueError: the log is of a search with other settings.
    """
    settings = json.loads(json.dumps(settings))
    lines = _lines(log)
    if lines and lines[0] != settings:
        differing = sorted(k for k in settings if lines[0].get(k) != settings[k])
        raise ValueError(
            f"{log} is of a search with another {', '.join(differing) or 'setting'}; "
            "name another folder, or remove it to search anew"
        )
    rows = lines[1:]
    write_text(log, "".join(json.dumps(line) + "\n" for line in [settings, *rows]))
    for n in tqdm(range(len(rows), count), desc=log.stem, disable=not progress, mininterval=5):
        line = json.dumps(find(n))
        with log.open("a") as file:
            file.write(line + "\n")
        rows.append(json.loads(line))
    return rows[:count]


def logged(log: Path) -> list[dict]:
    """The rows in a log so far; none where there is no log."""
    return _lines(log)[1:]


def _lines(log: Path) -> list[dict]:
    """The whole lines of a log."""
    whole = log.read_text().rpartition("\n")[0] if log.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]
