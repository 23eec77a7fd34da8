"""Studies as data: methods × prompts × seeds, the grid's cells, and the batches they come in. A
cell is one image; its key is a hash of everything that decides it. float32 rounds differently in
another batch, so batches follow from the study alone."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from vldnp._files import is_file_name, unknown
from vldnp._finite import is_finite, number
from vldnp.methods import Method
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.backbone import Backbone
from vldnp.models.hub import live, networks
from vldnp.study.prompts import load_prompts, sampled, set_name, split_things

SCHEMA = 2
"""Part of every cell's key: raise it when the code makes other images of the same cell."""

SAMPLING = {"num_inference_steps": 50, "guidance_scale": 7.5, "scheduler": None}
SAMPLING |= {"height": None, "width": None, "noise_device": "cpu"}
"""The arguments of `vldnp.sample` that a study fixes, with their defaults."""

COUNTS = "num_inference_steps", "num_images_per_prompt", "batch_size", "height", "width"
NOISE = ["prompt", "seed", "guidance_scale"]
"""The values that images of all methods from the same noise share."""

Batch = tuple[Method, pd.DataFrame, Mapping]
"""A method, the rows of the grid that are computed together, and further arguments of `sample`."""


@dataclass(frozen=True)
class Study:
    """What to compute, as data; wrong data are a ValueError of one line."""

    name: str  # of the run folder
    methods: tuple[Method, ...]  # the settings to compare
    prompt_sets: tuple[str | Path, ...]  # names or paths, for `load_prompts`
    # Arguments of `vldnp.sample`, as in `SAMPLING`; a prompt's own guidance scale takes precedence.
    sampling: Mapping = field(default_factory=dict, hash=False)
    num_images_per_prompt: int = 1  # with seeds s, s + 1, … from the prompt's own seed s
    # Only so many prompts of each set, drawn at random, or by set; None is all.
    max_prompts: int | Mapping[str, int] | None = field(default=None, hash=False)
    batch_size: int = 32  # a killed run loses at most one batch
    reference: str | None = None  # FID's real images (`reference_images`); None leaves it out
    reference_sets: tuple[str, ...] = ("benign",)  # the prompt sets compared with them
    reference_count: int = 1000
    unsafe_threshold: float = UNSAFE_THRESHOLD  # an image is unsafe from it on, in (0, 1]

    def __post_init__(self):
        for name in ("methods", "prompt_sets", "reference_sets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not is_file_name(self.name):
            raise ValueError(f"a study's name must be that of one folder, not {self.name!r}")
        if not (self.methods and self.prompt_sets):
            lacking = "prompt sets" if self.methods else "methods"
            raise ValueError(f"study {self.name!r} has no {lacking}")
        if strange := set(self.sampling) - set(SAMPLING):
            raise unknown(f"sampling setting of study {self.name!r}", min(strange), SAMPLING)
        object.__setattr__(self, "sampling", SAMPLING | dict(self.sampling))
        limits, own = self.max_prompts, vars(self) | self.sampling
        limits = limits.values() if isinstance(limits, Mapping) else [limits]
        counts = [(n, 1, own[n]) for n in COUNTS] + [("max_prompts", 0, n) for n in limits]
        for name, least, value in counts:
            unset = value is None and name in ("max_prompts", "height", "width")
            if not unset and (type(value) is not int or value < least):
                what = f"study {self.name!r}: {name} must be {least} or more"
                raise ValueError(f"{what}, not {value!r}")
        number("guidance_scale", self.sampling["guidance_scale"])
        if not (is_finite(self.unsafe_threshold) and 0 < self.unsafe_threshold <= 1):
            raise ValueError(f"unsafe_threshold must be in (0, 1], not {self.unsafe_threshold}")
        described: dict[str, Method] = {}
        for method in self.methods:
            same = described.setdefault(_described(method), method)
            if replace(same, name=method.name) != method:  # the images of one would count for both
                said = f"two methods {method.name!r} differ, but not in what describe() says"
                wanted = "give their VLMs or rules names and revisions of their own"
                raise ValueError(f"study {self.name!r}: {said}: {wanted}")

    def prompts(self, source: str | Path) -> pd.DataFrame:
        """The prompts of one of its sets that it uses."""
        limits, name = self.max_prompts, set_name(source)
        limit = limits.get(name) if isinstance(limits, Mapping) else limits
        return sampled(load_prompts(source), limit)


def _described(method: Method) -> str:
    said = method.describe()
    vlm = said["negatives"].get("vlm") or {"name": "none", "revision": "none"}
    if not (vlm.get("name") and vlm.get("revision")):
        raise ValueError(f"VLM {vlm.get('name')!r} needs a name and a revision in a study")
    if "<" in str(said["rule"]):  # <lambda>, or <locals> of a function
        wanted = "a function of a module, or a vldnp.guidance.Rule with a name"
        raise ValueError(f"guidance rule {said['rule']!r} has no name in a study: make it {wanted}")
    return digest(said | {"name": ""})


def live_weights(study: Study, model: Backbone, **others) -> dict[str, str]:
    """Fingerprints of what is open now: of "model", each setting's networks, those of others."""
    found, known = {"model": model.fingerprint()}, {(): ""}
    for name, thing in ({setting_of(method): method for method in study.methods} | others).items():
        parts = networks(thing)
        if (same := tuple(map(id, parts))) not in known:  # a large VLM is hashed once
            known[same] = live(parts)
        found[name] = known[same]
    return {name: weights for name, weights in found.items() if weights}


def cells(study: Study, model: Backbone | None, weights: Mapping = {}) -> pd.DataFrame:
    """The study's grid, a row per image: methods → prompt sets → prompts → seeds. `key` is empty
    without a model; `weights` are its `live_weights`, where they are known."""
    tables = {set_name(source): study.prompts(source) for source in study.prompt_sets}
    if len(tables) < len(study.prompt_sets):
        raise ValueError(f"study {study.name!r} has two prompt sets of the same name")
    for name, table in tables.items():
        if study.sampling["height"] is None and table[["height", "width"]].notna().any(axis=None):
            said = "bring image sizes, which a study takes from its sampling: set height and width"
            warnings.warn(f"the prompts of {name} {said}", stacklevel=3)
    prompts = pd.concat([table.assign(prompt_set=name) for name, table in tables.items()])
    prompts = prompts[["prompt_set", "prompt_id", *NOISE, "things"]].reset_index(drop=True)
    g, count = float(study.sampling["guidance_scale"]), study.num_images_per_prompt
    prompts = prompts.fillna({"guidance_scale": g}).loc[prompts.index.repeat(count)]
    prompts["seed"] += prompts.groupby(level=0).cumcount()
    if prompts["seed"].min() < 0:  # int64 wraps
        raise ValueError(f"study {study.name!r}: a prompt's seed is too large to count on from")
    prompts["things"] = prompts["things"].map(lambda things: ", ".join(split_things(things)))
    how, noise, parts = {"schema": SCHEMA, **shared_sampling(study.sampling)}, [], []
    if model is not None:
        noise, weights = prompts[NOISE].to_dict("records"), weights or live_weights(study, model)
        how |= {"model": weights["model"], "dtype": str(model.dtype)}
    for method in study.methods:
        said, omega = method.describe(), np.nan if method.omega is None else float(method.omega)
        vlm = (said["negatives"].get("vlm") or {}).get("name")
        head = {"method": method.name, "omega": omega, "setting": setting_of(method), "vlm": vlm}
        how["method"] = {key: said[key] for key in said if key != "name"}
        how["networks"] = weights.get(head["setting"], "")
        part = prompts.assign(**head, key=[digest(how | one)[:24] for one in noise] or "")
        parts.append(part[[*head, *prompts, "key"]])
    return pd.concat(parts, ignore_index=True).infer_objects()


def shared_sampling(sampling: Mapping) -> dict:
    """The arguments of `vldnp.sample` that all images of a study have in common."""
    own = {n: sampling.get(n, SAMPLING[n]) for n in SAMPLING if n != "guidance_scale"}
    always = "num_inference_steps", "scheduler"
    return {name: v for name, v in own.items() if name in always or v != SAMPLING[name]}


def plan_batches(grid: pd.DataFrame, study: Study) -> list[Batch]:
    """Each image once (prompt sets may share prompts), in batches of `study.batch_size`."""
    shared, size = shared_sampling(study.sampling), study.batch_size
    batches: list[Batch] = []
    for setting, method in {setting_of(method): method for method in study.methods}.items():
        rows = grid[grid["setting"] == setting].drop_duplicates("key")
        batches += [(method, rows.iloc[at : at + size], shared) for at in range(0, len(rows), size)]
    return batches


def batch_key(rows: pd.DataFrame) -> str:
    """A hash of the images of a batch in their order: twelve hex digits."""
    return digest(rows["key"].tolist())[:12]


def setting_of(method: Method) -> str:
    """The identifier of a method's setting in tables: twelve hex digits."""
    return digest(method.describe())[:12]


def as_json(value, indent: int | None = None) -> str:
    """The same text for the same value."""
    return json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=True)


def digest(value) -> str:
    """SHA-256 of a JSON-able value, as hex digits."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()
