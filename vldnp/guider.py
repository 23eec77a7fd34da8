"""A method applied to a batch: which branches a step evaluates, and how they combine."""

from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from PIL import Image
from torch import Tensor

from vldnp import guidance
from vldnp._finite import naming
from vldnp.batch import Batch
from vldnp.methods import Method
from vldnp.models.backbone import to_pil, to_uint8
from vldnp.models.conditioning import Conditioning
from vldnp.models.run import Run
from vldnp.negatives import Negative

Branches = dict[str, tuple[list[int], Conditioning]]  # name → (images, their conditioning)
Preds = dict[str, tuple[list[int], Tensor]]  # name → (images, their predictions)


def guider(method: Method, run: Run, batch: Batch) -> "Guider":
    """The method's Guider: `Guider`, as the method's levers extend it."""
    kind = Guider
    for lever in method.levers:
        kind = lever.guider(kind)
    return kind(method, run, batch)


class Guider:
    """The negative prompts of a batch and their part in the prediction. A lever is a subclass that
    evaluates or combines branches in another way."""

    def __init__(self, method: Method, run: Run, batch: Batch):
        self.method, self.run, self.batch, self.rule = method, run, batch, method.rule
        self.images, self.N = list(range(len(batch.prompts))), len(run.timesteps)
        like = {"dtype": run.backbone.dtype, "device": run.backbone.device}
        self.g = torch.tensor(batch.guidance_scales, **like).view(-1, 1, 1, 1)
        self.query_steps = method.negatives.query_steps_of(run.num_inference_steps)
        self.null = run.null_conditioning(len(self.images))
        self.prompted = method.conditioning.begin(run, batch.prompts)  # step index → conditioning
        self.negatives: list[Negative] = method.negatives.initial(batch.prompts, batch.seeds)
        self.state: Tensor | None = None  # the rule's, such as SLD's momentum
        self.memory: dict = {}  # a policy's

    def omega(self, i: int) -> float | None:
        """ω at step i; None where the rule has none."""
        return self.method.omega

    def steered(self, i: int) -> list[int]:
        """The images that have a negative prompt now; none where ω is 0."""
        return [row for row in self.images if self.negatives[row].prompts and self.omega(i) != 0]

    def guided(self, i: int) -> list[int]:
        """The images that need ε_u: at g = 1 only the steered ones, for rules that use it."""
        steered = self.steered(i) if self.rule.uses_uncond else []
        scales = self.batch.guidance_scales
        return [row for row in self.images if scales[row] != 1 or row in steered]

    def positive(self, i: int) -> Branches:
        """ε_u and ε_c."""
        self.unconditional = self.guided(i)
        null = self.null[self.unconditional]
        return {"uncond": (self.unconditional, null), "cond": (self.images, self.prompted(i))}

    def negative(self, i: int) -> Branches:
        """ε_n, one for each negative prompt of an image, and ε_u where a query requires it."""
        each = [(row, text) for row in self.steered(i) for text in self.negatives[row].prompts]
        if not each:
            return {}
        rows, texts = map(list, zip(*each, strict=True))
        late = [row for row in self.guided(i) if row not in self.unconditional]
        encoded = self.run.encode(texts)
        neg = self.rule.branch(encoded, lambda: self.prompted(i)[rows], self.omega(i))
        return {"late": (late, self.null[late]), "neg": (rows, neg)}

    def uncond(self, preds: Preds) -> Tensor:
        """ε_u of all images; ε_c where it is not needed, so that ε_cfg is ε_c there."""
        pred = preds["cond"][1].clone()
        for rows, evaluated in (preds[name] for name in ("uncond", "late") if name in preds):
            pred[rows] = evaluated
        return pred

    def cfg(self, preds: Preds) -> Tensor:
        """ε_cfg."""
        return guidance.cfg(self.uncond(preds), preds["cond"][1], self.g)

    def steer(self, i: int, t: Tensor, latents: Tensor, pred: Tensor, preds: Preds) -> Tensor:
        """ε from ε_cfg (`pred`), by the method's rule."""
        if "neg" not in preds:
            return pred
        rows, pred = self.steered(i), pred.clone()
        if self.state is None:
            precise = torch.promote_types(pred.dtype, torch.float32)
            self.state = torch.zeros_like(pred, dtype=precise)
        pred[rows], self.state[rows] = self.rule.step(
            self.uncond(preds)[rows],
            preds["cond"][1][rows],
            preds["neg"][1].unflatten(0, (len(rows), -1)),
            self.g[rows],
            self.omega(i),
            self.state[rows],
            i / self.run.num_inference_steps,  # PNDM has more timesteps
        )
        return pred

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents → images for the VLM, `[k, 3, H, W]` in 0 … 1."""
        return self.run.backbone.decode(latents)


@dataclass(frozen=True)
class View:
    """x̂₀ from ε_cfg and x_t of some images, `[k, C, h, w]`; decoded on demand."""

    guider: Guider
    index: int
    rows: list[int]
    x0: Tensor
    latents: Tensor
    decoded: dict[int, Tensor] = field(default_factory=dict)  # row → x̂₀, for all views

    @property
    def pixels(self) -> Tensor:
        """x̂₀ decoded, a new uint8 tensor `[k, 3, H, W]`."""
        if new := [k for k, row in enumerate(self.rows) if row not in self.decoded]:
            labels = [self.guider.batch.labels[self.rows[k]] for k in new]
            with naming(labels, f"at step {self.index}"):
                found = to_uint8(self.guider.decode(self.x0[new]))
            self.decoded.update((self.rows[k], image) for k, image in zip(new, found, strict=True))
        return torch.stack([self.decoded[row] for row in self.rows])

    @property
    def images(self) -> list[Image.Image]:
        """x̂₀ decoded, as new RGB images."""
        return to_pil(self.pixels)

    def of(self, some: list[int]) -> "View":
        """A view of some of its images, given by their positions in `rows`."""
        own = {"rows": [self.rows[k] for k in some], "x0": self.x0[some]}
        return replace(self, latents=self.latents[some], **own)


def evaluate(run: Run, latents: Tensor, t: Tensor, branches: Branches) -> Preds:
    """The predictions of all branches from one call of the network."""
    if not (rows := [row for rows, _ in branches.values() for row in rows]):
        return {}
    cond = reduce(Conditioning.__add__, [cond for _, cond in branches.values()])
    pred = run.predict(latents[rows], t, cond)
    parts = pred.split([len(rows) for rows, _ in branches.values()])
    return {name: (rows, p) for (name, (rows, _)), p in zip(branches.items(), parts, strict=True)}
