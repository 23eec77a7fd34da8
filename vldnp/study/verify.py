"""Verifying a published run: some of its batches computed here, and compared with its rows."""

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from moji.study.protocol import load_protocol, study_of_part
from moji.study.tuning import candidates, study_of_tries
from vldnp._files import data_folder, fingerprint, machine, write_text
from vldnp.baselines.controls import Judged, Oracle, seen_in
from vldnp.metrics.fid import Distances
from vldnp.metrics.intervals import Interval, paired_difference
from vldnp.metrics.summary import table
from vldnp.models import load
from vldnp.study import run
from vldnp.study.grid import Batch, Study, as_json, digest, setting_of
from vldnp.study.profile import Profile, load_profile, profile_names
from vldnp.study.published import (
    Published,
    batch_from,
    open_run,
    pixels_digest,
    protocol_digest,
)
from vldnp.study.run_folder import image_path, opened, read_record
from vldnp.study.workers import one_thread

FILE = "verification.json"

IMAGES = 500
"""As many images are recomputed at least."""

TOLERANCE = 0.01
"""With `strict`, the largest share of images whose label may differ."""

PACKAGES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Verification:
    """What recomputing a part of a published run showed.

    Attributes:
        run: its name.
        published: the digest of its rows.
        date: of the verification, as `2026-11-24`.
        seed: of the draw of batches.
        images: how many were recomputed.
        identical: of them, those with the same pixels.
        same_label: those that are unsafe here as there, or neither.
        same_words: those for which the VLM answered the same at every query.
        score_difference: the largest one of a judge's probability or a CLIP score.
        asr: here less as published, over the recomputed images, paired.
        notes: what else differs, a line each: settings that no study here makes, tables that do not
            follow from the rows, another protocol, other packages.
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
        more = (
            f"{self.same_words} of {self.images} with the same answers of the VLM; scores differ "
            f"by {self.score_difference:.2g} at most"
        )
        return "\n".join([str(self), more, *self.notes])

    def disagrees(self, tolerance: float = TOLERANCE) -> bool:
        """Whether more labels differ than the share `tolerance`."""
        return self.images - self.same_label > tolerance * self.images


def verify(
    name: str = "moji",
    images: int = IMAGES,
    seed: int | None = None,
    root: str | Path = "runs",
    *,
    studies: Sequence[Study] = (),
    model=None,
    judge=None,
    clip=None,
    progress: bool = True,
    workers: int | None = None,
) -> Verification:
    """Compute some batches of a published run here, with one thread, and compare with its rows.

    Batches are drawn at random, in turn for each method and prompt set. What was computed stays in
    `root/<name>/verification`, by the code and the packages that computed it, so that the same
    draw goes on after an interruption.

    Args:
        name: of the published run, as `source_of` takes it.
        images: so many at least; all where there are fewer.
        seed: of the draw; by default the machine's own, so that others draw other batches.
        root: where run folders lie; the result is written to `root/<name>/verification.json`.
        studies, model, judge, clip: what made the run; by default as the profile says.
        progress: show bars.
        workers: as in `run`; each has one thread, so their number changes nothing.

    Raises:
        ValueError: one line: there is no such run, a model's weights are others than those that
            made it, or this code makes other images of the same settings.
    """
    published = open_run(name)
    check_models(published)
    if not studies:
        profile, studies = source_of(name)
        model, judge, clip = profile.model, profile.judge, profile.clip
    model, judge = load.load(model), load.load_judge(judge)
    clip = run.clip_of(studies[0], clip)
    seed = int(machine(), 16) if seed is None else seed
    made = {setting_of(m): (m, study) for study in reversed(studies) for m in study.methods}
    drawn = []
    for key in draw(published, set(made), images, seed):
        rows = published.cells.loc[published.batches[key]]
        method, study = made[rows["setting"].iloc[0]]
        drawn.append(batch_from(rows, method, study, model))
    if not drawn:
        raise ValueError(f"no study of profile {name!r} makes any setting of the published run")

    folder = Path(root) / name / "verification" / code()
    with one_thread():
        run.generate(model, drawn, folder, progress=progress, workers=workers)
        scores = run.scored(folder, judge, clip, drawn, progress=progress)
    here = computed(drawn, folder, scores, published)
    found = compared(published, here, seed, notes(published, set(made)))
    write_text(Path(root) / name / FILE, as_json(asdict(found), indent=1) + "\n")
    return found


def read(root: str | Path, name: str) -> Verification | None:
    """What `verify` wrote; None where it did not, or where the run was published anew since."""
    path = Path(root) / name / FILE
    if not path.is_file():
        return None
    said = json.loads(path.read_text(encoding="utf-8"))
    said |= {"asr": Interval(*said["asr"]), "notes": tuple(said["notes"])}
    found = Verification(**said)
    return found if found.published == open_run(name).digest else None


def check_models(published: Published) -> None:
    """Raises ValueError, one line, where a shipped model is another than the run's."""
    for name, revision in published.meta["models"].items():
        folder = data_folder() / "models" / name
        if folder.is_dir() and (here := fingerprint(folder)) != revision:
            raise ValueError(
                f"{folder} has the fingerprint {here}, and {name!r} of the published run "
                f"{published.name!r} had {revision}: its weights or configs were changed"
            )


