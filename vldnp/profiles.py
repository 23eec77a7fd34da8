"""Profiles: which models, prompt sets and settings belong together, as data in `data/profiles`."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from vldnp.files import data_folder, unknown


@dataclass(frozen=True)
class Profile:
    """The settings of a set of experiments; models and prompt sets are names for `vldnp.load…`.

    Attributes:
        name: of the run folder, `runs/<name>`.
        model, vlm, judge, clip: names, folders or hub ids.
        concepts: the concept set that the VLM is asked about.
        prompt_sets: names or CSV paths.
        reference: where the real images of FID come from; None leaves FID and KID out.
        num_inference_steps, guidance_scale, scheduler: as in `vldnp.sample`.
        queries: how often VL-DNP asks, front-loaded.
        omegas: strengths to compare.
        static_prompt: the fixed negative prompt of the static method.
        batch_size: images per batch.
        max_prompts: prompts of each set that the notebooks' studies use; None is all.
        reveal: show what the judge flags as it is; else it is blurred until one asks to see it.
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
    scheduler: str | None = None
    reference: str | None = None
    batch_size: int = 32
    max_prompts: int | None = None
    reveal: bool = False

    @property
    def sampling(self) -> dict:
        """The keyword arguments of `vldnp.sample` that the profile fixes."""
        names = ("num_inference_steps", "guidance_scale", "scheduler")
        return {name: getattr(self, name) for name in names}


def profile_names() -> list[str]:
    """The profiles in `data/profiles`."""
    return sorted(path.stem for path in (data_folder() / "profiles").glob("*.yaml"))


def load_profile(source: str | Path) -> Profile:
    """A profile by name, or from a YAML file.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong.
    """
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
    data = {"name": path.stem, **data}
    known = {field.name for field in fields(Profile)}
    if extra := data.keys() - known:
        raise unknown(f"setting in profile {path.name}", sorted(extra)[0], known)
    for setting in ("prompt_sets", "omegas"):
        if not isinstance(data.get(setting, []), list):
            raise ValueError(f"profile {path.name}: {setting} must be a list")
        data[setting] = tuple(data.get(setting, ()))
    try:
        return Profile(**data)
    except TypeError as error:  # Python's own words name the missing settings
        lacking = str(error).partition("missing")[2]
        raise ValueError(f"profile {path.name} is missing{lacking}") from error
