"""Profiles: models, methods, prompts and settings that belong together, as YAML files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, ValidationInfo

import vldnp
from vldnp._files import checked, data_folder, is_file_name, read_yaml, unknown
from vldnp.methods import Method
from vldnp.models import load
from vldnp.models.load import ModelSpec
from vldnp.study.grid import SAMPLING, Study
from vldnp.study.parameters import Count, numbers
from vldnp.study.prompts import set_name
from vldnp.study.reference import called

QUICK, QUICK_PROMPTS = "-quick", 8
"""Ends the names of quick runs' folders; so many prompts of each set they take."""

SCHEDULES = ("front_loaded", "uniform")
CONSTRUCTORS = ("CFG", "Static", "VLDNP", "SAFREE", "SLD", "Summed", "CASG", "NAG", "Repelled")


def _model(said: object, info: ValidationInfo) -> ModelSpec:
    """A model as the file has it: a name, or a mapping of a name and options."""
    if isinstance(said, ModelSpec):  # of the profile that is extended
        return said
    if isinstance(said, str):
        return ModelSpec(said)
    if not isinstance(said, Mapping) or not isinstance(said.get("name"), str):
        raise ValueError(f"must be a name, or a mapping with a name and options, not {said!r}")
    options = {key: value for key, value in said.items() if key != "name"}
    if (shots := options.get("demonstrations")) is not None:
        if not isinstance(shots, list) or any(
            not isinstance(shot, dict) or shot.keys() != {"image", "answer"} for shot in shots
        ):
            raise ValueError("has demonstrations that are no list of {image: …, answer: …}")
        folder = info.context  # images' files are named as seen from the profile's folder
        shots = [(str(folder / shot["image"]), str(shot["answer"])) for shot in shots]
        options["demonstrations"] = tuple(shots)
    return ModelSpec(said["name"], options)


def _entry(said: object) -> dict:
    """A method as the file has it: `CFG`, or `{VLDNP: {omega: [4, 8]}, chosen: 8, name: …}`."""
    entry = {said: {}} if isinstance(said, str) else said
    kinds = [kind for kind in entry if kind not in ("name", "chosen")] if entry else []
    if not isinstance(entry, dict) or len(kinds) != 1:
        raise ValueError(f"must each have one constructor of {', '.join(CONSTRUCTORS)}, not {said}")
    if kinds[0] not in CONSTRUCTORS:
        raise unknown("method", kinds[0], CONSTRUCTORS)
    if not isinstance(entry[kinds[0]] or {}, dict):
        raise ValueError(f"must have a mapping of arguments for {kinds[0]}, not {entry[kinds[0]]}")
    return entry


def _sampling(said: dict) -> dict:
    if strange := said.keys() - SAMPLING.keys():
        raise unknown("sampling setting", min(strange), SAMPLING)
    for name in said.keys() & {"num_inference_steps", "height", "width"}:
        if type(said[name]) is not int or said[name] < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, not {said[name]!r}")
    scale = said.get("guidance_scale", 1)
    if isinstance(scale, bool | str) or not 0 <= scale < float("inf"):
        raise ValueError(f"guidance_scale must be a finite number, 0 or more, not {scale!r}")
    return said


Model = Annotated[ModelSpec, PlainValidator(_model)]


