"""The confirmatory study as data: `data/protocol.yaml`, written before any of its images exists.

Each of its parts is a study of its own in `runs/<profile>-<part>`, published on its own in
`data/results/<profile>-<part>` as soon as it is done.
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pandas as pd
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt

from moji.study.fid import fid_changes
from vldnp._files import atomic, checked, data_folder, read_yaml, unknown
from vldnp.methods import Method
from vldnp.models.load import load_judge
from vldnp.study.grid import Study, setting_of
from vldnp.study.profile import (
    Profile,
    chosen_methods,
    dynamic,
    load_profile,
    profile_methods,
    profile_study,
)
from vldnp.study.published import publish
from vldnp.study.run import run


@dataclass(frozen=True)
class Part:
    """One study of the protocol.

    Attributes:
        methods: names of the profile's methods; `vl-dnp, <VLM>` is VL-DNP with a lighter VLM.
        prompts: prompt set → how many of its prompts, drawn at random.
        seeds: images of each prompt.
        omegas: `chosen`, the strength that the profile says; `all`, the profile's strengths; or a
            list of strengths. Methods without ω have their one setting.
        reference: where the real images of FID and KID come from, as in a profile.
    """

    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    prompts: dict[str, PositiveInt] = field(hash=False)
    seeds: PositiveInt = 1
    omegas: Literal["chosen", "all"] | tuple[NonNegativeFloat, ...] = "chosen"
    reference: str | None = None


@dataclass(frozen=True)
class Protocol:
    """What is compared, and what is asked.

    Attributes:
        profile: brings models and methods; these were chosen as `choice` says.
        choice: how each method's setting was chosen, in words.
        parts: name → what is computed, in this order.
        comparisons: claim, method, against, prompts, metric and what is asked of the method, as
            `vldnp.study.claims.verdicts` reads them; a claim is a family for Holm's correction.
        attacks: the prompt sets that a comparison on `attacks` means.
        open: claim → why it may stay undecided.
        path: of its file.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    profile: str
    choice: str
    parts: dict[str, Part] = field(hash=False)
    comparisons: tuple[tuple[str, str, str, str, str, str], ...]
    attacks: tuple[str, ...]
    open: dict[str, str] = field(default_factory=dict, hash=False)
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
    known: dict[str, list[Method]] = {}
    if part.omegas == "chosen":
        known = {name: [method] for name, method in chosen_methods(profile).items()}
    else:
        omegas = () if part.omegas == "all" else part.omegas
        for method in profile_methods(profile, omegas):
            known.setdefault(method.name, []).append(method)
    for vlm in profile.lighter_vlms:
        known[f"vl-dnp, {vlm.name}"] = [dynamic(profile, vlm=vlm)]
    if strange := [name for name in part.methods if name not in known]:
        raise unknown(f"method of profile {profile.name!r}", strange[0], known)
    return {name: known[name] for name in part.methods}


def study_of_part(protocol: Protocol, name: str) -> Study:
    """The study of a part."""
    profile, part = load_profile(protocol.profile), protocol.part(name)
    methods = [method for some in methods_of(profile, part).values() for method in some]
    study = profile_study(profile, methods, name=f"{profile.name}-{name}")
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
    """Compute what is missing of a part, and publish it; the rows are those of `vldnp.run`.

    Args:
        protocol, name: which part.
        root, workers, backend: as in `vldnp.run`.
    """
    study, profile = study_of_part(protocol, name), load_profile(protocol.profile)
    models = profile.model, profile.judge, profile.clip
    images = run(study, *models, root, workers=workers, backend=backend)
    folder = Path(root) / study.name
    if study.reference is not None:
        methods = methods_of(profile, protocol.part(name))
        settings = {method: setting_of(some[0]) for method, some in methods.items()}
        judge = load_judge(profile.judge)
        found = fid_changes(study, images, judge, settings, folder)
        rows = [{"method": method, **one._asdict()} for method, one in found.items()]
        with atomic(folder / "fid.csv") as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False, lineterminator="\n")
    publish(folder, protocol=protocol.digest)
    return images
