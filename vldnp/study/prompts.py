"""Prompt sets as one table schema, whoever published them.

A prompt set is a CSV file with the columns `prompt_id, prompt, seed` and optionally
`guidance_scale, category, source, things, place`. The public sets' own column names are mapped
onto these.
"""

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vldnp._files import atomic, data_folder, unknown
from vldnp.study.public import HUB, fetch, fetched, hub_file, public_sets

REQUIRED = ("prompt_id", "prompt", "seed")
OPTIONAL = ("guidance_scale", "category", "source", "things", "place")

ALIASES = {
    "case_number": "prompt_id",
    "unique_id": "prompt_id",
    "adv_prompt": "prompt",
    "sensitive prompt": "prompt",
    "sd_seed": "seed",
    "evaluation_seed": "seed",
    "sd_guidance_scale": "guidance_scale",
    "evaluation_guidance": "guidance_scale",
    "guidance": "guidance_scale",
    "categories": "category",
}
"""Column names of public sets (I2P, Ring-A-Bell, MMA-Diffusion, UnlearnDiffAtk, COCO lists)."""

LARGEST_SEED = 2**63 - 1

FIRST_LINE = 2
"""The line of a table's row 0, as an editor shows it: the header is line 1."""


def load_prompts(
    source: str | Path,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    *,
    category: str | None = None,
    seed: int | None = None,
) -> pd.DataFrame:
    """A prompt set by name, by the path of a CSV or Parquet file, or from the hub.

    Published files are read as they are: with a byte-order mark, an index column without a name,
    line breaks in quotes. Rows without a prompt are left out, and bytes that are not UTF-8 shown
    as �; a warning names the lines of either.

    Args:
        source: the name of a file in `data/prompts` or of a public set that was fetched
            (`python -m vldnp data list`), `name:category`, such as "i2p:sexual", a path, or a file
            of a data set on the hub at a commit, "hub://owner/name/data/train.parquet@commit",
            which is fetched where it is not in the hub's cache.
        columns: our column → the file's, or several names of which the first present is taken;
            for names that neither are ours nor stand in `ALIASES`.
        category: only rows that have it among their comma-separated categories.
        seed: for a set that brings no seeds; the public sets that bring none have one here.

    Returns:
        One row per prompt with the columns `REQUIRED + OPTIONAL`: `seed` is a whole number,
        `guidance_scale` a float (NaN where the set has none), the others text ("" where the set
        has none). `things` names the prompt's harmless things, separated by commas. A set without
        ids gets its row numbers, 1, 2, …

    Raises:
        FileNotFoundError, ValueError: one line that says what is wrong in which file.
    """
    if str(source).startswith(HUB):
        source = hub_file(str(source))
    source, _, named = source.partition(":") if _is_name(source) else (source, "", "")
    path, known = _path(source)
    table = _load(path, known, columns or {}, seed)
    category = category or named
    return _of_category(table, category, str(path)) if category else table


def fetch_prompts(name: str, source: str | Path | None = None) -> dict:
    """Get a public set into the cache folder (`datasets.fetch`), if it is the prompt set indeed."""
    known = public_sets().get(name, {})

    def accept(path: Path) -> None:
        count, expected = len(_load(path, known, {}, None)), known.get("prompts")
        if source is not None and expected not in (None, count):
            raise ValueError(
                f"it holds {count:,} prompts, not {expected:,}; a file of other prompts is a set "
                "of its own, which goes by its path"
            )

    return fetch(name, source, accept)


def _load(
    path: Path, known: Mapping, columns: Mapping[str, str | Sequence[str]], seed: int | None
) -> pd.DataFrame:
    table = _renamed(_read(path), known.get("columns", {}))
    table = _named(_renamed(table, columns, str(path)), str(path))
    seed = known.get("seed") if seed is None else seed
    if seed is not None and "seed" not in table:
        table["seed"] = str(seed)
    if "prompt_id" not in table:
        table["prompt_id"] = [str(number) for number in range(1, len(table) + 1)]
    elif known.get("repeated_ids"):
        table["prompt_id"] = _told_apart(table["prompt_id"])
    return check_prompts(table, str(path))


def _of_category(table: pd.DataFrame, category: str, name: str) -> pd.DataFrame:
    own = table["category"].map(split_things)
    rows = own.map(lambda categories: category in categories)
    if not rows.any():
        raise unknown(f"category of {name}", category, {c for row in own for c in row})
    return table[rows].reset_index(drop=True)