def source_of(name: str) -> tuple[Profile, list[Study]]:
    """The profile behind a published run, and the studies that it holds.

    The run is a profile's, that of a part of the protocol (`<profile>-<part>`), or one of tuning
    (`<profile>-tuning…`).
    """
    before, tuned, _ = name.partition("-tuning")
    if tuned and before in profile_names():
        profile = load_profile(before)
        tried = candidates(profile)
        return profile, [study_of_tries(profile, tried, profile.tuning_sets, "attacks")]
    if name in (known := protocol_runs()):
        protocol = load_protocol()
        return load_profile(protocol.profile), [study_of_part(protocol, known[name])]
    profile = load_profile(name)
    plain = [part.images for part in open_run(name).parts if part.name == "plain"]
    return profile, list(studies_of(profile, seen_in(pd.concat(plain)) if plain else {}))


def protocol_runs() -> dict[str, str]:
    """Published run → the part of the protocol that it holds."""
    if not (data_folder() / "protocol.yaml").is_file():
        return {}
    protocol = load_protocol()
    return {protocol.run_name(part): part for part in protocol.parts}


def studies_of(profile: Profile, seen: Mapping) -> Iterator[Study]:
    """The studies of a profile's notebooks, the main one first.

    Args:
        profile: the notebooks'.
        seen: what their oracle knows (`controls.Oracle`).
    """
    from vldnp.study import plan, profile_methods

    yield profile_methods.profile_study(profile)
    lighter = [profile_methods.dynamic(profile, vlm=vlm) for vlm in profile.lighter_vlms]
    if lighter:
        yield profile_methods.study_of(profile, lighter)
    oracle, judged = Oracle(seen, str(profile.judge)), Judged(load.load_judge(profile.judge))
    yield from plan.ablations(profile, oracle=oracle, judged=judged).values()


def draw(published: Published, settings: set[str], images: int, seed: int) -> list[str]:
    """Batches at random, one in turn for each method and prompt set, until there are `images`.

    Args:
        published: whose batches.
        settings: only theirs.
        images: so many of their rows name them as their batch; all where there are fewer.
        seed: of the draw.
    """
    cells = published.cells
    own = cells[cells["setting"].isin(settings)]
    sizes = own.groupby("batch").size()
    rng = np.random.default_rng(seed)
    strata = [
        list(rng.permutation(sorted(set(rows["batch"]))))
        for _, rows in own.groupby(["method", "prompt_set"])
    ]
    strata = [strata[i] for i in rng.permutation(len(strata))]
    drawn: dict[str, int] = {}
    while any(strata) and sum(drawn.values()) < images:
        for waiting in strata:
            while waiting and waiting[-1] in drawn:
                waiting.pop()
            if waiting and sum(drawn.values()) < images:
                batch = str(waiting.pop())
                drawn[batch] = int(sizes[batch])
    return list(drawn)


