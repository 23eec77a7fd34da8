"""Where a notebook's numbers come from, in a line for its first screen."""

import json
from pathlib import Path

from vldnp.show.markdown import Statement
from vldnp.study import verify
from vldnp.study.grid import Study


def verification(study: Study, root: str | Path = "runs") -> Statement:
    """Whether a study's rows were computed here, or published and verified here."""
    config = Path(root) / study.name / study.file("config.json")
    name = json.loads(config.read_text(encoding="utf-8")).get("published")
    if not name:
        return Statement("Computed on this machine.")
    found = verify.read(root, name)
    if found is None:
        return Statement(
            f"Published run `{name}`, not verified on this machine: run `make reproduce`."
        )
    return Statement(f"Published run `{name}`, verified here on {found.date}: {found}.")
