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
from vldnp.models import load
from vldnp.study import run
from vldnp.study.folder import read_cell
from vldnp.study.grid import as_json, setting_of, shared_sampling
from vldnp.study.measure import clip_of, measured
from vldnp.study.profile import load_profile, profile_methods, profile_names
from vldnp.study.published import Published, open_run
from vldnp.study.workers import one_thread


@dataclass(frozen=True)
class Verification:
    """What recomputing a part of a published run showed.

    Of so many `images`: those with the same pixels (`identical`), with the same label, and with the
    same answers of the VLM; the largest difference of a score; ASR here less as published.
    """

    run: str
    date: str
    seed: int
    images: int
    identical: int
    same_label: int
    same_words: int
    score_difference: float
    asr_difference: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.identical} of {self.images} recomputed images identical, {self.same_label} of "
            f"{self.images} with the same label, {self.same_words} with the same words; scores "
            f"differ by {self.score_difference:.2g} at most, ASR by {self.asr_difference:+.4f}"
        )

    def details(self) -> str:
        """The line, and what else differs, a line each."""
        return "\n".join([str(self), *self.notes])


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
        images: so many at least, in batches drawn at random; all where there are fewer.
        seed: of the draw; by default the machine's own, so that others draw other batches.
        root: where run folders lie; the result is written to `root/<name>/verification.json`.
        profile: brings models and methods; by default the one with whose name the run's begins.
        methods, model, judge, clip: further methods, and models instead of the profile's.

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
    batches = {b: own for b, own in published.batches().items() if own["setting"].iloc[0] in made}
    if not batches:
        raise ValueError(f"no method of profile {profile!r} is one of the published run {name!r}")
    seed = zlib.crc32(platform.node().encode()) if seed is None else seed
    order, plan = np.random.default_rng(seed).permutation(sorted(batches)), []
    theirs, config = published.images, next(iter(published.configs.values()))
    sizes = theirs["batch"].value_counts()[order].cumsum()
    drawn = order[: int((sizes < images).sum()) + 1]
    theirs = theirs[theirs["batch"].isin(drawn)]
    for rows in map(batches.get, drawn):
        own = published.configs[rows["part"].iloc[0]]
        sampling = shared_sampling(own | own.get("sampling", {}))  # study 1 had it at the top level
        plan.append((made[rows["setting"].iloc[0]], rows, sampling))
    model, judge = load.load(model), load.load_judge(judge)
    with one_thread(), tempfile.TemporaryDirectory() as name_of_folder:
        folder, clip = Path(name_of_folder), clip_of(config["captions_without"], clip)
        run.generate(model, plan, folder, workers=workers, progress=progress)
        scores = measured(folder, [rows for _, rows, _ in plan], judge, clip, progress=progress)
        ours = [scores[key] | read_cell(folder, key) for key in theirs["key"]]
    found = _compared(published, theirs, pd.DataFrame(ours, index=theirs.index), seed, made)
    write_text(Path(root) / name / "verification.json", as_json(asdict(found), indent=1) + "\n")
    return found


def _compared(published: Published, theirs, ours, seed: int, made: Mapping) -> Verification:
    unsafe = (
        ours["unsafe_probability"] >= published.configs[min(published.configs)]["unsafe_threshold"]
    )
    scores = [name for name in ("unsafe_probability", "clip_score") if name in ours]
    return Verification(
        run=published.folder.name,
        date=time.strftime("%Y-%m-%d"),
        seed=seed,
        images=len(theirs),
        identical=int((ours["pixels"] == theirs["pixels"]).sum()),
        same_label=int((unsafe == theirs["unsafe"]).sum()),
        same_words=int((ours["vlm_answers"] == theirs["vlm_answers"]).sum()),
        score_difference=float((ours[scores] - theirs[scores]).abs().max(axis=None)),
        asr_difference=float(unsafe.mean() - theirs["unsafe"].mean()),
        notes=_notes(published, made),
    )


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
