"""Prompt sets of any source as tables with the same columns."""

import hashlib
import re
import urllib.request
import warnings
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from vldnp._files import atomic, data_folder, first_line, unknown, user_cache

REQUIRED = ("prompt_id", "prompt", "seed")
NUMBERS = ("guidance_scale", "width", "height")
OPTIONAL = ("guidance_scale", "category", "source", "things", "place", "width", "height")
ALIASES = {"category": ["categories"], "width": ["sd_image_width"], "height": ["sd_image_height"]}
ALIASES |= {"prompt_id": ["case_number", "unique_id", "image_id"]}
ALIASES |= {"prompt": ["adv_prompt", "sensitive prompt"], "seed": ["evaluation_seed", "sd_seed"]}
ALIASES |= {"guidance_scale": ["evaluation_guidance", "sd_guidance_scale", "guidance"]}
"""Our columns → those of I2P, Ring-A-Bell, MMA-Diffusion, UnlearnDiffAtk and COCO. If a
file has several, our name takes precedence, then the first of these."""

LARGEST_SEED = 2**63 - 1


def load_prompts(
    source: str | Path, columns: Mapping[str, str] | None = None, *, seed: int | None = None
) -> pd.DataFrame:
    """A prompt set as a table with the columns `REQUIRED + OPTIONAL`, a row per prompt.

    `source` is a name in `data/prompts`, or of a public set, which is downloaded when it is first
    used, either perhaps with a category ("i2p:sexual"); or the path of a CSV, TSV or Parquet file.
    `columns` is our column → the file's (the rest goes by the same names or by `ALIASES`), `seed`
    that of every prompt, for a set that brings none.

    `NUMBERS` are NaN where the set has none. Ids are 1, 2, … where there are none; rows without a
    prompt are left out, with a warning. In errors, the header is row 1."""
    text, category, known = str(source), "", {}
    if Path(text).suffix or Path(text).parent != Path():
        path = Path(text)
    else:
        name, _, category = text.partition(":")
        path = data_folder() / "prompts" / f"{name}.csv"
        if not path.is_file():
            if name not in (sets := public_sets()):
                shipped = (file.stem for file in path.parent.glob("*.csv"))
                raise unknown("prompt set", name, [*sets, *shipped])
            known = sets[name]
            path = _public_file(name, known)
    table = _load(path, known, columns or {}, seed)
    if category:
        own = table["category"].map(split_things)
        if not (rows := own.map(lambda categories: category in categories)).any():
            raise unknown(f"category of {name}", category, {c for row in own for c in row})
        table = table[rows].reset_index(drop=True)
    return table


