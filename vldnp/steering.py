"""The negative term of a run: which images it acts on in a step, and what it remembers of each."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from vldnp import guidance
from vldnp.methods import Method
from vldnp.models.conditioning import Conditioning
from vldnp.models.run import Run
from vldnp.negatives import Negative


class Steering:
    """Images' negative prompts, as a method lets them act on the prediction.

    Args:
        method: the rule, ω(t), and for how many steps ε_n − ε_u is used again.
        run: for x̂₀ and the noise levels.
        negatives: in force before the first step, one per image.
        latents: `[B, C, h, w]`, as all predictions.
        guidance_scale: g, `[B, 1, 1, 1]`.
    """

    def __init__(
        self,
        method: Method,
        run: Run,
        negatives: Sequence[Negative],
        latents: Tensor,
        guidance_scale: Tensor,
    ):
        self.method, self.run, self.N = method, run, len(run.timesteps)
        self.negatives = list(negatives)
        self.g, self.rule = guidance_scale, guidance.rule(method.rule)
        precise = torch.promote_types(latents.dtype, torch.float32)
        self.state = torch.zeros_like(latents, dtype=precise)
        self.prior = getattr(method.omega_schedule, "prior", None)
        self.posterior = torch.full_like(self.g, self.prior or 0, dtype=precise)
        self.difference = torch.zeros_like(latents)  # ε_n − ε_u as last evaluated, and when
        self.evaluated = [-inf] * len(self.negatives)

    def use(self, negatives: Sequence[Negative]) -> None:
        """These are in force from now on; what was known of another prompt is forgotten."""
        for row, (old, new) in enumerate(zip(self.negatives, negatives, strict=True)):
            if old.prompt != new.prompt:
                self.evaluated[row] = -inf
                self.posterior[row] = self.prior or 0
        self.negatives = list(negatives)

    def omega(self, i: int) -> float | Tensor | None:
        """ω(t) at step i: a number, or `[B, 1, 1, 1]`; None where the rule has none."""
        omega, schedule = self.method.omega, self.method.omega_schedule
        if schedule is None:
            return omega
        return omega * schedule.factor(i / self.N, self.posterior)

    def rows(self, i: int) -> list[int]:
        """The images that have a negative prompt; none of them where ω(t) is 0."""
        omega = self.omega(i)
        if self.rule.uses_omega and not isinstance(omega, Tensor) and omega == 0:
            return []
        return [row for row, negative in enumerate(self.negatives) if negative.prompts]

    def needing_uncond(self, i: int) -> list[int]:
        """Those of them that are steered with ε_u."""
        needs = getattr(self.rule, "uses_uncond", True)
        return [row for row in self.rows(i) if needs or self.g[row] != 1]

    def outdated(self, i: int) -> list[int]:
        """Those of them whose ε_n has to be evaluated at step i; all, unless it is reused."""
        return [row for row in self.rows(i) if i - self.evaluated[row] > self.method.reuse]

    def conditioning(self, rows: Sequence[int], cond: Conditioning, i: int) -> Conditioning:
        """What ε_n of these images is told at step i, a row for each of their negative prompts.

        Args:
            cond: the prompts of all images.
        """
        each = [(row, text) for row in rows for text in self.negatives[row].prompts]
        negative = self.run.encode([text for _, text in each])
        if not hasattr(self.rule, "conditioning"):
            return negative
        return self.rule.conditioning(cond[[row for row, _ in each]], negative, self.omega(i))

    def evaluations(self, row: int) -> int:
        """How many ε_n of this image takes."""
        return len(self.negatives[row].prompts) * getattr(self.rule, "evaluations", 1)

    def away(
        self,
        i: int,
        latents: Tensor,
        pred: Tensor,
        pred_uncond: Tensor,
        pred_cond: Tensor,
        pred_neg: Tensor,
        evaluated: Sequence[int],
    ) -> Tensor:
        """ε from ε_cfg, by the method's rule.

        Args:
            latents: x_t.
            pred, pred_uncond, pred_cond: ε_cfg, ε_u and ε_c of all images.
            pred_neg: ε_n of the images `evaluated`, K of each where K negative prompts are in
                force. For the others ε_u + (ε_n − ε_u) stands for it, with the difference of the
                last step in which it was evaluated.
        """
        if not (rows := self.rows(i)):
            return pred
        if self.method.reuse:
            neg = self._with_reused(i, pred_uncond, pred_neg, evaluated)[rows]
        elif len(pred_neg) > len(rows):  # several each
            neg = pred_neg.unflatten(0, (len(rows), -1))
        else:
            neg = pred_neg
        omega, pred = self.omega(i), pred.clone()
        pred[rows], self.state[rows] = self.rule.step(
            pred_uncond[rows],
            pred_cond[rows],
            neg,
            self.g[rows],
            omega[rows].to(pred.dtype) if isinstance(omega, Tensor) else omega,
            self.state[rows],
            i / self.N,
        )
        if self.prior is not None and i + 1 < self.N:
            t = self.run.timesteps[i]
            self.posterior[rows] = self.method.omega_schedule.updated(
                self.posterior[rows],
                *(self.run.x0(p, t, latents[rows]) for p in (pred[rows], neg, pred_uncond[rows])),
                self.run.snr(i),
                self.run.snr(i + 1),
            )
        return pred

    def _with_reused(
        self, i: int, pred_uncond: Tensor, pred_neg: Tensor, evaluated: Sequence[int]
    ) -> Tensor:
        """ε_n of all images, where it is not evaluated from ε_n − ε_u as last evaluated."""
        neg = pred_uncond + self.difference
        neg[evaluated] = pred_neg
        self.difference[evaluated] = pred_neg - pred_uncond[evaluated]
        for row in evaluated:
            self.evaluated[row] = i
        return neg