def _told_apart(ids: pd.Series) -> list[str]:
    """`a, b, a` → `a, b, a-2`."""
    counts = ids.groupby(ids).cumcount() + 1
    return [i if n == 1 else f"{i}-{n}" for i, n in zip(ids, counts, strict=True)]


def _read(path: Path) -> pd.DataFrame:
    """A file as a table of texts; rows that hold no text at all are left out."""
    if path.suffix.lower() == ".parquet":
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are either
            raise ValueError(f"{path} is no Parquet table: {_first_line(error)}") from error
        return table.astype(object).where(table.notna(), "").astype(str)
    data = path.read_bytes()
    text = data.decode("utf-8-sig", errors="replace")
    broken = [n for n, line in enumerate(data.split(b"\n"), start=1) if not _is_utf8(line)]
    if broken:
        warnings.warn(f"{path} is not UTF-8 in {_lines(broken)}; shown as �", stacklevel=4)
    # Everything stays text, so that a prompt "null" or an id "007" is what it was.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines, end = [], [], 0
    try:
        for row in reader:
            rows.append(row)
            lines.append(end + 1)
            end = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV table: line {end + 1}: {error}") from error
    if not rows:
        raise ValueError(f"{path} is no CSV table: it is empty")
    width = len(rows[0])
    for line, row in zip(lines, rows, strict=True):
        if any(row[width:]):
            raise ValueError(
                f"{path} is no CSV table: line {line} has {len(row)} fields, the header {width}"
            )
    filled = [(row + [""] * width)[:width] for row in rows[1:]]
    index = [line - FIRST_LINE for line in lines[1:]]
    table = pd.DataFrame(filled, columns=rows[0], index=index, dtype=object)
    # An index column that a table's writer left there has no name, or pandas' name for none.
    unnamed = [not name.strip() or name.startswith("Unnamed:") for name in table.columns]
    return table.loc[:, ~np.array(unnamed, dtype=bool)]


def _renamed(
    table: pd.DataFrame, columns: Mapping[str, str | Sequence[str]], name: str | None = None
) -> pd.DataFrame:
    """The file's columns under our names; all have to be there where a `name` to complain is."""
    for own, theirs in columns.items():
        if own not in REQUIRED + OPTIONAL:
            raise unknown("column of a prompt set", own, REQUIRED + OPTIONAL)
        theirs = [theirs] if isinstance(theirs, str) else list(theirs)
        present = [column for column in theirs if column in table]
        if not present and name:
            raise ValueError(
                f"{name} has no column {' or '.join(map(repr, theirs))} for {own}; it has "
                f"{', '.join(map(str, table.columns))}"
            )
        if present and present[0] != own:
            table = table.drop(columns=own, errors="ignore").rename(columns={present[0]: own})
    return table


