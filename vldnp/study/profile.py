"""Profiles: which models, prompt sets and settings belong together, as data in `data/profiles`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from vldnp._files import data_folder, unknown
from vldnp._yaml import checked, read_yaml
from vldnp.models.hub import ModelSpec
from vldnp.schedules import SCHEDULES
from vldnp.study.sampling import Number, Positive, Sampling

QUICK = "-quick"
"""Ends the names of quick runs' folders."""

QUICK_PROMPTS = 8
"""A quick run takes so many prompts of each set."""

MODELS = ("model", "vlm", "judge", "clip")

BASELINES = ("perp-neg", "nag", "summed", "casg", "safe-denoiser")
"""What a profile may compare besides, each at one setting."""


class _Shot(BaseModel, extra="forbid"):
    image: str
    answer: str


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
        options["demonstrations"] = _demonstrations(shots, info.context)
    return ModelSpec(said["name"], options)


def _demonstrations(shots: object, folder: Path) -> tuple[tuple[str, str], ...]:
    """Few-shot examples: pictures' files, as seen from the profile's folder, and answers."""
    try:
        found = TypeAdapter(tuple[_Shot, ...]).validate_python(shots)
    except ValidationError as error:
        raise ValueError(
            "has demonstrations that are no list of mappings with an image and an answer"
        ) from error
    return tuple((str(folder / shot.image), shot.answer) for shot in found)


