"""Profiles: models, methods, prompts and settings that belong together, as YAML files; and
notebooks' parameters, which papermill may pass as text ("false", "[2, 4]"), checked."""

import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, get_args

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationInfo

import vldnp
from vldnp._files import checked, data_folder, is_file_name, profile_names, read_yaml, unknown
from vldnp.levers import gate, preview
from vldnp.methods import Method
from vldnp.models import load
from vldnp.study.grid import SAMPLING, Study, digest, setting_of
from vldnp.study.prompts import load_prompts, set_name

CONSTRUCTORS = ("CFG", "Static", "VLDNP", "SAFREE", "SLD", "Summed", "CASG")
LEVERS = {"preview": lambda m, said: preview(m, load.load_preview(said)), "gate": gate}  # of VLDNP

Text, PromptSet = Annotated[str, "a text"], Annotated[str, "a prompt set"]
Flag = Annotated[bool, Field(strict=True), "true or false"]
Count = Annotated[int, Field(strict=True, ge=0), "a whole number, 0 or more"]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), "a number, 0 or more"]
Numbers = Annotated[tuple[Number, ...], "a list of numbers, 0 or more, such as [2, 4]"]
Counts = Annotated[tuple[Count, ...], "a list of whole numbers, 0 or more, such as [2, 4]"]
Names = Annotated[tuple[str, ...], "a list of names"]
KINDS = {  # of the notebooks' parameters
    **dict.fromkeys("profile out run prompt benign_prompt schedule vlm".split(), Text),
    **dict.fromkeys("quick reveal".split(), Flag),
    **dict.fromkeys("images seed queries max_prompts repetitions".split(), Count),
    **dict.fromkeys("safety_set benign_set".split(), PromptSet),
    **{"omega": Number, "omegas": Numbers, "counts": Counts, "vlms": Names},
}


def _model(said: object, info: ValidationInfo) -> load.ModelSpec:
    """A name, or a mapping of a name and options; images of demonstrations lie beside the file."""
    if isinstance(said, load.ModelSpec):
        return said
    options = dict(said) if isinstance(said, Mapping) else {"name": said}
    if not isinstance(name := options.pop("name", None), str):
        raise ValueError(f"must be a name, or a mapping with a name and options, not {said!r}")
    if shots := options.get("demonstrations"):
        try:
            shots = tuple((str(info.context / shot["image"]), shot["answer"]) for shot in shots)
        except (TypeError, KeyError) as error:
            raise ValueError("has demonstrations that are no {image: …, answer: …}") from error
        options["demonstrations"] = shots
    return load.ModelSpec(name, options)


def _entry(said: object, info: ValidationInfo) -> dict:
    """`CFG`, or `{VLDNP: {omega: [4, 8]}, chosen: 8, name: …}`, as a dict with `kind`, `given`."""
    if not isinstance(said, str | Mapping):
        raise ValueError(f"must be constructors such as CFG, with their arguments, not {said!r}")
    entry = {said: {}} if isinstance(said, str) else dict(said)
    if "kind" in entry:  # of the profile that is extended
        return entry
    about = {key: entry.pop(key) for key in ("name", "chosen") if key in entry}
    kind, given = entry.popitem() if entry else ("", {})
    if entry or kind not in CONSTRUCTORS:
        raise unknown("method", kind, CONSTRUCTORS)
    if not isinstance(given := given or {}, dict):
        raise ValueError(f"must have a mapping of arguments for {kind}, not {given!r}")
    for name in {"vlm", "preview"} & given.keys():
        given[name] = _model(given[name], info)
    return about | {"kind": kind, "given": given}


Model = Annotated[load.ModelSpec, PlainValidator(_model)]
Entry = Annotated[dict, PlainValidator(_entry)]


