"""The confirmatory study as data: `data/protocol.yaml`, written before any of its images exists.

Each of its parts is a study of its own in `runs/<profile>-<part>`, published on its own in
`data/results/<profile>-<part>` as soon as it is done: an end at any moment loses a batch.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pandas as pd
from pydantic import ConfigDict

from vldnp._files import atomic, data_folder, unknown
from vldnp._yaml import checked, read_yaml
from vldnp.levers import AdaptiveGuidance
from vldnp.methods import Method
from vldnp.study import published, publishing, run
from vldnp.study.grid import Study, setting_of
from vldnp.study.profile import Profile, load_profile
from vldnp.study.profile_methods import chosen, dynamic, profile_methods, study_of
from vldnp.study.run_fid import fid_changes
from vldnp.study.sampling import Number, Positive


@dataclass(frozen=True)
class Part:
    """One study of the protocol.

    Attributes:
        methods: names, each at its chosen setting; `vl-dnp, <VLM>` is VL-DNP with another VLM,
            `vl-dnp-preview` shows it pictures of the preview decoder, `vl-dnp-adaptive` drops ε_u
            in late steps, `vl-dnp-fast` does both; and `sld` is the profile's one setting of it.
        prompts: prompt set → how many of its prompts, drawn at random.
        seeds: images of each prompt.
        omegas: strengths at which the methods are compared instead of the chosen one; methods
            without ω have their one setting.
        reference: where the real images of FID and KID come from, as in a profile.
    """

    methods: tuple[str, ...]
    prompts: dict[str, Positive] = field(hash=False)
    seeds: Positive = 1
    omegas: tuple[Number, ...] = ()
    reference: str | None = None


@dataclass(frozen=True)
class Protocol:
    """What is compared, and what is asked.

    Attributes:
        profile: brings models, prompt sets and settings; these were chosen as `choice` says.
        choice: how each method's setting was chosen, in words.
        parts: name → what is computed, in this order.
        comparisons: claim, method, against, prompts, metric and what is asked of the method, as
            `analysis.claims.verdicts` reads them; a claim is a family for Holm's correction.
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
        return published.protocol_digest(self.path)

    def run_name(self, part: str) -> str:
        """Of a part's run folder, and of its published run."""
        return f"{self.profile}-{part}"

    def part(self, name: str) -> Part:
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
    """The methods of a part by name, each at its chosen setting or at the part's strengths.

    Raises:
        ValueError: the profile has none of that name.
    """
    omegas = part.omegas or sorted(set(profile.chosen.values()))
    methods = profile_methods(profile, omegas, names=None)
    known: dict[str, list[Method]] = {}
    for method in methods:
        known.setdefault(method.name, []).append(method)
    if not part.omegas:
        known = {name: [method] for name, method in chosen(profile, methods).items()}
    if slds := [some for name, some in known.items() if name.startswith("sld-")]:
        known["sld"] = slds[0]
    preview, adaptive = {"preview": profile.preview}, {"adaptive": AdaptiveGuidance(0.48)}
    tried = {"fast": preview | adaptive, "adaptive": adaptive, "preview": preview}
    for name, levers in tried.items():
        known[f"vl-dnp-{name}"] = [replace(dynamic(profile, **levers), name=f"vl-dnp-{name}")]
    for vlm in profile.lighter_vlms:
        known[f"vl-dnp, {vlm}"] = [dynamic(profile, vlm=vlm)]
    if strange := [name for name in part.methods if name not in known]:
        raise unknown(f"method of profile {profile.name!r}", strange[0], known)
    return {name: known[name] for name in part.methods}


def study_of_part(protocol: Protocol, name: str) -> Study:
    """The study of a part."""
    profile, part = load_profile(protocol.profile), protocol.part(name)
    methods = [method for some in methods_of(profile, part).values() for method in some]
    return replace(
        study_of(profile, methods, max_prompts=part.prompts),
        name=protocol.run_name(name),
        prompt_sets=tuple(part.prompts),
        num_images_per_prompt=part.seeds,
        reference=part.reference,
    )


def confirm(
    protocol: Protocol,
    name: str,
    root: str | Path = "runs",
    results: str | Path | None = None,
    workers: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Compute what is missing of a part, and publish it unless it was published before.

    Args:
        protocol, name: which part.
        root, workers, backend: as in `vldnp.run`.
        results: where published runs lie; by default `data/results`.

    Returns:
        Its rows, as `vldnp.run` returns them.
    """
    study, profile = study_of_part(protocol, name), load_profile(protocol.profile)
    # Images that another part has published are made again, in this part's batches.
    known = {published_run.name for published_run in published.published_runs()}
    how = {"workers": workers, "backend": backend, "recompute": study.name not in known or None}
    images = run.run(study, profile.model, profile.judge, profile.clip, root, **how)
    folder = Path(root) / study.name
    if "published" in published.read_json(folder / "config.json"):
        return images
    if study.reference is not None:
        methods = methods_of(profile, protocol.part(name))
        settings = {method: setting_of(some[0]) for method, some in methods.items()}
        draw = run.drawing(study, profile.model, root)
        found = fid_changes(study, images, profile.judge, settings, draw)
        rows = [{"method": method, **one._asdict()} for method, one in found.items()]
        with atomic(folder / "fid.csv") as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False, lineterminator="\n")
    results = published.results_folder() if results is None else Path(results)
    publishing.write(folder, results / study.name)
    return images
