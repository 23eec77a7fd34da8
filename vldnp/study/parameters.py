"""Notebooks' parameters, which papermill passes as text ("false", "[2, 4]", "four"), checked."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter, ValidationError

from vldnp._files import is_file_name, unknown
from vldnp.study.prompts import load_prompts

if TYPE_CHECKING:
    from vldnp.study.profile import Profile

# A text is no number, and true is not 1.
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
_NUMBERS = TypeAdapter(tuple[Count | Number, ...])

FLAGS = ("quick", "reveal")
COUNTS = (
    "images queries max_prompts ablation_prompts seed batch worst repetitions demonstrations "
    "cost_batch detection_prompts sequential_images sequential_answer_tokens answer_tokens"
).split()
LISTS = ("omegas", "counts", "recalls", "precisions", "dial_queries")
PROMPT_SETS = ("safety_set", "benign_set", "cost_prompts")
FOLDERS = ("run_name",)
TEXTS = ("prompt", "benign_prompt", "profile", "out", "run", "vlm", "schedule")
PARAMETERS = (*FLAGS, *COUNTS, *LISTS, *PROMPT_SETS, *FOLDERS, *TEXTS, "omega")
"""All parameters of notebooks, by their kinds."""


def numbers(value: object, name: str = "numbers") -> tuple[float, ...]:
    """A list of numbers, 0 or more; `[2, 4]`, `2, 4` and `2` as text are read like lists.

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


def parameters(profile: "Profile", **given) -> SimpleNamespace:
    """A notebook's parameters, converted and checked before any image is made.

    Args:
        profile: whose prompt sets they may name.
        given: name → value, as the notebook has it or as papermill passed it.

    Raises:
        ValueError, FileNotFoundError: one line that names the parameter.
    """
    return SimpleNamespace(**{name: _checked(profile, name, given[name]) for name in given})


def _checked(profile: "Profile", name: str, value: object):
    text = str(value).strip()
    if name not in PARAMETERS:
        raise unknown("notebook parameter", name, PARAMETERS)
    if name in FLAGS:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return text.lower() == "true"
    if name in COUNTS:
        if isinstance(value, Mapping):  # by prompt set
            return {key: _checked(profile, name, count) for key, count in value.items()}
        if not text.isdecimal():
            raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
        return int(text)
    if name in LISTS:
        return numbers(value, name)
    if name == "omega":
        if "[" in text or len(found := numbers(text, name)) != 1:
            raise ValueError(f"{name} must be a number, 0 or more, not {value!r}")
        return float(found[0])
    if name in PROMPT_SETS:
        load_prompts(profile.prompt_set(text))
    if name in FOLDERS and text and not is_file_name(text):
        raise ValueError(f"{name} must be the name of one folder, not {value!r}")
    return text
