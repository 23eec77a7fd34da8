"""The negative term of a run: which images it acts on in a step, and what it remembers of each."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from vldnp.core import guidance
from vldnp.core.methods import Method
from vldnp.core.negatives import Negative


class Steering:
    """Images' negative prompts, as a method lets them act on the prediction.

    Args:
        method: the rule, ω, and for how many steps ε_n − ε_u is used again.
        negatives: in force before the first step, one per image.
        latents: `[B, C, h, w]`, as all predictions.
        guidance_scale: g, `[B, 1, 1, 1]`.
        num_inference_steps: N.
    """

    def __init__(
        self,
        method: Method,
        negatives: Sequence[Negative],
        latents: Tensor,
        guidance_scale: Tensor,
        num_inference_steps: int,
    ):
        self.method, self.negatives, self.N = method, list(negatives), num_inference_steps
        self.g, self.rule = guidance_scale, guidance.rule(method.rule)
        precise = torch.promote_types(latents.dtype, torch.float32)
        self.state = torch.zeros_like(latents, dtype=precise)
        self.difference = torch.zeros_like(latents)  # ε_n − ε_u as last evaluated, and when
        self.evaluated = [-inf] * len(self.negatives)

    def use(self, negatives: Sequence[Negative]) -> None:
        """These are in force from now on; of another prompt nothing is used again."""
        for row, (old, new) in enumerate(zip(self.negatives, negatives, strict=True)):
            if old.prompt != new.prompt:
                self.evaluated[row] = -inf
        self.negatives = list(negatives)

    def rows(self) -> list[int]:
        """The images that have a negative prompt."""
        return [row for row, negative in enumerate(self.negatives) if negative.prompt is not None]

    def outdated(self, i: int) -> list[int]:
        """Those of them whose ε_n has to be evaluated at step i; all, unless it is reused."""
        return [row for row in self.rows() if i - self.evaluated[row] > self.method.reuse]

    def away(
        self,
        i: int,
        pred: Tensor,
        pred_uncond: Tensor,
        pred_cond: Tensor,
        pred_neg: Tensor,
        evaluated: Sequence[int],
    ) -> Tensor:
        """ε from ε_cfg, by the method's rule.

        Args:
            pred, pred_uncond, pred_cond: ε_cfg, ε_u and ε_c of all images.
            pred_neg: ε_n of the images `evaluated`. For the others ε_u + (ε_n − ε_u) stands for
                it, with the difference of the last step in which it was evaluated.
        """
        if not (rows := self.rows()):
            return pred
        neg = pred_uncond + self.difference
        neg[evaluated] = pred_neg
        self.difference[evaluated] = pred_neg - pred_uncond[evaluated]
        for row in evaluated:
            self.evaluated[row] = i
        pred = pred.clone()
        pred[rows], self.state[rows] = self.rule.step(
            pred_uncond[rows],
            pred_cond[rows],
            neg[rows],
            self.g[rows],
            self.method.omega,
            self.state[rows],
            i / self.N,
        )
        return pred
