"""Studies as data: a grid of methods × prompts × seeds, its cells, and the batches they come in.

A cell of the grid is one image. Its key is a hash of all that decides the image, so a cell is
computed once, whatever study asks for it. In another batch float32 rounds differently, so that
batches follow from the study alone, and never from what happens to be missing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from vldnp._files import is_file_name
from vldnp.methods import Method, identified
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.backbone import Backbone
from vldnp.study.profile import set_name
from vldnp.study.prompts import load_prompts, sampled, split_things
from vldnp.study.sampling import Sampling

SCHEMA = 2
"""Part of every cell's key: raise it when the code comes to make other images of the same cell."""


@dataclass(frozen=True)
class Study(Sampling):
    """What to compute, as data.

    Attributes:
        name: of the run folder.
        methods: the settings to compare.
        prompt_sets: names or CSV paths, for `load_prompts`.
        num_inference_steps, …: how images are drawn (`Sampling`).
        num_images_per_prompt: with seeds s, s + 1, … from the prompt's own seed s.
        max_prompts: only so many prompts of each set, drawn at random, or by set; None is all.
        batch_size: images per batch; a killed run loses at most one batch.
        reference: where FID's real images come from (`reference_images`); None leaves FID and
            KID out.
        reference_sets: the prompt sets whose images are compared with them.
        reference_count: number of real images.
        unsafe_threshold: an image is unsafe from this probability on.
        captions_without: a concept set without whose words CLIP compares prompts with pictures
            (`vldnp.study.captions`); None leaves the prompts as they are.
        part: the name of a study beside the main one in the same run folder: it shares its cells
            and has tables of its own, `images-<part>.parquet` and so on.
        chosen: method → the strength chosen for it on tuning prompts; only recorded here.
        safety_set: the attack that is looked at most closely; only recorded here.

    Raises:
        ValueError: one line; among others, where two methods differ and their descriptions do not:
            the images of one would be taken for those of the other.
    """

    name: str
    methods: tuple[Method, ...]
    prompt_sets: tuple[str | Path, ...]
    num_images_per_prompt: int = 1
    max_prompts: int | Mapping[str, int] | None = None
    batch_size: int = 32
    reference: str | None = None
    reference_sets: tuple[str, ...] = ("benign",)
    reference_count: int = 1000
    unsafe_threshold: float = UNSAFE_THRESHOLD
    captions_without: str | None = None
    part: str = ""
    chosen: Mapping[str, float] = field(default_factory=dict, hash=False)
    safety_set: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "methods", tuple(map(identified, self.methods)))
        object.__setattr__(self, "prompt_sets", tuple(self.prompt_sets))
        if not is_file_name(self.name):
            raise ValueError(f"a study's name must be that of one folder, not {self.name!r}")
        if self.part and not is_file_name(self.part):
            raise ValueError(
                f"study {self.name!r}: part must be fit for a file's name, not {self.part!r}"
            )
        for what in ("methods", "prompt_sets"):
            if not getattr(self, what):
                raise ValueError(f"study {self.name!r} has no {what.replace('_', ' ')}")
        for count in ("num_inference_steps", "num_images_per_prompt", "batch_size"):
            if getattr(self, count) < 1:
                raise ValueError(
                    f"study {self.name!r}: {count} must be 1 or more, not {getattr(self, count)}"
                )
        limits = self.max_prompts
        limits = limits.values() if isinstance(limits, Mapping) else [limits or 0]
        if negative := [limit for limit in limits if limit < 0]:
            raise ValueError(
                f"study {self.name!r}: max_prompts must be 0 or more, not {negative[0]}"
            )
        self._check_descriptions()

    def _check_descriptions(self) -> None:
        described: dict[str, Method] = {}
        for method in self.methods:
            same = described.setdefault(digest(_what_decides(method)), method)
            if replace(same, name=method.name) != method:
                raise ValueError(
                    f"study {self.name!r}: two methods {method.name!r} differ, but not in what "
                    "describe() says of them, so one would get the other's images; give their "
                    "VLMs or rules names and revisions of their own"
                )

    def file(self, name: str) -> str:
        """`table.csv` → `table-<part>.csv` for a study that is a part."""
        stem, suffix = name.split(".")
        return f"{stem}-{self.part}.{suffix}" if self.part else name

    def prompts(self, source: str | Path) -> pd.DataFrame:
        """The prompts of one of its sets that it uses."""
        rows, limit = load_prompts(source), self.max_prompts
        if isinstance(limit, Mapping):
            limit = limit.get(set_name(source))
        return sampled(rows, limit)


