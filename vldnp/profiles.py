"""Profiles: which models, prompt sets and settings belong together, as data in `data/profiles`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from vldnp.files import data_folder, unknown

QUICK = "-quick"
"""Ends the names of quick runs' folders."""

QUICK_PROMPTS = 8
"""A quick run takes so many prompts of each set."""

MODELS = ("model", "vlm", "judge", "clip")


class ModelName(str):
    """A model's name, folder or hub id with the options that it is opened with.

    It is a text, so it serves wherever a name does; `vldnp.load`, `load_vlm`, `load_judge` and
    `load_clip` read its `options`.
    """

    options: dict

    def __new__(cls, name: str, options: Mapping):
        made = super().__new__(cls, name)
        made.options = dict(options)
        return made

    def __getnewargs__(self):
        return str(self), self.options


@dataclass(frozen=True)
class Profile:
    """The settings of a set of experiments; models and prompt sets are names for `vldnp.load…`.

    Attributes:
        name: of the run folder, `runs/<name>`.
        model, vlm, judge, clip: names, folders or hub ids; in the file also a mapping with a
            `name` and the options of `vldnp.load`, `load_vlm`, `load_judge` or `load_clip`.
        concepts: the concept set that the VLM is asked about.
        prompt_sets: names or CSV paths.
        safety_set: of them, the one whose prompts yield unwanted things unnamed, which the
            notebooks look at most closely.
        benign_set: of them, the harmless one; all others are attacks.
        reference: where the real images of FID come from (`vldnp.zoo.reference_images`); None
            leaves FID and KID out.
        num_inference_steps, guidance_scale, scheduler, height, width: as in `vldnp.sample`. A
            prompt that brings its own guidance scale has that one.
        queries, schedule: how often VL-DNP asks, and a name in `vldnp.schedules.SCHEDULES`.
        omegas: strengths to compare.
        static_prompt, static_rule: the fixed negative prompt of the static method, and how it
            enters.
        safree: keyword arguments of `vldnp.SAFREE`; None leaves SAFREE out.
        sld_prompt: the safety concept of Safe Latent Diffusion; None leaves it out.
        sld_strengths: which of its settings are compared.
        wordings: name → fixed negative prompt, among which `python -m vldnp tune` chooses.
        lighter_vlms: further VLMs, from the lightest on, for the ablation of VLM size.
        chosen: method → the ω at which it is compared with others, chosen on tuning prompts; the
            largest of `omegas` where nothing was chosen.
        tuning_sets: the prompt sets for choosing: one that yields unwanted things, one harmless.
        batch_size: images per batch.
        max_prompts: prompts of each set that the notebooks' studies use, one number or one by set;
            None is all.
        ablation_prompts: the same for the ablations; None is `max_prompts`.
        reveal: show what the judge flags as it is; else it is blurred until one asks to see it.
        notebooks: parameters of the notebooks that are other than their defaults here.
    """

    name: str
    model: str
    vlm: str
    judge: str
    clip: str
    concepts: str
    prompt_sets: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    static_prompt: str
    omegas: tuple[float, ...]
    queries: int
    schedule: str = "front_loaded"
    static_rule: str = "added"
    safree: dict | None = field(default=None, hash=False)
    sld_prompt: str | None = None
    sld_strengths: tuple[str, ...] = ("weak", "medium", "strong", "max")
    wordings: dict[str, str] = field(default_factory=dict, hash=False)
    lighter_vlms: tuple[str, ...] = ()
    chosen: dict[str, float] = field(default_factory=dict, hash=False)
    tuning_sets: tuple[str, ...] = ()
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    safety_set: str = "implied"
    benign_set: str = "benign"
    reference: str | None = None
    batch_size: int = 32
    max_prompts: int | dict[str, int] | None = field(default=None, hash=False)
    ablation_prompts: int | None = None
    reveal: bool = False
    notebooks: dict = field(default_factory=dict, hash=False)

    @property
    def sampling(self) -> dict:
        """The keyword arguments of `vldnp.sample` that the profile fixes."""
        names = ("num_inference_steps", "guidance_scale", "scheduler")
        size = {name: getattr(self, name) for name in ("height", "width") if getattr(self, name)}
        return {name: getattr(self, name) for name in names} | size

    @property
    def notebook_parameters(self) -> dict:
        """What the notebooks are given for those of these parameters that they declare."""
        return {"safety_set": self.safety_set, "benign_set": self.benign_set, **self.notebooks}

    def prompt_set(self, name: str | Path) -> str | Path:
        """One of its prompt sets by the name it has in tables, as `load_prompts` takes it.

        Raises:
            ValueError: the profile has none of that name, and it is no file; one line.
        """
        named = {set_name(source): source for source in (*self.tuning_sets, *self.prompt_sets)}
        if set_name(name) not in named and not Path(name).is_file():
            raise unknown(f"prompt set of profile {self.name!r}", str(name), map(str, named))
        return named.get(set_name(name), name)

    def chosen_omega(self, method: str) -> float:
        """The strength at which a method is compared with others."""
        return float(self.chosen.get(method, max(self.omegas)))

    def safree_settings(self, omegas: Sequence[float]) -> list[dict]:
        """Arguments of `vldnp.SAFREE`: as the profile has it, and with the phrases added at each ω.

        The first has no negative term of a strength, so it is SAFREE's one point without ω.
        """
        options = self.safree or {}
        phrases = options.get("phrases", "")
        text = phrases if isinstance(phrases, str) else ", ".join(phrases)
        with_term = {"negative_prompt": text, "rule": "added"}
        return [options, *(options | with_term | {"omega": omega} for omega in omegas)]


