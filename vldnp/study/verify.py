"""Verifying a published run: some of its batches computed here, and compared with its rows."""

import hashlib
import platform
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
from vldnp.metrics.fid import Distances
from vldnp.metrics.intervals import Interval, paired_difference
from vldnp.metrics.summary import table
from vldnp.models import load
from vldnp.study import grid, run
from vldnp.study.folder import read_cell
from vldnp.study.grid import Batch, Cell, as_json, digest, setting_of
from vldnp.study.measure import clip_of, measured
from vldnp.study.profile import load_profile, profile_methods, profile_names
from vldnp.study.prompts import split_things
from vldnp.study.published import Published, open_run, read_json
from vldnp.study.workers import one_thread

PACKAGES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Verification:
    """What recomputing a part of a published run showed.

    Attributes:
        run, published: its name, and the digest of its rows.
        date, seed: of the verification, and of the draw of batches.
        images: how many were recomputed.
        identical, same_label, same_words: of them, those with the same pixels; that are unsafe here
            as there, or neither; for which the VLM answered the same at every query.
        score_difference: the largest one of a judge's probability or a CLIP score.
        asr: here less as published, over the recomputed images, paired.
        notes: what else differs, a line each.
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
    """Compute some batches of a published run here, with one thread, and compare with its rows.

    Batches are drawn at random, in turn for each method and prompt set.

    Args:
        name: of the published run.
        images: so many at least; all where there are fewer.
        seed: of the draw; by default the machine's own, so that others draw other batches.
        root: where run folders lie; the result is written to `root/<name>/verification.json`.
        profile: brings models and methods; by default the one with whose name the run's begins.
        methods: further ones, whose settings may be drawn from.
        model, judge, clip: instead of the profile's.
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
    model, judge, folder = load.load(model), load.load_judge(judge), Path(root) / name
    seed = zlib.crc32(platform.node().encode()) if seed is None else seed
    drawn = _drawn(published, set(made), images, seed)
    if not drawn:
        raise ValueError(f"no method of profile {profile!r} is one of the published run {name!r}")
    batches = [_batch(rows, made, part.config, model) for part, _, rows in drawn]
    clip = clip_of(published.parts[0].config["captions_without"], clip)
    with one_thread():
        place = folder / "verification" / _code()
        run.generate(model, batches, place, workers=workers, progress=progress)
        scores = measured(place, batches, judge, clip, progress=progress)
    pairs = zip(drawn, batches, strict=True)
    rows = [_beside(rows, key, batch, place, scores) for (_, key, rows), batch in pairs]
    found = _result(published, pd.concat(rows, ignore_index=True), seed, _notes(published, made))
    write_text(folder / "verification.json", as_json(asdict(found), indent=1) + "\n")
    return found


def _check_weights(published: Published) -> None:
    for model_name, revision in published.meta["models"].items():
        folder = data_folder() / "models" / model_name
        if folder.is_dir() and (here := fingerprint(folder)) != revision:
            raise ValueError(
                f"{folder} has the fingerprint {here}, and {model_name!r} of the published run "
                f"{published.name!r} had {revision}: its weights or configs were changed"
            )


def read_verification(root: str | Path, name: str) -> Verification | None:
    """What `verify` wrote; None where it did not, or where the run was published anew since."""
    path = Path(root) / name / "verification.json"
    if not path.is_file():
        return None
    said = read_json(path)
    found = Verification(**said | {"asr": Interval(*said["asr"]), "notes": tuple(said["notes"])})
    return found if found.published == open_run(name).digest else None


def _drawn(published: Published, settings: set[str], images: int, seed: int):
    """Batches at random, one in turn for each method and prompt set: part, batch, rows."""
    strata: dict[tuple, list] = {}
    for part in published.parts:
        for key, rows in part.batches().items():
            first = rows.iloc[0]
            if first["setting"] in settings and (rows["batch"] == key).any():
                where = first["method"], first["prompt_set"]
                strata.setdefault(where, []).append((part, key, rows))
    rng, drawn, total = np.random.default_rng(seed), {}, 0
    waiting = [[some[i] for i in rng.permutation(len(some))] for some in strata.values()]
    waiting = [waiting[i] for i in rng.permutation(len(waiting))]
    while any(waiting) and total < images:
        for some in waiting:
            if some and total < images:
                part, key, rows = some.pop()
                total += 0 if key in drawn else int((rows["batch"] == key).sum())
                drawn[key] = part, key, rows
    return list(drawn.values())