@dataclass(frozen=True)
class Cell:
    """One image of the grid."""

    key: str
    method: Method
    setting: str
    prompt_set: str
    prompt_id: str
    prompt: str
    things: tuple[str, ...]
    seed: int
    guidance_scale: float


@dataclass(frozen=True)
class Batch:
    """Cells of one method that are computed together.

    Attributes:
        cells: in the study's order.
        sampling: keyword arguments of `vldnp.sample`.
    """

    cells: tuple[Cell, ...]
    sampling: Mapping = field(hash=False)

    @property
    def method(self) -> Method:
        return self.cells[0].method

    @property
    def key(self) -> str:
        """Which cells are computed together, in which order: twelve hex digits."""
        return digest([cell.key for cell in self.cells])[:12]


def cells(study: Study, model: Backbone) -> list[Cell]:
    """The study's grid, in the order methods → prompt sets → prompts → seeds."""
    tables = {set_name(source): study.prompts(source) for source in study.prompt_sets}
    if len(tables) < len(study.prompt_sets):
        raise ValueError(f"study {study.name!r} has two prompt sets of the same name")
    grid = []
    for method in study.methods:
        setting, how = setting_of(method), made_by(study, model, method)
        for prompt_set, prompts in tables.items():
            for row in prompts.itertuples():
                own = row.guidance_scale
                scale = float(study.guidance_scale if np.isnan(own) else own)
                for seed in range(row.seed, row.seed + study.num_images_per_prompt):
                    grid.append(
                        Cell(
                            key=key_of(how, row.prompt, seed, scale),
                            method=method,
                            setting=setting,
                            prompt_set=prompt_set,
                            prompt_id=row.prompt_id,
                            prompt=row.prompt,
                            things=split_things(row.things),
                            seed=seed,
                            guidance_scale=scale,
                        )
                    )
    return grid


def made_by(study: Study, model: Backbone, method: Method) -> dict:
    """All that decides a method's images in a study, but the prompt, the seed and the scale."""
    return {
        "schema": SCHEMA,
        "model": model.name,
        "revision": model.revision,
        "dtype": str(model.dtype),
        **shared_sampling(study),
        "method": _what_decides(method),
    }


def key_of(how: Mapping, prompt: str, seed: int, guidance_scale: float) -> str:
    """The key of an image, 24 hex digits; `how` is what `made_by` says."""
    what = {"prompt": prompt, "seed": seed, "guidance_scale": guidance_scale}
    return digest({**how, **what})[:24]


def plan_batches(grid: Sequence[Cell], study: Study) -> list[Batch]:
    """Each cell of the grid once, in batches of one method and of `study.batch_size` cells.

    They depend on the study alone, and so does what rounding makes of an image.
    """
    unique: dict[str, Cell] = {}
    for cell in grid:
        unique.setdefault(cell.key, cell)  # prompt sets may share prompts
    by_setting: dict[str, list[Cell]] = {}
    for cell in unique.values():
        by_setting.setdefault(cell.setting, []).append(cell)
    return [
        Batch(tuple(one_setting[start : start + study.batch_size]), shared_sampling(study))
        for one_setting in by_setting.values()
        for start in range(0, len(one_setting), study.batch_size)
    ]


def shared_sampling(study: Study) -> dict:
    """The keyword arguments of `vldnp.sample` that all its images have in common."""
    return {name: value for name, value in study.sampling.items() if name != "guidance_scale"}


def setting_of(method: Method) -> str:
    """What stands for a method's setting in tables: twelve hex digits."""
    return digest(method.describe())[:12]


def _what_decides(method: Method) -> dict:
    """Its description; the name is for tables, and under another one it makes the same images."""
    return {key: value for key, value in method.describe().items() if key != "name"}


def as_json(value, indent: int | None = None) -> str:
    """The same text for the same value."""
    return json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=True)


def digest(value) -> str:
    """SHA-256 of what can be written as JSON, as hex digits."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()
