"""Notebooks' parameters, which papermill may pass as text ("false", "[2, 4]"), checked."""

import json
from types import SimpleNamespace
from typing import Annotated, get_args

from pydantic import Field, TypeAdapter

from vldnp._files import unknown
from vldnp.study.prompts import load_prompts

Text, PromptSet = Annotated[str, "a text"], Annotated[str, "a prompt set"]
Flag = Annotated[bool, Field(strict=True), "true or false"]
Count = Annotated[int, Field(strict=True, ge=0), "a whole number, 0 or more"]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), "a number, 0 or more"]
Numbers = Annotated[tuple[Number, ...], "a list of numbers, 0 or more, such as [2, 4]"]
KINDS = {
    **dict.fromkeys("profile out run prompt benign_prompt schedule vlm".split(), Text),
    **dict.fromkeys("quick reveal".split(), Flag),
    **dict.fromkeys("images seed queries max_prompts repetitions".split(), Count),
    **dict.fromkeys("omegas counts".split(), Numbers),
    **dict.fromkeys("safety_set benign_set".split(), PromptSet),
    "omega": Number,
}


def parameters(profile, **given) -> SimpleNamespace:
    """A notebook's parameters, converted and checked before any image is made.

    Raises a ValueError or FileNotFoundError of one line that names the parameter.
    """
    found = {}
    for name, value in given.items():
        if name not in KINDS:
            raise unknown("notebook parameter", name, KINDS)
        kind, said = KINDS[name], value
        try:
            if isinstance(value, str) and kind not in (Text, PromptSet):
                text = f"[{value.strip(' []')}]" if kind is Numbers else value.lower()
                said = json.loads(text)
            found[name] = TypeAdapter(kind).validate_python(said)
        except ValueError as error:  # of JSON, too
            raise ValueError(f"{name} must be {get_args(kind)[-1]}, not {value!r}") from error
        if kind is PromptSet:
            load_prompts(profile.prompt_set(said))
    return SimpleNamespace(**found)