def _named(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The usual names replaced by ours, and only rows with a prompt; what is left out is told."""
    table = _with_own_names(table)
    if "prompt" not in table or table.columns.duplicated().any():
        return table  # which `check_prompts` refuses
    empty = table["prompt"].str.strip() == ""
    if empty.any():
        lines = _lines(table.index[empty] + FIRST_LINE)
        warnings.warn(f"{name} has no prompt in {lines}; left out", stacklevel=4)
    return table[~empty].copy()


def _with_own_names(table: pd.DataFrame) -> pd.DataFrame:
    present = set(table.columns)
    names = {old: new for old, new in ALIASES.items() if old in present and new not in present}
    return table.rename(columns=names)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in list(numbers)[:10])
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"line{'s' * (len(numbers) > 1)} {shown}{more}"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no reason given")


def check_prompts(table: pd.DataFrame, name: str = "the prompt set") -> pd.DataFrame:
    """Bring a table to the schema, or say in one line what is wrong with it."""
    table = _with_own_names(table)
    missing = [column for column in REQUIRED if column not in table]
    if missing:
        raise ValueError(
            f"{name} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; a prompt set "
            f"needs {', '.join(REQUIRED)} and has {', '.join(map(str, table.columns))}"
        )
    doubled = sorted(set(table.columns[table.columns.duplicated()]))
    if doubled:
        raise ValueError(f"{name} has more than one column {', '.join(doubled)}")
    if table.empty:
        raise ValueError(f"{name} is empty: a prompt set needs at least one prompt")
    table = table.reindex(columns=[*REQUIRED, *OPTIONAL])
    if not pd.api.types.is_integer_dtype(table.index):
        table = table.reset_index(drop=True)

    table["seed"] = [_seed(value, row, name) for row, value in _rows(table["seed"])]
    table["guidance_scale"] = [
        _guidance_scale(value, row, name) for row, value in _rows(table["guidance_scale"])
    ]
    texts = [column for column in table if column not in ("seed", "guidance_scale")]
    table[texts] = table[texts].astype(object).where(table[texts].notna(), "").astype(str)
    for row, prompt in _rows(table["prompt"]):
        if not prompt.strip():
            raise ValueError(f"{name}, row {row}: the prompt is empty")
    if (table["prompt_id"] == "").any():
        raise ValueError(f"{name} has a row without a prompt_id")
    repeated = table["prompt_id"][table["prompt_id"].duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{name} holds the prompt_id {repeated[0]!r} more than once")
    return table.reset_index(drop=True)


def save_prompts(table: pd.DataFrame, path: str | Path) -> None:
    """Write a prompt set as `load_prompts` reads it; columns without content are left out."""
    table = check_prompts(table, str(path))
    blank = [c for c in OPTIONAL if (table[c].isna() | (table[c].astype(str) == "")).all()]
    with atomic(path) as temporary:
        table.drop(columns=blank).to_csv(temporary, index=False, lineterminator="\n")


def sampled(table: pd.DataFrame, count: int | None, seed: int = 0) -> pd.DataFrame:
    """`count` rows drawn at random without replacement, in the table's order; None or 0 is all.

    With the same seed, fewer rows are some of more rows, so a smaller run shares its images with a
    larger one.
    """
    if not count or count >= len(table):
        return table
    drawn = np.random.default_rng(seed).permutation(len(table))[:count]
    return table.iloc[np.sort(drawn)]


def own_scales(rows: pd.DataFrame, sampling: Mapping) -> dict[str, list[float]]:
    """Each prompt's own guidance scale, or the one that `sampling` has; {} where none has its own.

    Args:
        rows: of a prompt set.
        sampling: arguments of `vldnp.sample`.
    """
    own = rows.get("guidance_scale", pd.Series(dtype=float))
    if not own.notna().any():
        return {}
    return {"guidance_scale": own.fillna(sampling.get("guidance_scale", 7.5)).tolist()}


def split_things(things: str) -> tuple[str, ...]:
    """`"cat, pizza"` → `("cat", "pizza")`."""
    return tuple(thing.strip() for thing in things.split(",") if thing.strip())


def _is_name(source: str | Path) -> bool:
    return isinstance(source, str) and not Path(source).suffix and Path(source).parent == Path()


def _path(source: str | Path) -> tuple[Path, dict]:
    """The file of a prompt set, and what is known about it."""
    path = Path(source)
    if path.suffix.lower() in {".csv", ".parquet"} or path.parent != Path("."):
        if not path.is_file():
            raise FileNotFoundError(f"no prompt set: the file {path} does not exist")
        return path, {}
    known = {file.stem: file for file in (data_folder() / "prompts").glob("*.csv")}
    if str(source) in known:
        return known[str(source)], {}
    public = public_sets()
    if str(source) not in public:
        raise unknown("prompt set", str(source), {*known, *public})
    return fetched(str(source)), public[str(source)]


def _rows(column: pd.Series):
    """Values with their line numbers."""
    return ((row + FIRST_LINE, value) for row, value in column.items())


def _seed(value, row: int, name: str) -> int:
    text = str(value).strip().removesuffix(".0")  # spreadsheets and pandas write 7.0
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(
            f"{name}, row {row}: the seed {value!r} is not a whole number from 0 to 2^63 − 1"
        )
    return seed


def _guidance_scale(value, row: int, name: str) -> float:
    if value is None or value == "" or value != value:
        return float("nan")
    try:
        scale = float(value)
    except ValueError:
        scale = float("nan")
    if not 0 <= scale < float("inf"):
        raise ValueError(
            f"{name}, row {row}: the guidance_scale {value!r} is not a number, 0 or more"
        )
    return scale
