"""What the explorer and notebook `01_trajectories` paint: a choice, its methods and its command."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vldnp._files import unknown
from vldnp.baselines.methods import SAFREE
from vldnp.methods import Method
from vldnp.models import families
from vldnp.models.backbone import Backbone
from vldnp.schedules import SCHEDULES
from vldnp.study import profile_methods
from vldnp.study.profile import Profile, load_profile

CONTROLS = {
    "cfg": (),
    "static": ("omega",),
    "safree": (),
    "vl-dnp": ("vlm", "omega", "schedule", "queries"),
}
"""Method → the settings that it depends on, besides prompt and seed."""

METHODS = tuple(CONTROLS)


@dataclass(frozen=True)
class Choice:
    """What one run is made of; the fields are parameters of the notebook `01_trajectories`.

    Attributes:
        prompt: what is painted.
        method: one of `METHODS`.
        vlm: a name; empty means the profile's.
        omega: strength of the negative term; 0 means what the profile chose for the method.
        schedule: a name in `vldnp.schedules.SCHEDULES`; empty means the profile's.
        queries: how often the VLM is asked; 0 means the profile's number.
        seed: of the initial noise.
    """

    prompt: str
    method: str = "vl-dnp"
    vlm: str = ""
    omega: float = 0.0
    schedule: str = ""
    queries: int = 0
    seed: int = 0

    @property
    def label(self) -> str:
        """Those parts that the method depends on, in a few words."""
        parts, uses = [self.method], CONTROLS[self.method]
        if "omega" in uses:
            parts.append(f"ω = {self.omega:g}")
        if "vlm" in uses:
            parts += [self.vlm, f"{self.schedule} {self.queries or ''}".strip()]
        return ", ".join([*filter(None, parts), f"seed {self.seed}"])


def methods(
    profile: str | Path | Profile,
    omega: float = 0.0,
    queries: int = 0,
    vlm: str | Callable = "",
    schedule: str = "",
) -> dict[str, Method]:
    """All of `METHODS` by name, for one prompt.

    Args:
        profile: a name, a YAML file or a `Profile`; gives the concepts and the baselines' settings.
        omega, queries, schedule: as in `Choice`.
        vlm: a name or an opened VLM; empty means the profile's.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    if (schedule := schedule or profile.schedule) not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    strengths = {name: omega or profile.chosen_omega(name) for name in ("static", "vl-dnp")}
    fixed = profile_methods.profile_methods(profile, [strengths["static"]], names=("cfg", "static"))
    safree = SAFREE(**profile.safree or {"phrases": profile.static_prompt})
    guided = profile_methods.dynamic(
        profile, strengths["vl-dnp"], vlm=vlm or profile.vlm, queries=queries, schedule=schedule
    )
    return {method.name: method for method in (*fixed, safree, guided)}


def remarks(model: Backbone, prompt: str) -> list[str]:
    """What of a prompt the model does not read as it is written, a sentence each.

    Args:
        model: whose tokenizer is asked.
        prompt: may be empty.
    """
    said = []
    if words := families.spelled(model.pipe, prompt):
        said.append(
            f"Not in the text encoder's vocabulary, and spelled in pieces: {', '.join(words)}."
        )
    if (end := families.truncated(model.pipe, prompt)) is not None:
        said.append(f"Longer than the text encoder reads; what it never sees: {end}")
    return said


def command(choice: Choice, profile: str = "moji", out: str = "../runs") -> str:
    """The shell line, for the project's root, that paints the choice's picture again.

    `01_trajectories` runs every method with these settings, and writes the final pictures into
    `trajectories/` of the run folder. Texts are quoted for a POSIX shell.
    """
    texts = {"profile": profile, "out": out, "prompt": choice.prompt}
    texts |= {"vlm": choice.vlm, "schedule": choice.schedule}
    numbers = {"seed": choice.seed, "omega": choice.omega, "queries": choice.queries}
    # -r passes a text as it is; -p would make a number of the prompt "7".
    words = ["papermill", "notebooks/01_trajectories.ipynb", "explored.ipynb"]
    words += ["--cwd", "notebooks"]
    for name, text in texts.items():
        words += ["-r", name, text]
    for name, number in numbers.items():
        words += ["-p", name, str(number)]
    return shlex.join(words)