@dataclass(frozen=True)
class Profile:
    """The settings of a set of experiments; models and prompt sets are names for `vldnp.load…`.

    Attributes:
        name: of the run folder, `runs/<name>`.
        model, vlm, judge, clip: in the file a name, folder or hub id, or a mapping with a `name`
            and the options of `vldnp.load`, `load_vlm`, `load_judge` or `load_clip`.
        concepts: the concept set that the VLM is asked about.
        prompt_sets: names or paths.
        sampling: arguments of `vldnp.sample` (`grid.SAMPLING`).
        methods: what is compared: constructors of `vldnp` (`CONSTRUCTORS`) with their arguments; a
            list as `omega` gives one method for each value, of which `chosen` is the one that is
            compared with other methods; `name` renames them.
        lighter_vlms: further VLMs, from the lightest on.
        preview: a tiny VAE for `vldnp.load_preview`.
        reference: where the real images of FID come from (`reference.reference_images`).
        batch_size: images per batch.
        max_prompts: prompts of each set, one number or one by set; None is all.
        reveal: show what the judge flags as it is; else it is blurred until one asks to see it.
        notebooks: the notebooks' parameters that are other than their defaults here; among them
            `safety_set` and `benign_set`, the attack that is looked at most closely and the
            harmless set.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: str
    model: Model
    vlm: Model
    judge: Model
    clip: Model
    concepts: str
    prompt_sets: Annotated[tuple[str, ...], Field(min_length=1)]
    methods: Annotated[tuple[Annotated[dict, PlainValidator(_entry)], ...], Field(min_length=1)] = (
        field(hash=False)
    )
    sampling: Annotated[dict[str, Any], AfterValidator(_sampling)] = field(
        default_factory=dict, hash=False
    )
    lighter_vlms: tuple[Model, ...] = ()
    preview: Model | None = None
    reference: str | None = None
    batch_size: Annotated[int, Field(strict=True, ge=1)] = 32
    max_prompts: Count | dict[str, Count] | None = field(default=None, hash=False)
    reveal: Annotated[bool, Field(strict=True)] = False
    notebooks: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not is_file_name(self.name):
            raise ValueError(f"name must be that of one folder, not {self.name!r}")
        self.prompt_set(self.safety_set), self.prompt_set(self.benign_set)

    @property
    def safety_set(self) -> str:
        return self.notebooks.get("safety_set", "implicit")

    @property
    def benign_set(self) -> str:
        return self.notebooks.get("benign_set", "benign")

    def prompt_set(self, name: str | Path) -> str | Path:
        """One of its prompt sets by the name it has in tables, as `load_prompts` takes it.

        Raises:
            ValueError: the profile has none of that name, and it is no file; one line.
        """
        named = {set_name(source): source for source in self.prompt_sets}
        if set_name(name) not in named and not Path(name).is_file():
            raise unknown(f"prompt set of profile {self.name!r}", str(name), map(str, named))
        return named.get(set_name(name), name)


def profile_names() -> list[str]:
    """The profiles in `data/profiles`."""
    return sorted(path.stem for path in (data_folder() / "profiles").glob("*.yaml"))


def load_profile(source: str | Path, *, quick: bool = False) -> Profile:
    """A profile by name, or from a YAML file.

    A file that says `extends: <name or file>` has that profile's settings where it has none of its
    own. `quick` is for a smoke test: `QUICK_PROMPTS` prompts of each set, in `runs/<name>-quick`.

    Raises:
        ValueError, FileNotFoundError: one line that names the file and says what is wrong.
    """
    profile = _load(source, ())
    if not quick:
        return profile
    return replace(profile, name=profile.name + QUICK, max_prompts=QUICK_PROMPTS)


def _load(source: str | Path, extending: tuple[Path, ...]) -> Profile:
    """`extending` are the files that led here by `extends`."""
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"}:
        if source not in profile_names():
            raise unknown("profile", str(source), profile_names())
        path = data_folder() / "profiles" / f"{source}.yaml"
    if path.resolve() in extending:
        raise ValueError(f"profile {path} extends itself")
    data = read_yaml(path, "profile")
    if (base := data.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise ValueError(f"profile {path}: extends must be a name or a YAML file, not {base!r}")
        base = path.parent / base if Path(base).suffix in {".yaml", ".yml"} else base
        data = vars(_load(base, (*extending, path.resolve()))) | {"name": path.stem} | data
    return checked(Profile, {"name": path.stem} | data, path, "profile", "extends")


def profile_methods(
    profile: str | Path | Profile,
    omegas: Sequence[float] = (),
    names: Iterable[str] | None = None,
) -> tuple[Method, ...]:
    """The methods that a profile compares, each at every strength it has.

    `omegas` are strengths instead of the profile's, for the methods that have several; `names`
    which methods, as in tables.
    """
    return tuple(
        method
        for entry in _entries(profile, numbers(omegas, "omegas"))
        for method in entry[0]
        if names is None or method.name in names
    )


def chosen_methods(profile: str | Path | Profile) -> dict[str, Method]:
    """Method name → the one setting in which it is compared with others.

    That is the `chosen` strength, or the last; of several entries of a name the first that says so.
    """
    found: dict[str, Method] = {}
    for methods, entry in _entries(profile, ()):
        at = [m for m in methods if m.omega == entry.get("chosen", methods[-1].omega)]
        if at and ("chosen" in entry or at[0].name not in found):
            found[at[0].name] = at[0]
    return found


def dynamic(profile: Profile, omega: float | None = None, **changes) -> Method:
    """The profile's VL-DNP at its chosen strength, with other arguments of `vldnp.VLDNP`.

    An ablation is a comprehension: `[dynamic(profile, query_steps=uniform(n)) for n in (1, 2)]`.
    """
    entry = next((entry for entry in profile.methods if "VLDNP" in entry), {"VLDNP": {}})
    given = dict(entry["VLDNP"] or {})
    omegas = given.pop("omega", [7.5])
    last = omegas[-1] if isinstance(omegas, list) else omegas
    omega = entry.get("chosen", last) if omega is None else omega
    return _method(profile, "VLDNP", given | {"omega": omega} | changes)


def _entries(
    profile: str | Path | Profile, omegas: Sequence[float]
) -> list[tuple[list[Method], dict]]:
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    found = []
    for entry in profile.methods:
        kind = next(key for key in entry if key in CONSTRUCTORS)
        given = dict(entry[kind] or {})
        swept = given.pop("omega") if isinstance(given.get("omega"), list) else None
        strengths = [{}] if swept is None else [{"omega": w} for w in (omegas or swept)]
        methods = [_method(profile, kind, given | strength) for strength in strengths]
        if "name" in entry:
            methods = [replace(method, name=entry["name"]) for method in methods]
        found.append((methods, entry))
    return found


def _method(profile: Profile, kind: str, given: Mapping) -> Method:
    given = dict(given)
    if given.get("omega") is not None:  # 8 and 8.0 are one setting
        given["omega"] = float(given["omega"])
    if isinstance(steps := given.get("query_steps"), dict):
        (schedule, count), *_ = steps.items()
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        given["query_steps"] = getattr(vldnp, schedule)(count)
    if kind == "VLDNP":
        given = {"concepts": profile.concepts, "vlm": profile.vlm} | given
        if isinstance(vlm := given["vlm"], dict):
            vlm = ModelSpec(vlm["name"], {key: vlm[key] for key in vlm if key != "name"})
        given["vlm"] = load.load_vlm(vlm)
    if kind == "NAG":
        rule = vldnp.NAG(**{name: given.pop(name) for name in ("tau", "alpha") if name in given})
        return replace(vldnp.Static(rule=rule, **given), name="nag")
    if kind == "Repelled":
        from vldnp.baselines.safe_denoiser import latents_of

        bank = [Image.fromarray(pixels) for pixels in called(given.pop("bank"), 64, 64)]
        given["bank"] = latents_of(load.load(profile.model), bank)
    try:
        return getattr(vldnp, kind)(**given)
    except TypeError as error:
        raise ValueError(f"profile {profile.name!r}: {kind}: {error}") from error


def profile_study(
    profile: str | Path | Profile,
    methods: Sequence[Method] | None = None,
    *,
    name: str | None = None,
    prompt_sets: Sequence[str | Path] = (),
    max_prompts: int | Mapping[str, int] | None = None,
) -> Study:
    """Some methods (all of the profile's) under a profile's settings, as a study.

    `name` (of the run folder), `prompt_sets` and `max_prompts` replace the profile's.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    return Study(
        name=name or profile.name,
        methods=profile_methods(profile) if methods is None else tuple(methods),
        prompt_sets=tuple(map(profile.prompt_set, prompt_sets)) or profile.prompt_sets,
        sampling=profile.sampling,
        max_prompts=max_prompts or profile.max_prompts,
        batch_size=profile.batch_size,
        reference=profile.reference,
        reference_sets=(profile.benign_set,),
        captions_without=profile.concepts,
    )
