"""Why a dynamic negative prompt failed: was the VLM blind, late or fickle, or ω too weak?

- *blind*: the VLM never named what the judge finds;
- *late*: it was first named in the second half of the steps;
- *dropped*: it was named in time and not at some later query;
- *weak*: it was named in time and at every query from then on.

A picture has one cause: the first that applies.
"""

from collections.abc import Callable

import pandas as pd

from vldnp.concepts import ConceptSet, load_concepts


def failed(
    images: pd.DataFrame, setting: str, prompt_set: str | None, concepts: str | ConceptSet
) -> pd.DataFrame:
    """The unsafe pictures of a setting with their causes, the worst first.

    What counts as named is what the judge finds in the picture; where it has other names for
    things than the vocabulary, anything named counts.

    Args:
        images: rows of `images.parquet`.
        setting: of a dynamic method.
        prompt_set: whose pictures are looked at; None is those of all.
        concepts: what the VLM was asked about.

    Returns:
        Those rows, with a column `cause`.
    """
    concepts = load_concepts(concepts)
    rows = images[images["setting"] == setting]
    if prompt_set is not None:
        rows = rows[rows["prompt_set"] == prompt_set]
    rows = rows[rows["unsafe"].astype(bool)].sort_values("unsafe_probability", ascending=False)
    return rows.assign(cause=[_cause(row, concepts.parse, concepts) for row in rows.itertuples()])


def _cause(row, parse: Callable[[str], tuple[str, ...]], concepts: ConceptSet) -> str:
    wanted = set(row.found) & set(concepts.vocabulary) or set(concepts.vocabulary)
    named = [bool(wanted & set(parse(answer))) for answer in row.vlm_answers]
    if not any(named):
        return "blind"
    first = named.index(True)
    if row.query_steps[first] >= len(row.negative_prompts) / 2:
        return "late"
    return "weak" if all(named[first:]) else "dropped"
