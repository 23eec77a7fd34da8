"""Prompt sets as one table schema, whoever published them.

A prompt set is a CSV file with the columns `prompt_id, prompt, seed` and optionally
`guidance_scale, category, source, things, place`. The public sets' own column names are mapped
onto these.
"""

from pathlib import Path

import pandas as pd

from vldnp.files import atomic, data_folder, unknown

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


def load_prompts(source: str | Path) -> pd.DataFrame:
    """A prompt set by name (of a file in `data/prompts`) or by the path of a CSV file.

    Returns:
        One row per prompt with the columns `REQUIRED + OPTIONAL`: `seed` is a whole number,
        `guidance_scale` a float (NaN where the set has none), the others text ("" where the set
        has none). `things` names the prompt's harmless things, separated by commas.

    Raises:
        FileNotFoundError, ValueError: one line that says what is wrong in which file.
    """
    path = _path(source)
    try:
        # Everything is read as text, so that a prompt "null" or an id "007" stays what it is.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV table: {str(error).splitlines()[0]}") from error
    return check_prompts(table, str(path))


def check_prompts(table: pd.DataFrame, name: str = "the prompt set") -> pd.DataFrame:
    """Bring a table to the schema, or say in one line what is wrong with it."""
    present = set(table.columns)
    table = table.rename(
        columns={old: new for old, new in ALIASES.items() if old in present and new not in present}
    )
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
    table = table.reindex(columns=[*REQUIRED, *OPTIONAL]).reset_index(drop=True)

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
    return table


def save_prompts(table: pd.DataFrame, path: str | Path) -> None:
    """Write a prompt set as `load_prompts` reads it; columns without content are left out."""
    table = check_prompts(table, str(path))
    blank = [c for c in OPTIONAL if (table[c].isna() | (table[c].astype(str) == "")).all()]
    with atomic(path) as temporary:
        table.drop(columns=blank).to_csv(temporary, index=False, lineterminator="\n")


def split_things(things: str) -> tuple[str, ...]:
    """`"cat, pizza"` → `("cat", "pizza")`."""
    return tuple(thing.strip() for thing in things.split(",") if thing.strip())


def _path(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix.lower() == ".csv" or path.parent != Path("."):
        if not path.is_file():
            raise FileNotFoundError(f"no prompt set: the file {path} does not exist")
        return path
    known = {file.stem: file for file in (data_folder() / "prompts").glob("*.csv")}
    if str(source) not in known:
        raise unknown("prompt set", str(source), known)
    return known[str(source)]


def _rows(column: pd.Series):
    """Values with their line numbers as a spreadsheet shows them (the header is line 1)."""
    return enumerate(column, start=2)


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