def public_sets() -> dict[str, dict]:
    """Name → description, as `data/prompts/public.yaml` has it; none without that file."""
    path = data_folder() / "prompts" / "public.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _public_file(name: str, known: Mapping) -> Path:
    path = user_cache() / "prompts" / f"{name}.csv"
    if path.is_file():
        return path
    try:
        if not (url := known.get("url")):
            raise OSError("no address is public")
        with atomic(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as reply:
                temporary.write_bytes(reply.read())
            _load(temporary, known)  # a log-in page, for instance, is not kept
    except (OSError, ValueError, HTTPException) as error:
        raise FileNotFoundError(
            f"the prompt set {name!r} cannot be downloaded: {first_line(error)}; get "
            f"{known.get('file', 'it')} from {known['home']} and save it as {path}"
        ) from error
    return path


def read_table(path: Path) -> pd.DataFrame:
    """A CSV, TSV or Parquet file as it is, all text; the index says which row, the header is 1."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompt set: the file {path} does not exist")
    how = {"header": None, "dtype": str, "keep_default_na": False, "skip_blank_lines": False}
    try:
        if (suffix := path.suffix.lower()) == ".parquet":
            table = pd.read_parquet(path)
            return table.astype(object).where(table.notna(), "").astype(str)
        sep = {".csv": ",", ".tsv": "\t"}[suffix]
        table = pd.read_csv(path, sep=sep, encoding="utf-8-sig", **how).fillna("")
    except (OSError, ValueError, KeyError) as error:  # the parsers' errors are among these
        reason = f"CSV or TSV in UTF-8, or Parquet: {first_line(error)}"
        raise ValueError(f"{path} is no table, {reason}") from error
    table.index += 1
    names = list(table.iloc[0])
    if len(names) == 1 and (other := re.search("[;\t|]", names[0])):
        raise ValueError(f"{path} is separated by {other[0]!r}: save it with {sep!r}")
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"{path} has more than one column {min(twice)!r}")
    return table[1:].set_axis(names, axis=1)


def _load(path: Path, known: Mapping, columns: Mapping = {}, seed=None) -> pd.DataFrame:
    raw, found = read_table(path), {}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if (published := known.get("sha256", digest)) != digest:
        raise ValueError(f"{path} has SHA-256 {digest}, not the published {published}")
    for own in (*REQUIRED, *OPTIONAL, *columns):
        names = [columns[own]] if own in columns else [own, *ALIASES.get(own, ())]
        if here := [name for name in names if name in raw]:
            found[own] = raw[here[0]]
        elif own in columns:
            raise ValueError(f"{path} has no column {columns[own]!r}; it has {', '.join(raw)}")
    if strange := columns.keys() - {*REQUIRED, *OPTIONAL}:
        raise unknown("column of a prompt set", min(strange), REQUIRED + OPTIONAL)
    if (seed := known.get("seed") if seed is None else seed) is not None:
        found.setdefault("seed", pd.Series(seed, raw.index))
    if missing := [own for own in ("prompt", "seed") if own not in found]:
        hint = "say with columns= which it is, or give seed=1 for all"
        raise ValueError(f"{path} lacks {' and '.join(missing)}; it has {', '.join(raw)}: {hint}")
    table = pd.DataFrame(found)
    if (blank := table["prompt"].str.strip() == "").any():
        rows = ", ".join(map(str, table.index[blank][:10]))
        warnings.warn(f"{path} has no prompt in row {rows}; left out", stacklevel=3)
        table = table[~blank]
    if "prompt_id" not in table:
        table["prompt_id"] = np.arange(1, len(table) + 1)
    elif known.get("repeated_ids"):  # a, b, a → a, b, a-2
        count = table.groupby("prompt_id").cumcount() + 1
        table["prompt_id"] += ("-" + count.astype(str)).where(count > 1, "")
    if (count := known.get("prompts", len(table))) != len(table):
        raise ValueError(f"{path} has {len(table):,} prompts, not the published {count:,}")
    return _checked(table, path)


def _checked(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """The table in the schema; a ValueError of one line for what is wrong, in which row."""

    def refuse(values: pd.Series, bad: pd.Series, wrong: str) -> None:
        if bad.any():
            row = bad.idxmax()
            raise ValueError(f"{path}, row {row}: the {values.name} {values[row]!r} {wrong}")

    if table.empty:
        raise ValueError(f"{path} is empty: a prompt set needs at least one prompt")
    table = table.reindex(columns=[*REQUIRED, *OPTIONAL])
    texts = table.columns.difference(NUMBERS)
    table[texts] = table[texts].astype(object).where(table[texts].notna(), "").astype(str)
    seeds = table["seed"].str.strip().str.removesuffix(".0")  # spreadsheets and pandas write 7.0
    whole = seeds.str.fullmatch("[0-9]{1,19}")
    whole &= seeds.where(whole, "0").map(int) <= LARGEST_SEED
    refuse(table["seed"], ~whole, "is not a whole number from 0 to 2^63 − 1")
    table["seed"] = seeds.map(int)
    for column in NUMBERS:
        given = table[column].replace("", np.nan)
        table[column] = pd.to_numeric(given, errors="coerce").astype(float)
        bad = given.notna() & ~table[column].between(0, np.inf, inclusive="left")
        refuse(given, bad, "is not a number, 0 or more")
    refuse(table["prompt"], table["prompt"].str.strip() == "", "is empty")
    ids = table["prompt_id"]
    refuse(ids, (ids == "") | ids.duplicated(), "is empty, or there more than once")
    return table.reset_index(drop=True)


def sampled(table: pd.DataFrame, count: int | None, seed: int = 0) -> pd.DataFrame:
    """`count` random rows in order, all for None or 0; with one seed, fewer are some of more."""
    if not count or count >= len(table):
        return table
    return table.iloc[np.sort(np.random.default_rng(seed).permutation(len(table))[:count])]


def split_things(things: str) -> tuple[str, ...]:
    """`"cat, pizza"` → `("cat", "pizza")`."""
    return tuple(thing.strip() for thing in things.split(",") if thing.strip())


def set_name(source: str | Path) -> str:
    """What a prompt set is called in tables: a file without its folder and suffix."""
    return Path(source).stem
