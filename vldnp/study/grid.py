"""Studies as data: methods × prompts × seeds, the grid's cells, and the batches they come in.

A cell is one image. Its key is a hash of all that decides the image, so it is computed once. In
another batch float32 rounds differently, so batches follow from the study alone.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from vldnp._files import is_file_name, unknown
from vldnp.methods import Method
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.backbone import Backbone
from vldnp.study.prompts import load_prompts, sampled, set_name, split_things
from vldnp.study.public import public_sets

SCHEMA = 2
"""Part of every cell's key: raise it when the code comes to make other images of the same cell."""

SAMPLING = {
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "scheduler": None,
    "height": None,
    "width": None,
    "noise_device": "cpu",
}
"""The arguments of `vldnp.sample` that a study fixes, with their defaults."""


@dataclass(frozen=True)
class Study:
    """What to compute, as data.

    Attributes:
        name: of the run folder.
        methods: the settings to compare.
        prompt_sets: names or paths, for `load_prompts`.
        sampling: arguments of `vldnp.sample`, as in `SAMPLING`; a prompt's own guidance scale goes
            first.
        num_images_per_prompt: with seeds s, s + 1, … from the prompt's own seed s.
        max_prompts: only so many prompts of each set, drawn at random, or by set; None is all.
        batch_size: images per batch; a killed run loses at most one batch.
        reference: where FID's real images come from (`reference_images`); None leaves it out.
        reference_sets: the prompt sets whose images are compared with them.
        reference_count: number of real images.
        unsafe_threshold: an image is unsafe from this probability on, in (0, 1].
        captions_without: a concept set without whose words CLIP compares prompts with images.

    Raises:
        ValueError: one line; among others, where two methods differ and their descriptions do not:
            the images of one would be taken for those of the other.
    """

    name: str
    methods: tuple[Method, ...]
    prompt_sets: tuple[str | Path, ...]
    sampling: Mapping = field(default_factory=dict, hash=False)
    num_images_per_prompt: int = 1
    max_prompts: int | Mapping[str, int] | None = field(default=None, hash=False)
    batch_size: int = 32
    reference: str | None = None
    reference_sets: tuple[str, ...] = ("benign",)
    reference_count: int = 1000
    unsafe_threshold: float = UNSAFE_THRESHOLD
    captions_without: str | None = None

    def __post_init__(self):
        for name in ("methods", "prompt_sets", "reference_sets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if strange := set(self.sampling) - set(SAMPLING):
            raise unknown(f"sampling setting of study {self.name!r}", min(strange), SAMPLING)
        object.__setattr__(self, "sampling", SAMPLING | dict(self.sampling))
        if not is_file_name(self.name):
            raise ValueError(f"a study's name must be that of one folder, not {self.name!r}")
        for what in ("methods", "prompt_sets"):
            if not getattr(self, what):
                raise ValueError(f"study {self.name!r} has no {what.replace('_', ' ')}")
        limits = self.max_prompts
        limits = limits.values() if isinstance(limits, Mapping) else [limits or 0]
        self._check("max_prompts", 0, limits)
        self._check("num_inference_steps", 1, [self.sampling["num_inference_steps"]])
        for name in ("num_images_per_prompt", "batch_size"):
            self._check(name, 1, [getattr(self, name)])
        if not 0 <= self.unsafe_threshold <= 1:
            raise ValueError(f"unsafe_threshold must be in 0..1, not {self.unsafe_threshold}")
        _check_descriptions(self.name, self.methods)

    def _check(self, name: str, least: int, values: Iterable[int]) -> None:
        if wrong := [value for value in values if type(value) is not int or value < least]:
            raise ValueError(
                f"study {self.name!r}: {name} must be {least} or more, not {wrong[0]!r}"
            )

    def _limit(self, source: str | Path) -> int | None:
        limit = self.max_prompts
        return limit.get(set_name(source)) if isinstance(limit, Mapping) else limit

    def prompts(self, source: str | Path) -> pd.DataFrame:
        """The prompts of one of its sets that it uses."""
        return sampled(load_prompts(source), self._limit(source))

    def count(self, source: str | Path) -> int:
        """How many these are; of a public set that was not fetched yet, as published."""
        try:
            return len(self.prompts(source))
        except FileNotFoundError:
            known = public_sets().get(str(source), {}).get("prompts")
            if known is None:
                raise
            return min(self._limit(source) or known, known)


def _check_descriptions(name: str, methods: Sequence[Method]) -> None:
    """Studies take images of the same description for the same, so it must tell methods apart."""
    described: dict[str, Method] = {}
    for method in methods:
        said = method.describe()
        vlm = said["negatives"].get("vlm")
        if vlm is not None and not (vlm.get("name") and vlm.get("revision")):
            raise ValueError(
                f"VLM {vlm.get('name')!r} needs a name and a revision in a study, which takes "
                "images of the same VLM for the same: set vlm.name and vlm.revision"
            )
        if "<" in str(said["rule"]):  # <lambda>, or <locals> of a function
            raise ValueError(
                f"guidance rule {said['rule']!r} needs a name of its own in a study: make it a "
                "function of a module, or give it one with vldnp.guidance.Rule"
            )
        same = described.setdefault(digest(_deciding(method)), method)
        if replace(same, name=method.name) != method:
            raise ValueError(
                f"study {name!r}: two methods {method.name!r} differ, but not in what describe() "
                "says of them, so one would get the other's images; give their VLMs or rules "
                "names and revisions of their own"
            )


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
    """Cells of one method that are computed together; `sampling` are arguments of `sample`."""

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
    for name, prompts in tables.items():
        if study.sampling["height"] is None and prompts[["height", "width"]].notna().any(axis=None):
            warnings.warn(
                f"the prompts of {name} bring image sizes, which a study takes from its sampling: "
                "set height and width there",
                stacklevel=3,
            )
    grid = []
    for method in study.methods:
        setting, how = setting_of(method), made_by(model, study.sampling, method)
        for prompt_set, prompts in tables.items():
            for row in prompts.itertuples():
                own = row.guidance_scale
                scale = float(study.sampling["guidance_scale"] if own != own else own)
                about = prompt_set, row.prompt_id, row.prompt, split_things(row.things)
                for seed in range(row.seed, row.seed + study.num_images_per_prompt):
                    key = key_of(how, row.prompt, seed, scale)
                    grid.append(Cell(key, method, setting, *about, seed, scale))
    return grid


def shared_sampling(sampling: Mapping) -> dict:
    """The arguments of `vldnp.sample` that all images of a study have in common."""
    optional = ("height", "width", "noise_device")
    both = SAMPLING | {name: sampling[name] for name in SAMPLING if name in sampling}
    return {
        name: value
        for name, value in both.items()
        if name != "guidance_scale" and (name not in optional or value != SAMPLING[name])
    }


def made_by(model: Backbone, sampling: Mapping, method: Method) -> dict:
    """All that decides a method's images, but the prompt, the seed and the guidance scale."""
    about = {"model": model.name, "revision": model.revision, "dtype": str(model.dtype)}
    shared = shared_sampling(sampling)
    return {"schema": SCHEMA, **about, **shared, "method": _deciding(method)}


def key_of(how: Mapping, prompt: str, seed: int, guidance_scale: float) -> str:
    """The key of an image, 24 hex digits; `how` is what `made_by` says."""
    what = {"prompt": prompt, "seed": seed, "guidance_scale": guidance_scale}
    return digest({**how, **what})[:24]


def plan_batches(grid: Sequence[Cell], study: Study) -> list[Batch]:
    """Each cell of the grid once, in batches of one method and of `study.batch_size` cells."""
    by_setting: dict[str, dict[str, Cell]] = {}
    for cell in grid:  # prompt sets may share prompts
        by_setting.setdefault(cell.setting, {}).setdefault(cell.key, cell)
    shared, size = shared_sampling(study.sampling), study.batch_size
    return [
        Batch(tuple(some[start : start + size]), shared)
        for some in map(list, (cells.values() for cells in by_setting.values()))
        for start in range(0, len(some), size)
    ]


def setting_of(method: Method) -> str:
    """What stands for a method's setting in tables: twelve hex digits."""
    return digest(method.describe())[:12]


def _deciding(method: Method) -> dict:
    """Its description; the name is for tables, and under another one it makes the same images."""
    return {key: value for key, value in method.describe().items() if key != "name"}


def as_json(value, indent: int | None = None) -> str:
    """The same text for the same value."""
    return json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=True)


def digest(value) -> str:
    """SHA-256 of what can be written as JSON, as hex digits."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()
