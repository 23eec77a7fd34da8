"""Verifying a published run: some of its batches computed here, and compared with its rows."""

import platform
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from vldnp._files import data_folder, fingerprint, write_text
from vldnp.methods import Method
from vldnp.metrics.intervals import Interval, paired_difference
from vldnp.models import load
from vldnp.study import run
from vldnp.study.folder import read_cell
from vldnp.study.grid import Batch, as_json, setting_of, shared_sampling
from vldnp.study.measure import clip_of, measured
from vldnp.study.profile import load_profile, profile_methods, profile_names
from vldnp.study.published import Published, open_run
from vldnp.study.workers import one_thread


@dataclass(frozen=True)
class Verification:
    """What recomputing a part of a published run showed.

    Of so many `images`: those with the same pixels (`identical`), the same label, and the same
    words of the VLM at every query; the largest difference of a judge's probability or a CLIP
    score; ASR here less as published, paired; `notes` are what else differs, a line each.
    """

    run: str
    published: str
    date: str
    seed: int
    images: int
    identical: int
    same_label: int
    same_words: int
    score_difference: float
    asr: Interval
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        d, low, high = (round(end, 4) + 0.0 for end in self.asr)  # + 0.0 turns −0 into 0
        return (
            f"{self.identical} of {self.images} recomputed images identical, {self.same_label} of "
            f"{self.images} with the same label; the paired difference in ASR is {d:.4f} "
            f"[{low:.4f}, {high:.4f}]"
        )

    def details(self) -> str:
        """The line, and what else there is to say, a line each."""
        words = f"{self.same_words} of {self.images} with the same answers of the VLM"
        scores = f"scores differ by {self.score_difference:.2g} at most"
        return "\n".join([str(self), f"{words}; {scores}", *self.notes])


def verify(
    name: str = "moji",
    images: int = 512,
    seed: int | None = None,
    root: str | Path = "runs",
    *,
    profile: str | None = None,
    methods: Iterable[Method] = (),
    model=None,
    judge=None,
    clip=None,
    workers: int | None = None,
    progress: bool = True,
) -> Verification:
    """Compute whole batches of a published run here, with one thread, and compare with its rows.

    Args:
        name: of the published run.
        images: so many at least, in batches drawn at random; all where there are fewer.
        seed: of the draw; by default the machine's own, so that others draw other batches.
        root: where run folders lie; the result is written to `root/<name>/verification.json`.
        profile: brings models and methods; by default the one with whose name the run's begins.
        methods, model, judge, clip: further methods, and models instead of the profile's.
        workers: as in `run`.

    Raises:
        ValueError: one line: there is no such run, its methods are unknown, or a shipped model's
            weights are others than those that made it.
    """
    published = open_run(name)
    _check_weights(published)
    known = [p for p in profile_names() if name == p or name.startswith(f"{p}-")]
    profile = profile or (max(known, key=len) if known and model is None else None)
    made = {setting_of(method): method for method in methods}
    if profile is not None:
        settings = load_profile(profile)
        made |= {setting_of(method): method for method in profile_methods(settings)}
        model, judge, clip = model or settings.model, judge or settings.judge, clip or settings.clip
    drawn, here = [], published.images
    batches = {b: own for b, own in published.batches().items() if own["setting"].iloc[0] in made}
    if not batches:
        raise ValueError(f"no method of profile {profile!r} is one of the published run {name!r}")
    seed = zlib.crc32(platform.node().encode()) if seed is None else seed
    for key in np.random.default_rng(seed).permutation(sorted(batches)):
        if here["batch"].isin(drawn).sum() < images:
            drawn.append(key)
    rows, configs = here[here["batch"].isin(drawn)], published.configs
    plan = [_batch(batches[key], made, configs) for key in drawn]
    model, judge, config = load.load(model), load.load_judge(judge), next(iter(configs.values()))
    clip = clip_of(config["captions_without"], clip)
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        run.generate(model, plan, Path(folder), workers=workers, progress=progress)
        scores = measured(Path(folder), [own for _, own, _ in plan], judge, clip, progress=progress)
        here = [scores[key] | read_cell(Path(folder), key) for key in rows["key"]]
    here = pd.DataFrame(here, index=rows.index)
    here["unsafe"] = here["unsafe_probability"] >= config["unsafe_threshold"]
    same = {name: here[name] == rows[name] for name in ("pixels", "unsafe", "vlm_answers")}
    both = [name for name in ("unsafe_probability", "clip_score") if name in here]
    # Every image is a pair of its own; the prompts stay what is resampled.
    pair = rows[["prompt_set", "prompt_id"]].assign(seed=range(len(rows)))
    found = Verification(
        run=name,
        published=published.digest,
        date=time.strftime("%Y-%m-%d"),
        seed=seed,
        images=len(rows),
        identical=int(same["pixels"].sum()),
        same_label=int(same["unsafe"].sum()),
        same_words=int(same["vlm_answers"].sum()),
        score_difference=float((here[both] - rows[both]).abs().max(axis=None)),
        asr=paired_difference(*(pair.assign(unsafe=of["unsafe"]) for of in (here, rows)), "unsafe"),
        notes=_notes(published, made),
    )
    write_text(Path(root) / name / "verification.json", as_json(asdict(found), indent=1) + "\n")
    return found


def _notes(published: Published, made: Mapping[str, Method]) -> tuple[str, ...]:
    """What else there is to say, a line each."""
    theirs, notes = set(published.images["setting"]), []
    if strange := theirs - set(made):
        notes.append(f"{len(strange)} of {len(theirs)} settings were not drawn from")
    if lost := set(published.images["batch"]) - set(published.batches()):
        notes.append(f"{len(lost)} batches are not published whole, and cannot be recomputed")
    versions = published.meta["versions"].items()
    other = [p for p, there in versions if p != "machine" and version(p) != there]
    return (*notes, *(f"{p} is {version(p)} here, not that of the run" for p in other))


def _check_weights(published: Published) -> None:
    for model_name, revision in published.meta["models"].items():
        folder = data_folder() / "models" / model_name
        if folder.is_dir() and (here := fingerprint(folder)) != revision:
            raise ValueError(
                f"{folder} has the fingerprint {here}, and {model_name!r} of the published run "
                f"{published.folder.name!r} had {revision}: its weights or configs were changed"
            )


def _batch(rows: pd.DataFrame, made: Mapping[str, Method], configs: Mapping) -> Batch:
    config = configs[rows["part"].iloc[0]]
    sampling = shared_sampling(config | config.get("sampling", {}))  # once at the top level
    return made[rows["setting"].iloc[0]], rows, sampling
