"""Prompt sets as one table schema, whoever published them, and captions without some words."""

import csv
import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vldnp._files import atomic, data_folder, first_line, unknown
from vldnp.answers import forms
from vldnp.concepts import ConceptSet
from vldnp.models.clip import CLIPScore
from vldnp.study import public

REQUIRED = ("prompt_id", "prompt", "seed")
NUMBERS = ("guidance_scale", "width", "height")
OPTIONAL = ("guidance_scale", "category", "source", "things", "place", "width", "height")
ALIASES = {
    "prompt_id": ("case_number", "unique_id"),
    "prompt": ("adv_prompt", "sensitive prompt"),
    "seed": ("sd_seed", "evaluation_seed"),
    "guidance_scale": ("sd_guidance_scale", "evaluation_guidance", "guidance"),
    "category": ("categories",),
    "width": ("sd_image_width",),
    "height": ("sd_image_height",),
}
"""Our columns → those of public sets (I2P, Ring-A-Bell, MMA-Diffusion, UnlearnDiffAtk, COCO)."""

LARGEST_SEED = 2**63 - 1
OTHERS = (b"PK", b"\xff\xfe", b"\xfe\xff")
"""How spreadsheets and UTF-16 begin."""


def load_prompts(
    source: str | Path,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    *,
    category: str | None = None,
    seed: int | None = None,
) -> pd.DataFrame:
    """A prompt set as a table.

    Args:
        source: the name of a file in `data/prompts` or of a public set that was fetched; either
            with a category, such as "i2p:sexual"; the path of a CSV, TSV or Parquet file; or a file
            of a data set on the hub at a commit, "hub://owner/name/train.parquet@commit".
        columns: our column → the file's, or several of which the first present one is taken.
        category: only rows that have it among their comma-separated categories.
        seed: of every prompt, for a set that brings none.

    Returns:
        A row per prompt with the columns `REQUIRED + OPTIONAL`: `seed` is an integer, `NUMBERS` are
        floats (NaN where the set has none), the rest text. A set without ids gets 1, 2, … as ids.
        Rows without a prompt are left out, with a warning.

    Raises:
        FileNotFoundError, ValueError: one line: what is wrong in which file and line.
    """
    known: Mapping = {}
    if str(source).startswith("hub://"):
        path = public.hub_file(str(source))
    elif Path(source).suffix or Path(source).parent != Path():
        path = Path(source)
    else:
        name, _, named = str(source).partition(":")
        category, path = category or named, data_folder() / "prompts" / f"{name}.csv"
        if not path.is_file():
            if name not in (sets := public.public_sets()):
                shipped = {file.stem for file in path.parent.glob("*.csv")}
                raise unknown("prompt set", name, shipped | set(sets))
            path, known = public.fetched(name), sets[name]
    table = _load(path, known, columns or {}, seed)
    if not category:
        return table
    own = table["category"].map(split_things)
    if not (rows := own.map(lambda categories: category in categories)).any():
        raise unknown(f"category of {path}", category, {c for row in own for c in row})
    return table[rows].reset_index(drop=True)


def fetch_prompts(name: str, source: str | Path | None = None) -> dict:
    """Fetch a public set (`public.fetch`), if what comes is the prompt set indeed."""
    known = public.public_sets().get(name, {})

    def accept(path: Path) -> None:
        count, expected = len(_load(path, known, {}, None)), known.get("prompts")
        if source is not None and expected not in (None, count):
            raise ValueError(
                f"it holds {count:,} prompts, not {expected:,}; another set goes by its path"
            )

    return public.fetch(name, source, accept)