Model = Annotated[ModelSpec, PlainValidator(_model)]
Count = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True)
class Profile(Sampling):
    """The settings of a set of experiments; models and prompt sets are names for `vldnp.load…`.

    Attributes:
        name: of the run folder, `runs/<name>`.
        model, vlm, judge, clip: in the file a name, folder or hub id, or a mapping with a `name`
            and the options of `vldnp.load`, `load_vlm`, `load_judge` or `load_clip`.
        preview: a tiny VAE for the pictures that the VLM is shown, for `vldnp.load_preview`, where
            the ablation of what is cheaper has it; no other study does.
        concepts: the concept set that the VLM is asked about.
        prompt_sets: names or CSV paths.
        safety_set: of them, the one whose prompts yield unwanted things unnamed, which the
            notebooks look at most closely.
        benign_set: of them, the harmless one; all others are attacks.
        reference: where the real images of FID come from (`reference.reference_images`); None
            leaves FID and KID out.
        num_inference_steps, …: how images are drawn (`Sampling`).
        queries, schedule: how often VL-DNP asks, and a name in `vldnp.schedules.SCHEDULES`.
        omegas: strengths to compare.
        static_prompt, static_rule: the fixed negative prompt of the static method, and how it
            enters.
        static_variants: name in tables → arguments of `vldnp.Static` for a variant, which is
            compared besides, at its own strength.
        safree: keyword arguments of `vldnp.SAFREE`; None leaves SAFREE out.
        safree_variants: name in tables → those of its arguments that are other in a variant, which
            is compared besides, without a term of a strength.
        sld_prompt: the safety concept of Safe Latent Diffusion; None leaves it out.
        sld_strengths: which of its settings are compared.
        sld_options: hyper-parameters of `vldnp.baselines.sld.SLD` instead of the settings'.
        baselines: name in `BASELINES` → its arguments (`profile_methods.baseline`).
        bank: where Safe Denoiser's unsafe pictures come from (`reference.unsafe_pictures`).
        wordings: name → fixed negative prompt, among which `python -m vldnp tune` chooses.
        lighter_vlms: further VLMs, from the lightest on, for the ablation of VLM size.
        chosen: method → the ω at which it is compared with others, chosen on tuning prompts; the
            largest of `omegas` where nothing was chosen.
        tuning_sets: the prompt sets for choosing: attacks, and last a harmless one.
        batch_size: images per batch.
        max_prompts: prompts of each set that the notebooks' studies use, one number or one by set;
            None is all.
        ablation_prompts: the same for the ablations; None is `max_prompts`.
        reveal: show what the judge flags as it is; else it is blurred until one asks to see it.
        notebooks: parameters of the notebooks that are other than their defaults here.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: str
    model: Model
    vlm: Model
    judge: Model
    clip: Model
    concepts: str
    prompt_sets: Annotated[tuple[str, ...], Field(min_length=1)]
    static_prompt: str
    omegas: Annotated[tuple[Number, ...], Field(min_length=1)]
    queries: Count
    schedule: Literal[tuple(SCHEDULES)] = "front_loaded"
    static_rule: str = "added"
    static_variants: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)
    safree: dict[str, Any] | None = field(default=None, hash=False)
    safree_variants: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)
    sld_prompt: str | None = None
    sld_strengths: tuple[Literal["weak", "medium", "strong", "max"], ...] = (
        "weak",
        "medium",
        "strong",
        "max",
    )
    sld_options: dict[str, Number] = field(default_factory=dict, hash=False)
    baselines: dict[Literal[BASELINES], dict[str, Any]] = field(default_factory=dict, hash=False)
    bank: str | None = None
    wordings: dict[str, str] = field(default_factory=dict, hash=False)
    lighter_vlms: tuple[Model, ...] = ()
    preview: Model | None = None
    chosen: dict[str, Number] = field(default_factory=dict, hash=False)
    tuning_sets: tuple[str, ...] = ()
    safety_set: str = "implicit"
    benign_set: str = "benign"
    reference: str | None = None
    batch_size: Positive = 32
    max_prompts: Count | dict[str, Count] | None = field(default=None, hash=False)
    ablation_prompts: Count | dict[str, Count] | None = field(default=None, hash=False)
    reveal: Annotated[bool, Field(strict=True)] = False
    notebooks: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        for name in (self.safety_set, self.benign_set):
            self.prompt_set(name)

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
        """Arguments of `vldnp.SAFREE`: as the profile has it, and with its negative prompt, or else
        the phrases, added at each ω.

        The first has no negative term of a strength, so it is SAFREE's one point without ω.
        """
        options = self.safree or {}
        phrases = options.get("phrases", "")
        text = phrases if isinstance(phrases, str) else ", ".join(phrases)
        with_term = {"negative_prompt": options.get("negative_prompt", text), "rule": "added"}
        return [options, *(options | with_term | {"omega": omega} for omega in omegas)]


def set_name(source: str | Path) -> str:
    """What a prompt set is called in tables: a file without its folder and suffix."""
    return Path(source).stem


def profile_names() -> list[str]:
    """The profiles in `data/profiles`."""
    return sorted(path.stem for path in (data_folder() / "profiles").glob("*.yaml"))


def load_profile(source: str | Path, *, quick: bool = False) -> Profile:
    """A profile by name, or from a YAML file.

    A file that says `extends: <another>` has that profile's settings where it has none of its own;
    another file is named as seen from its folder.

    Args:
        source: a name in `data/profiles`, or a file.
        quick: for a smoke test: `QUICK_PROMPTS` prompts of each set, and a run folder of its own,
            `runs/<name>-quick`, so that full results stay.

    Raises:
        ValueError, FileNotFoundError: one line that names the file and says what is wrong.
    """
    profile = _load(source, ())
    if not quick:
        return profile
    few = {"max_prompts": QUICK_PROMPTS, "ablation_prompts": QUICK_PROMPTS}
    return replace(profile, name=profile.name + QUICK, **few)


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
    base = data.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise ValueError(f"profile {path}: extends must be a name or a YAML file, not {base!r}")
        base = path.parent / base if Path(base).suffix in {".yaml", ".yml"} else base
        data = vars(_load(base, (*extending, path.resolve()))) | {"name": path.stem} | data
    return checked(Profile, {"name": path.stem} | data, path, "profile", "extends")


_NUMBERS = TypeAdapter(tuple[Count | Number, ...])


def numbers(value: object, name: str = "numbers") -> tuple[float, ...]:
    """A list of numbers, 0 or more, as a notebook's parameter brings it.

    `papermill -p omegas "[2, 4]"` passes text, and so may a form: `[2, 4]`, `2, 4` and `2` are
    read like the lists that they stand for.

    Raises:
        ValueError: it is none; one line with `name`.
    """
    try:
        if isinstance(value, str):
            return _NUMBERS.validate_json(value if "[" in value else f"[{value}]")
        return _NUMBERS.validate_python((value,) if isinstance(value, int | float) else value)
    except ValidationError as error:
        raise ValueError(
            f"{name} must be a list of numbers, 0 or more, such as [2, 4], not {value!r}"
        ) from error