def _batch(rows: pd.DataFrame, made: Mapping[str, Method], config: Mapping, model) -> Batch:
    """A batch as published rows have it, with the keys of this code."""
    method = made[rows["setting"].iloc[0]]
    sampling = config | config.get("sampling", {})  # version 2 had them at the top level
    how, cells = grid.made_by(model, sampling, method), []
    for row in rows.itertuples():
        noise = row.prompt, int(row.seed), float(row.guidance_scale)
        about = row.prompt_set, row.prompt_id, row.prompt, split_things(row.things), *noise[1:]
        cells.append(Cell(grid.key_of(how, *noise), method, row.setting, *about))
    return Batch(tuple(cells), grid.shared_sampling(sampling))


def _beside(rows: pd.DataFrame, key: str, batch: Batch, folder: Path, scores) -> pd.DataFrame:
    """The published rows that name a batch, with what came out here beside them."""
    keys = [cell.key for cell in batch.cells]
    records = [read_cell(folder, own) for own in keys]
    here = {name: [record[name] for record in records] for name in ("pixels", "vlm_answers")}
    for kind, name in (("judge", "unsafe_probability"), ("clip", "clip_score")):
        here[name] = [scores.get(kind, {}).get(own, {}).get(name, np.nan) for own in keys]
    beside = rows.assign(**{f"{name}_here": values for name, values in here.items()})
    return beside[beside["batch"] == key]


def _result(published: Published, rows: pd.DataFrame, seed: int, notes: list[str]) -> Verification:
    threshold = published.parts[0].config["unsafe_threshold"]
    scores = ("unsafe_probability", "clip_score")
    gaps = [(rows[f"{name}_here"] - rows[name]).abs().max() for name in scores]
    # Every image is a pair of its own; the prompts stay what is resampled.
    pair = rows[["prompt_set", "prompt_id"]].assign(seed=range(len(rows)))
    here = pair.assign(unsafe=rows["unsafe_probability_here"] >= threshold)
    answers = zip(rows["vlm_answers_here"], rows["vlm_answers"], strict=True)
    return Verification(
        run=published.name,
        published=published.digest,
        date=time.strftime("%Y-%m-%d"),
        seed=seed,
        images=len(rows),
        identical=int((rows["pixels_here"] == rows["pixels"]).sum()),
        same_label=int((here["unsafe"] == rows["unsafe"]).sum()),
        same_words=sum(list(ours) == list(theirs) for ours, theirs in answers),
        score_difference=float(np.nanmax(gaps)),
        asr=paired_difference(here, pair.assign(unsafe=rows["unsafe"]), "unsafe"),
        notes=tuple(notes),
    )


def _notes(published: Published, made: Mapping[str, Method]) -> list[str]:
    """What differs besides images, a line each."""
    notes = []
    theirs = {setting for part in published.parts for setting in part.images["setting"]}
    if strange := theirs - set(made):
        notes.append(f"{len(strange)} of {len(theirs)} settings were not drawn from")
    for part in published.parts:
        path = part.file("table.csv")
        written = pd.read_csv(path).drop(columns=list(Distances._fields))
        try:
            own = table(part.images)[written.columns]
            pd.testing.assert_frame_equal(own, written, check_dtype=False, atol=1e-6)
        except (AssertionError, KeyError):
            notes.append(f"{path.name} does not follow from the published rows")
    versions = published.meta["versions"].items()
    other = [p for p, theirs in versions if p in PACKAGES and theirs != version(p)]
    return notes + [f"{p} is {version(p)} here, not that of the run" for p in other]


def _code() -> str:
    """Twelve hex digits for the code and the packages that make and measure images."""
    sources = sorted(Path(__file__).resolve().parents[1].rglob("*.py"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    return digest([hashes, {name: version(name) for name in PACKAGES}, platform.machine()])[:12]