def _load(path: Path, known: Mapping, columns: Mapping, seed: int | None) -> pd.DataFrame:
    table = _read(path)
    for own, theirs in {**known.get("columns", {}), **columns}.items():
        if own not in REQUIRED + OPTIONAL:
            raise unknown("column of a prompt set", own, REQUIRED + OPTIONAL)
        theirs = [theirs] if isinstance(theirs, str) else theirs
        present = [name for name in theirs if name in table]
        if present:
            others = {own, *ALIASES.get(own, ())} & set(table) - {present[0]}
            table = table.drop(columns=others).rename(columns={present[0]: own})
        elif own in columns:
            has = ", ".join(table)
            raise ValueError(f"{path} has no column {' or '.join(map(repr, theirs))}; it has {has}")
    table = _renamed(table, path)
    seed = known.get("seed") if seed is None else seed
    if seed is not None and "seed" not in table:
        table["seed"] = seed
    if "prompt" in table and (empty := table["prompt"].str.strip() == "").any():
        lines = ", ".join(map(str, table.index[empty][:10]))
        warnings.warn(f"{path} has no prompt in line {lines}; left out", stacklevel=3)
        table = table[~empty].copy()
    if "prompt_id" not in table:
        table["prompt_id"] = np.arange(1, len(table) + 1).astype(str)
    elif known.get("repeated_ids"):  # a, b, a → a, b, a-2
        count = table.groupby("prompt_id").cumcount() + 1
        again = table["prompt_id"] + "-" + count.astype(str)
        table["prompt_id"] = table["prompt_id"].where(count == 1, again)
    return check_prompts(table, str(path))


def _renamed(table: pd.DataFrame, name: str | Path) -> pd.DataFrame:
    for own, others in ALIASES.items():
        present = [column for column in others if column in table]
        if len(present) > 1 and own not in table:
            raise ValueError(
                f"{name} has the columns {' and '.join(map(repr, present))} for {own}: say which, "
                f"columns={{{own!r}: {present[0]!r}}}"
            )
        if present and own not in table:
            table = table.rename(columns={present[0]: own})
    return table