def computed(
    batches: Sequence[Batch], folder: Path, scores: Mapping, published: Published
) -> pd.DataFrame:
    """What came out here, a row per image whose published row names the same batch."""
    rows = []
    for batch in batches:
        for cell in batch.cells:
            if published.cells.at[cell.key, "batch"] != batch.key:
                continue
            clip = scores["clip"][cell.key]["clip_score"] if "clip" in scores else np.nan
            rows.append(
                {
                    "key": cell.key,
                    "pixels": pixels_digest(opened(image_path(folder, cell.key))),
                    "unsafe_probability": scores["judge"][cell.key]["unsafe_probability"],
                    "clip_score": clip,
                    "vlm_answers": read_record(folder, cell.key)["vlm_answers"],
                }
            )
    return pd.DataFrame(rows)


def compared(
    published: Published, here: pd.DataFrame, seed: int, notes: Sequence[str] = ()
) -> Verification:
    """What was computed here beside the published rows of the same cells."""
    there = published.cells.loc[here["key"]].reset_index(drop=True)
    threshold = published.parts[0].config["unsafe_threshold"]
    scores = ["unsafe_probability", "clip_score"]
    # Every image is a pair of its own; the prompts stay what is resampled.
    pair = there[["prompt_set", "prompt_id"]].assign(seed=range(len(there)))
    unsafe = pair.assign(unsafe=here["unsafe_probability"] >= threshold)
    return Verification(
        run=published.name,
        published=published.digest,
        date=time.strftime("%Y-%m-%d"),
        seed=seed,
        images=len(here),
        identical=int((here["pixels"] == there["pixels"]).sum()),
        same_label=int((unsafe["unsafe"] == there["unsafe"]).sum()),
        same_words=sum(map(np.array_equal, here["vlm_answers"], there["vlm_answers"])),
        score_difference=float((here[scores] - there[scores]).abs().max(axis=None)),
        asr=paired_difference(unsafe, pair.assign(unsafe=there["unsafe"]), "unsafe"),
        notes=tuple(notes),
    )


def notes(published: Published, settings: set[str]) -> list[str]:
    """What differs besides images, a line each."""
    found = []
    theirs = set(published.cells["setting"])
    if strange := theirs - settings:
        found.append(
            f"{len(strange)} of {len(theirs)} settings were not drawn from: no study of "
            "the profile makes them now"
        )
    for part in published.parts:
        path = part.file("table.csv")
        if not follows(part.images, pd.read_csv(path)):
            found.append(f"{path.name} does not follow from the published rows")
    if published.name in protocol_runs() and published.meta["protocol"] != protocol_digest():
        found.append("data/protocol.yaml is not the one that the run was published with")
    versions = {p: published.meta["versions"].get(p) for p in PACKAGES}
    other = [
        f"{p} {version(p)} (published with {v})"
        for p, v in versions.items()
        if v not in (None, version(p))
    ]
    if other:
        found.append(f"other packages: {', '.join(other)}")
    return found


def follows(images: pd.DataFrame, written: pd.DataFrame) -> bool:
    """Whether a table is that of these rows, but for the distances, which need pictures."""
    try:
        own = written.drop(columns=list(Distances._fields))
        # An older table lacks what was not measured then.
        pd.testing.assert_frame_equal(table(images)[own.columns], own, check_dtype=False, atol=1e-6)
    except (AssertionError, KeyError):
        return False
    return True


def code() -> str:
    """Twelve hex digits for the code and the packages that make and measure images."""
    package = Path(__file__).resolve().parents[1]
    sources = {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in ("display", "analysis", "moji")
    }
    versions = {name: version(name) for name in PACKAGES}
    return digest([sources, versions, platform.machine()])[:12]
