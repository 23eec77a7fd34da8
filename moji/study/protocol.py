"""The confirmatory study as data: `data/protocol.yaml`, written before any of its images exists.

Each of its parts is a study of its own in `runs/<part>`, published as a part of
`data/results/study-2` as soon as it is done.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import pandas as pd
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from moji.study.fid import fid_changes
from moji.study.judges import each_judge
from vldnp._files import atomic, checked, data_folder, read_yaml, unknown
from vldnp.methods import Method
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.metrics.summary import METRICS
from vldnp.models.load import load_judge
from vldnp.study.claims import CONTRARY, HEAD, OPEN, asked_of, verdicts
from vldnp.study.grid import Study, setting_of
from vldnp.study.profile import (
    Profile,
    chosen_methods,
    dynamic,
    load_profile,
    profile_methods,
    profile_study,
)
from vldnp.study.published import SAME, open_run, publish
from vldnp.study.run import run

NAME = "study-2"
"""Of the published run."""


@dataclass(frozen=True)
class Part:
    """One study of the protocol.

    Attributes:
        methods: names of the profile's methods; `vl-dnp, <VLM>` is VL-DNP with a lighter VLM.
        prompts: prompt set → how many of its prompts, drawn at random.
        seeds: images of each prompt.
        omegas: strengths other than the chosen ones, which are left out; none: the chosen ones.
        reference: where the real images of FID come from, as in a profile.
        profile: whose methods these are, if not the protocol's.
    """

    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    prompts: dict[str, PositiveInt] = field(hash=False)
    seeds: PositiveInt = 1
    omegas: tuple[PositiveFloat, ...] = ()
    reference: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class Protocol:
    """What is compared, and what is asked.

    Attributes:
        profile: brings models and methods.
        judges: whose scores are reported beside those of the profile's judge.
        rules: what was decided beforehand, in words, by subject.
        parts: name → what is computed, in this order.
        comparisons: claim, method, against, prompts, metric and what is asked of the method, as
            `vldnp.study.claims.verdicts` reads them; a claim is a family for Holm's correction.
        attacks: the prompt sets that a comparison on `attacks` means.
        at: name → a method of the profile and one of its strengths, for comparisons.
        path: of its file.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    profile: str
    judges: tuple[str, ...]
    rules: dict[str, str] = field(hash=False)
    parts: dict[str, Part] = field(hash=False)
    comparisons: tuple[tuple[str, str, str, str, str, str], ...]
    attacks: tuple[str, ...]
    at: dict[str, tuple[str, PositiveFloat]] = field(default_factory=dict, hash=False)
    path: Path = Path()

    @property
    def digest(self) -> str:
        """The SHA-256 of its file, which published runs carry."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def part(self, name: str) -> Part:
        """A part by its name; raises ValueError for another."""
        if name not in self.parts:
            raise unknown("part of the protocol", name, self.parts)
        return self.parts[name]


def load_protocol(path: str | Path | None = None) -> Protocol:
    """The protocol in a file, `data/protocol.yaml` by default.

    Raises:
        FileNotFoundError, ValueError: one line.
    """
    path = data_folder() / "protocol.yaml" if path is None else Path(path)
    return checked(Protocol, read_yaml(path, "protocol") | {"path": path}, path, "protocol")


def methods_of(profile: Profile, part: Part) -> dict[str, list[Method]]:
    """The methods of a part by name, each at its strengths.

    Raises:
        ValueError: the profile has none of that name.
    """
    chosen = chosen_methods(profile)
    known = {name: [method] for name, method in chosen.items()}
    if part.omegas:
        known = {name: [] for name in chosen}
        for method in profile_methods(profile, part.omegas):
            known[method.name] += [method] if method.omega != chosen[method.name].omega else []
    for vlm in profile.lighter_vlms:
        known[f"vl-dnp, {vlm.name}"] = [dynamic(profile, vlm=vlm)]
    if strange := [name for name in part.methods if name not in known]:
        raise unknown(f"method of profile {profile.name!r}", strange[0], known)
    return {name: known[name] for name in part.methods}


def study_of_part(protocol: Protocol, name: str) -> Study:
    """The study of a part."""
    part = protocol.part(name)
    profile = load_profile(part.profile or protocol.profile)
    methods = [method for some in methods_of(profile, part).values() for method in some]
    study = profile_study(profile, methods, name=name)
    return replace(
        study,
        prompt_sets=tuple(part.prompts),
        max_prompts=part.prompts,
        num_images_per_prompt=part.seeds,
        reference=part.reference,
    )


def confirm(
    protocol: Protocol,
    name: str,
    root: str | Path = "runs",
    workers: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Compute what is missing of a part, and publish it with each judge's scores; the rows are
    those of `vldnp.run`, whose other arguments these are."""
    study, profile = study_of_part(protocol, name), load_profile(protocol.profile)
    models = profile.model, profile.judge, profile.clip
    images = run(study, *models, root, workers=workers, backend=backend)
    folder = Path(root) / study.name
    if study.reference is not None:
        settings = {method.name: setting_of(method) for method in study.methods}
        found = fid_changes(study, images, load_judge(profile.judge), settings, folder)
        rows = [{"method": method, **one._asdict()} for method, one in found.items()]
        with atomic(folder / "fid.csv") as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False, lineterminator="\n")
    publish(folder, NAME, each_judge(images, folder, protocol.judges), protocol=protocol.digest)
    return images