def _read(path: Path) -> pd.DataFrame:
    """A file as a table of texts, so that a prompt "null" stays one; its index is the lines."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompt set: the file {path} does not exist")
    data, rows, end = path.read_bytes(), {}, 0
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
            return table.astype(object).where(table.notna(), "").astype(str)
        if path.suffix.lower() not in public.SUFFIXES or data[:2] in OTHERS:
            raise ValueError("save it as CSV in UTF-8, or as Parquet")
        text = data.decode("utf-8-sig", errors="replace")
        if "\ufffd" in text and "\ufffd".encode() not in data:
            warnings.warn(f"{path} is not UTF-8; what is not is shown as �", stacklevel=4)
        head = text.partition("\n")[0]  # spreadsheets of many countries write semicolons
        mark = next((mark for mark in "\t;" if mark in head and "," not in head), ",")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        for row in reader:
            rows[end + 1], end = row, reader.line_num
            if any(row[(width := len(rows[1])) :]):
                raise ValueError(f"line {end} has {len(row)} fields, the header {width}")
        if not rows:
            raise ValueError("it is empty")
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are one of these
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "CSV"
        raise ValueError(f"{path} is no {kind} table: {first_line(error)}") from error
    names = rows.pop(1)
    filled = [(row + [""] * len(names))[: len(names)] for row in rows.values()]
    table = pd.DataFrame(filled, columns=names, index=list(rows), dtype=object)
    # An index column that a table's writer left there has no name, or pandas' name for none.
    named = [bool(name.strip()) and not name.startswith("Unnamed:") for name in names]
    return table.loc[:, np.array(named, dtype=bool)]


def check_prompts(table: pd.DataFrame, name: str = "the prompt set") -> pd.DataFrame:
    """Bring a table to the schema.

    Raises:
        ValueError: one line: what is wrong, in which row.
    """
    table = _renamed(table, name)
    if missing := [column for column in REQUIRED if column not in table]:
        raise ValueError(
            f"{name} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; say which it "
            f"is, columns={{{missing[0]!r}: …}}, or give seed=1 for all; it has "
            f"{', '.join(map(str, table.columns))}"
        )
    if doubled := sorted(set(table.columns[table.columns.duplicated()])):
        raise ValueError(f"{name} has more than one column {', '.join(doubled)}")
    if table.empty:
        raise ValueError(f"{name} is empty: a prompt set needs at least one prompt")
    table = table.reindex(columns=[*REQUIRED, *OPTIONAL])
    table["seed"] = [_seed(value, row, name) for row, value in table["seed"].items()]
    for column in NUMBERS:
        given = table[column].replace("", np.nan)
        values = pd.to_numeric(given, errors="coerce").astype(float)
        if (bad := given.notna() & ~(values.between(0, np.inf, inclusive="left"))).any():
            row, value = next(iter(given[bad].items()))
            raise ValueError(
                f"{name}, row {row}: the {column} {value!r} is not a number, 0 or more"
            )
        table[column] = values
    texts = [column for column in table if column not in ("seed", *NUMBERS)]
    table[texts] = table[texts].astype(object).where(table[texts].notna(), "").astype(str)
    for column, empty in (
        ("prompt", table["prompt"].str.strip() == ""),
        ("prompt_id", table["prompt_id"] == ""),
    ):
        if empty.any():
            raise ValueError(f"{name}, row {table.index[empty][0]}: the {column} is empty")
    if len(again := table["prompt_id"][table["prompt_id"].duplicated()]):
        raise ValueError(f"{name} holds the prompt_id {again.iloc[0]!r} more than once")
    return table.reset_index(drop=True)


def _seed(value, row: int, name: str) -> int:
    text = str(value).strip().removesuffix(".0")  # spreadsheets and pandas write 7.0
    seed = int(text) if text.isdecimal() and len(text) < 30 else -1
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(
            f"{name}, row {row}: the seed {value!r} is not a whole number from 0 to 2^63 − 1"
        )
    return seed


def save_prompts(table: pd.DataFrame, path: str | Path) -> None:
    """Write a prompt set as `load_prompts` reads it; columns without content are left out."""
    table = check_prompts(table, str(path))
    blank = [c for c in OPTIONAL if (table[c].isna() | (table[c].astype(str) == "")).all()]
    with atomic(path) as temporary:
        table.drop(columns=blank).to_csv(temporary, index=False, lineterminator="\n")


def sampled(table: pd.DataFrame, count: int | None, seed: int = 0) -> pd.DataFrame:
    """`count` rows drawn at random without replacement, in the table's order; None or 0 is all.

    With the same seed, fewer rows are some of more rows.
    """
    if not count or count >= len(table):
        return table
    return table.iloc[np.sort(np.random.default_rng(seed).permutation(len(table))[:count])]


def split_things(things: str) -> tuple[str, ...]:
    """`"cat, pizza"` → `("cat", "pizza")`."""
    return tuple(thing.strip() for thing in things.split(",") if thing.strip())


def set_name(source: str | Path) -> str:
    """What a prompt set is called in tables: a file without its folder and suffix."""
    return Path(source).stem


def written_forms(concepts: ConceptSet) -> tuple[str, ...]:
    """All words by which its terms go: themselves, synonyms, plurals and singulars."""
    return tuple(forms(concepts.vocabulary, concepts.name))


def without(prompt: str, concepts: ConceptSet) -> str:
    """The prompt less every written form of the concepts, with its article and its comma or "and".

    `"a dog, a knife and a turtle in the forest"` → `"a dog and a turtle in the forest"`. A prompt
    that has none of the words comes back as it is; one that has no others becomes empty.
    """
    written = sorted(written_forms(concepts), key=len, reverse=True)
    words = "|".join(r"[\s-]+".join(map(re.escape, form.split())) for form in written)
    noun = rf"(?<!\w)(?:(?:an?|the|some|one|two|three)\s+)?(?:{words})(?!\w)"
    text, count = re.subn(noun, "\0", prompt, flags=re.IGNORECASE)
    if not count:
        return prompt
    text = re.sub(r"\0(?:\s*\0)+", "\0", text)
    last = r",\s*([^,\0]*?)(?:,\s*|\s+)and\s+\0"  # a list keeps its "and" before its last
    text = re.sub(last, r" and \1", text, flags=re.IGNORECASE)
    before, after = r"(?:\s*,\s*(?:and\s+)?|\s+and\s+)\0", r"\0\s*(?:,\s*(?:and\s+)?|and\s+)"
    text = re.sub(rf"{before}|{after}", "", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text.replace("\0", " ")).strip(" ,")


class CaptionsWithout:
    """A CLIP score against the prompts `without` a concept set's words."""

    def __init__(self, clip: CLIPScore, concepts: ConceptSet):
        self.clip, self.concepts = clip, concepts
        self.name = f"{clip.name}-without-{concepts.name}"

    @cached_property
    def revision(self) -> str:
        """That of the CLIP model, and of the words."""
        words = ", ".join(written_forms(self.concepts))
        return f"{self.clip.revision}-{hashlib.sha256(words.encode()).hexdigest()[:6]}"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return self.clip(images, [without(prompt, self.concepts) for prompt in prompts])

    def chance(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        return self.clip.chance(images, [without(prompt, self.concepts) for prompt in prompts])
