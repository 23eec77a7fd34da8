"""One training loop for all models of the Moji benchmark: bfloat16, EMA, resumable.

A recipe's loss draws its own batch from a generator that is a function of `(seed, step)` alone, so
an interrupted run that is resumed gets the same batches as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run. `seed` also names the data stream."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    batch_size: int = 64
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 0.01
    save_every: int = 200

    def rate(self, step: int) -> float:
        """The factor on the learning rate: linear warm-up, then linear decay to zero."""
        return min(1.0, (step + 1) / self.warmup) * max(0.0, 1 - step / self.steps)


def fit(
    recipe: Recipe, module: nn.Module, loss: Loss, folder: Path, compiled: bool = False
) -> nn.Module:
    """Train `module` and return its moving average, in evaluation mode.

    `compiled` uses `torch.compile` where there is a compiler; some models do not work with
    it (the judge's gradients became NaN). Every `save_every` steps the state is written to
    `folder/state`, from which a run resumes; `folder/loss.csv` has the curve.

    Raises:
        ValueError: the loss is not finite; no checkpoint holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiled = compiled and (torch.cuda.is_available() or shutil.which("g++") is not None)
    accelerator, module, optimizer, schedule, average = _prepared(recipe, module, compiled)
    state, log = folder / "state", folder / "loss.csv"
    start = 0
    if (state / "step.json").exists():
        accelerator.load_state(str(state))
        start = json.loads((state / "step.json").read_text())["step"]
    else:
        log.write_text("step,loss\n")
    module.train()
    forward = torch.compile(module) if compiled else module
    rows: list[str] = []
    for step in tqdm(range(start, recipe.steps), recipe.name, initial=start, total=recipe.steps):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with accelerator.autocast():
            value = loss(forward, generator)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step < recipe.steps // 10:  # the average excludes the random initial weights
            average.n_averaged.zero_()
        average.update_parameters(module)
        if step % 10 == 0:
            rows.append(f"{step},{_finite(float(value.detach()), recipe, step, state):.6f}\n")
        done = step + 1
        if done % recipe.save_every == 0 or done == recipe.steps:
            _save_state(accelerator, state, done)
            with log.open("a") as file:
                file.writelines(rows)
            rows.clear()
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    return average.module.eval()


def _prepared(recipe: Recipe, module: nn.Module, compiled: bool) -> tuple:
    """Accelerator, module, optimizer, learning-rate schedule and moving average."""
    bf16 = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    layout = torch.channels_last if compiled else torch.preserve_format
    module = module.to(accelerator.device, memory_format=layout)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    accelerator.register_for_checkpointing(module, optimizer, schedule, average)
    return accelerator, module, optimizer, schedule, average


def _finite(loss: float, recipe: Recipe, step: int, state: Path) -> float:
    if math.isfinite(loss):
        return loss
    raise ValueError(
        f"{recipe.name}: the loss is {loss} at step {step}; train with a lower learning rate, "
        f"from the last checkpoint in {state}"
    )


def _save_state(accelerator: Accelerator, state: Path, step: int) -> None:
    """Write a checkpoint folder beside the old one, then swap them."""
    fresh, old = state.with_name("state-new"), state.with_name("state-old")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    accelerator.save_state(str(fresh))
    (fresh / "step.json").write_text(json.dumps({"step": step}))
    if state.exists():
        state.rename(old)
    fresh.rename(state)
    shutil.rmtree(old, ignore_errors=True)