def set_name(source: str | Path) -> str:
    """What a prompt set is called in tables: a file without its folder and suffix."""
    return Path(source).stem


def profile_names() -> list[str]:
    """The profiles in `data/profiles`."""
    return sorted(path.stem for path in (data_folder() / "profiles").glob("*.yaml"))


def _extended(data: dict) -> dict:
    """The settings over those of the profile that they extend, if they name one."""
    own = dict(data)
    base = own.pop("extends", None)
    return own if base is None else vars(load_profile(base)) | own


def load_profile(source: str | Path, *, quick: bool = False) -> Profile:
    """A profile by name, or from a YAML file.

    A file that says `extends: <another>` has that profile's settings where it has none of its own.

    Args:
        source: a name in `data/profiles`, or a file.
        quick: for a smoke test: `QUICK_PROMPTS` prompts of each set, and a run folder of its own,
            `runs/<name>-quick`, so that full results stay.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong.
    """
    if quick:
        full = load_profile(source)
        few = {"max_prompts": QUICK_PROMPTS, "ablation_prompts": QUICK_PROMPTS}
        return replace(full, name=full.name + QUICK, **few)
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"}:
        if source not in profile_names():
            raise unknown("profile", str(source), profile_names())
        path = data_folder() / "profiles" / f"{source}.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"profile {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"profile {path} must be a mapping of settings")
    data = {**_extended(data), "name": data.get("name", path.stem)}
    known = {field.name for field in fields(Profile)}
    if extra := data.keys() - known:
        raise unknown(f"setting in profile {path.name}", sorted(extra)[0], known)
    for setting in ("prompt_sets", "omegas", "lighter_vlms", "tuning_sets", "sld_strengths"):
        if not isinstance(data.get(setting, []), list | tuple):
            raise ValueError(f"profile {path.name}: {setting} must be a list")
        if isinstance(data.get(setting), list):
            data[setting] = tuple(data[setting])
    for kind in MODELS:
        if kind in data:
            data[kind] = _model(data[kind], kind, path)
    data["lighter_vlms"] = tuple(
        _model(vlm, "lighter_vlms", path) for vlm in data.get("lighter_vlms", ())
    )
    try:
        return Profile(**data)
    except TypeError as error:  # Python's own words name the missing settings
        lacking = str(error).partition("missing")[2]
        raise ValueError(f"profile {path.name} is missing{lacking}") from error


def _model(said, setting: str, path: Path) -> str:
    """A model as the file has it: a name, or a mapping of a name and options."""
    if isinstance(said, str):
        return said
    if not isinstance(said, Mapping) or not isinstance(said.get("name"), str):
        raise ValueError(
            f"profile {path.name}: {setting} must be a name, or a mapping with a name and options, "
            f"not {said!r}"
        )
    options = {key: value for key, value in said.items() if key != "name"}
    shots = options.get("demonstrations")
    if shots is not None:
        options["demonstrations"] = _demonstrations(shots, setting, path)
    return ModelName(said["name"], options)


def _demonstrations(shots, setting: str, path: Path) -> tuple[tuple[str, str], ...]:
    """Few-shot examples: pictures' files, as seen from the profile, and answers."""
    if not isinstance(shots, list) or not all(
        isinstance(shot, Mapping) and shot.keys() == {"image", "answer"} for shot in shots
    ):
        raise ValueError(
            f"profile {path.name}: the demonstrations of {setting} must be a list of mappings with "
            "an image and an answer"
        )
    return tuple((str(path.parent / shot["image"]), str(shot["answer"])) for shot in shots)