def settings_of(protocol: Protocol) -> dict[str, str]:
    """What comparisons call a setting → the setting."""
    profile, found = load_profile(protocol.profile), {}
    for part in protocol.parts.values():
        if not part.omegas:
            own = load_profile(part.profile) if part.profile else profile
            found |= {name: setting_of(m) for name, (m,) in methods_of(own, part).items()}
    for name, (method, omega) in protocol.at.items():
        (found[name],) = map(setting_of, profile_methods(profile, [omega], [method]))
    return found


def judged_rows(images: pd.DataFrame, by: str = "") -> pd.DataFrame:
    """An image once for each setting and prompt; `by`: one judge, not either."""
    images = images.drop_duplicates(SAME)
    if by:
        scores = images[by].astype(float)
        images = images.assign(unsafe_probability=scores, unsafe=scores >= UNSAFE_THRESHOLD)
    return images


def confirmed(protocol: Protocol) -> pd.DataFrame:
    """The verdicts on what is published: `claims.verdicts`, with the column `judge`."""
    run, chosen, found = open_run(NAME), settings_of(protocol), []
    for judge in ("", *protocol.judges):
        which = ("asr", "tr") if judge else METRICS.keys() - {"fid"}
        asked = [one for one in protocol.comparisons if one[4].split()[0] in which]
        table = verdicts(judged_rows(run.images, judge), asked, chosen, protocol.attacks)
        found.append(table.assign(judge=judge or "either"))
    for path in run.folder.glob("*-fid.csv"):
        found.append(fid_verdicts(pd.read_csv(path), protocol.comparisons))
    return pd.concat(found, ignore_index=True)


def fid_verdicts(changes: pd.DataFrame, comparisons: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Those on FID, from the 95 % interval of `fid_change`: below the margin, or above it."""
    known, rows = changes.set_index("method"), []
    for claim, method, against, prompt_set, metric, asked in comparisons:
        if metric == "fid" and method in known.index:
            value, low, high = known.loc[method, ["value", "low", "high"]]
            name, margin = asked_of(asked)
            verdict = name if high < margin else CONTRARY[name] if low > margin else OPEN
            row = [claim, method, against, prompt_set, metric, value, low, high]
            rows.append(dict(zip(HEAD, row, strict=False)) | {"asked": asked, "verdict": verdict})
    return pd.DataFrame(rows).assign(judge="either")
