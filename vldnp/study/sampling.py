"""How images are drawn whatever the method: what `sample`, studies and profiles have in common."""

from dataclasses import dataclass, fields
from typing import Annotated

from pydantic import Field

# Profiles are read from YAML, which has types of its own: a text is no number here, and true is
# not 1.
Positive = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of a sampling run; what they mean is said at `vldnp.sample`.

    Attributes:
        num_inference_steps: N ≥ 1.
        guidance_scale: g, for the prompts that bring none of their own.
        scheduler: a name; None is the model's own scheduler.
        height, width: in pixels; None is the model's own size.
        noise_device: where the noise of a seed is drawn.
    """

    num_inference_steps: Positive = 50
    guidance_scale: Number = 7.5
    scheduler: str | None = None
    height: Positive | None = None
    width: Positive | None = None
    noise_device: str = "cpu"

    @property
    def sampling(self) -> dict:
        """The keyword arguments of `vldnp.sample` that these settings fix."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        optional = {"height": None, "width": None, "noise_device": "cpu"}
        return {k: v for k, v in chosen.items() if k not in optional or v != optional[k]}