@dataclass(frozen=True)
class Profile:
    """The settings of a set of experiments, those of `Study` among them. A model is a name, folder
    or hub id, or a mapping of a `name` and the options of `vldnp.load`, `load_vlm` and so on."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: str  # of the run folder, `runs/<name>`
    model: Model
    vlm: Model
    judge: Model
    clip: Model
    concepts: str  # the concept set that the VLM is asked about
    prompt_sets: Annotated[tuple[str, ...], Field(min_length=1)]
    # `CONSTRUCTORS` with their arguments and `LEVERS`; a list as `omega` gives a method for each
    # value, of which the `chosen` one is compared with others; `name` renames them.
    methods: Annotated[tuple[Entry, ...], Field(min_length=1)] = field(hash=False)
    sampling: dict[str, Any] = field(default_factory=dict, hash=False)
    lighter_vlms: tuple[Model, ...] = ()
    preview: Model | None = None
    reference: str | None = None
    batch_size: Annotated[int, Field(strict=True, ge=1)] = 32
    max_prompts: Count | dict[str, Count] | None = field(default=None, hash=False)
    reveal: Flag = False  # show what the judge flags as it is; else it is blurred until one asks
    # Parameters other than the notebooks' own; among them `safety_set` and `benign_set`, the attack
    # that is looked at most closely and the harmless set.
    notebooks: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not is_file_name(self.name):
            raise ValueError(f"name must be that of one folder, not {self.name!r}")
        if strange := self.sampling.keys() - SAMPLING.keys():
            raise unknown("sampling setting", min(strange), SAMPLING)
        self.prompt_set(self.notebooks.get("safety_set", "implicit"))
        self.prompt_set(self.benign_set)

    @property
    def benign_set(self) -> str:
        return self.notebooks.get("benign_set", "benign")

    def prompt_set(self, name: str | Path) -> str | Path:
        """One of its prompt sets by its name in tables, or a file; a ValueError for another."""
        named = {set_name(source): source for source in self.prompt_sets}
        if set_name(name) not in named and not Path(name).is_file():
            raise unknown(f"prompt set of profile {self.name!r}", str(name), named)
        return named.get(set_name(name), name)


def load_profile(source: str | Path, *, quick: bool = False) -> Profile:
    """A profile by name, or from a YAML file, which may say `extends: <name or file>`; `quick` is
    for a smoke test: 8 prompts of each set, in `runs/<name>-quick`."""
    profile = _load(source, ())
    return replace(profile, name=f"{profile.name}-quick", max_prompts=8) if quick else profile


def _load(source: str | Path, extending: tuple[Path, ...]) -> Profile:
    if (path := Path(source)).suffix not in {".yaml", ".yml"}:
        if source not in profile_names():
            raise unknown("profile", str(source), profile_names())
        path = data_folder() / "profiles" / f"{source}.yaml"
    if path.resolve() in extending:
        raise ValueError(f"profile {path} extends itself")
    data = {"name": path.stem} | read_yaml(path, "profile")
    if base := str(data.pop("extends", "")):
        base = path.parent / base if Path(base).suffix in {".yaml", ".yml"} else base
        data = vars(_load(base, (*extending, path.resolve()))) | data
    return checked(Profile, data, path, "profile", "extends")


def profile_methods(
    profile: Profile, omegas: Sequence[float] = (), names: Iterable[str] | None = None
) -> tuple[Method, ...]:
    """The methods, or those of some names, at every strength, or at `omegas` where it sweeps ω."""
    found = [m for entry in profile.methods for m in _methods(profile, entry, omegas)]
    return tuple(method for method in found if names is None or method.name in names)


def chosen_methods(profile: Profile) -> dict[str, Method]:
    """Method name → the one setting in which it is compared with others: that of the `chosen`
    strength, or the last; of several entries of a name the first that says so."""
    found: dict[str, Method] = {}
    for entry in sorted(profile.methods, key=lambda entry: "chosen" not in entry):
        methods = _methods(profile, entry)
        omega = entry.get("chosen", methods[-1].omega)
        found = {m.name: m for m in methods if m.omega == omega} | found
    return found


def dynamic(profile: Profile, omega: float | None = None, **changes) -> Method:
    """The profile's VL-DNP at its chosen strength, with other arguments of `vldnp.VLDNP`; an
    ablation is `[dynamic(profile, query_steps={"uniform": n}) for n in (1, 2, 5)]`."""
    entry = next((e for e in profile.methods if e["kind"] == "VLDNP"), {"given": {}})
    omega = entry.get("chosen") if omega is None else omega
    given = {"omega": 7.5} | entry["given"] | ({} if omega is None else {"omega": omega}) | changes
    return _methods(profile, {"kind": "VLDNP", "given": given})[-1]


def _methods(profile: Profile, entry: Mapping, omegas: Sequence[float] = ()) -> list[Method]:
    """Those of an entry, one for each strength."""
    given, kind, name = dict(entry["given"]), entry["kind"], entry.get("name")
    swept = given.pop("omega", None)
    swept = omegas or swept if isinstance(swept, list) else [swept]
    levers = {key: given.pop(key) for key in LEVERS if key in given and kind == "VLDNP"}
    if kind == "VLDNP":
        given = {"concepts": profile.concepts, "vlm": profile.vlm} | given
        given["vlm"] = load.load_vlm(given["vlm"])
    try:  # 8 and 8.0 are one setting
        strengths = [{} if omega is None else {"omega": float(omega)} for omega in swept]
        found = [getattr(vldnp, kind)(**given, **strength) for strength in strengths]
    except TypeError as error:
        raise ValueError(f"profile {profile.name!r}: {kind}: {error}") from error
    for lever, said in levers.items():
        found = [LEVERS[lever](method, said) for method in found]
    return [replace(method, name=name or method.name) for method in found]


def profile_study(
    profile: Profile, methods=None, *, name="", part="", prompt_sets=(), max_prompts=None
) -> Study:
    """Methods (all of the profile's) as a study; what is given, as `Study` takes it, replaces the
    profile's own. Its folder is `name`, else it follows from what is given, with `part` in it."""
    study = Study(
        name=name or profile.name,
        methods=profile_methods(profile) if methods is None else tuple(methods),
        prompt_sets=tuple(map(profile.prompt_set, prompt_sets)) or profile.prompt_sets,
        sampling=profile.sampling,
        max_prompts=max_prompts or profile.max_prompts,
        batch_size=profile.batch_size,
        reference=profile.reference,
        reference_sets=(profile.benign_set,),
    )
    if name or (methods is None and not prompt_sets and not max_prompts):
        return study
    said = [[*map(setting_of, study.methods)], list(map(str, study.prompt_sets)), study.max_prompts]
    own = filter(None, [profile.name, part, digest(said)[:6]])
    return replace(study, name="-".join(own))


def parameters(profile, **given) -> SimpleNamespace:
    """A notebook's parameters, converted and checked before any image is made."""
    found = {}
    for name, value in given.items():
        if name not in KINDS:
            raise unknown("notebook parameter", name, KINDS)
        kind, said = KINDS[name], value
        try:
            if isinstance(value, str) and kind is Names:
                said = re.findall(r"[^\s,\[\]\"']+", value)
            elif isinstance(value, str) and kind not in (Text, PromptSet):
                text = f"[{value.strip(' []')}]" if kind in (Numbers, Counts) else value.lower()
                said = json.loads(text)
            found[name] = TypeAdapter(kind).validate_python(said)
        except (ValueError, RecursionError) as error:  # of JSON, too
            must = f"{name} must be {get_args(kind)[-1]}, not {reprlib.repr(value)}"
            raise ValueError(must) from error
        if kind is PromptSet:
            load_prompts(profile.prompt_set(said))
    return SimpleNamespace(**found)
