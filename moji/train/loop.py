"""One training loop for all models of the Moji benchmark: bfloat16, EMA, resumable, with a curve.

A recipe's loss draws its own batch from a generator that is a function of `(seed, step)` alone, so
a run that was killed and resumed sees the same batches as one that was not.
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

from vldnp._files import atomic

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train. `seed` also names the data stream."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    batch_size: int = 64
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 0.01
    save_every: int = 200


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then linear decay to zero: the factor on the base rate at `step`."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    return rise * max(0.0, 1 - step / recipe.steps)


def fit(
    recipe: Recipe,
    module: nn.Module,
    loss: Loss,
    folder: Path,
    preview: Callable[[nn.Module, Path], None] | None = None,
    previews: int = 4,
    compiled: bool = False,
) -> nn.Module:
    """Train `module` and return its moving average, in evaluation mode.

    A loss that is no number ends the training with a `ValueError`, before it reaches a checkpoint.
    `compiled` uses `torch.compile` where there is a compiler for it: a minute of compiling for
    faster steps. It gave the judge gradients that were no numbers, so not every model uses it.

    State goes to `folder/state` every `save_every` steps and is taken up again if it is there;
    `folder/loss.csv`, `folder/loss.png` and what `preview` draws are renewed as training goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bf16 = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    compiled = compiled and (torch.cuda.is_available() or shutil.which("g++") is not None)
    layout = torch.channels_last if compiled else torch.preserve_format
    module = module.to(accelerator.device, memory_format=layout)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate(recipe, step)
    )
    # The average is taken over a young model's last tenth of steps, not over its random start.
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    accelerator.register_for_checkpointing(module, optimizer, schedule, average)
    state, log = folder / "state", folder / "loss.csv"
    start = 0
    if (state / "step.json").exists():
        accelerator.load_state(str(state))
        start = json.loads((state / "step.json").read_text())["step"]
    else:
        log.write_text("step,loss\n")
    module.train()
    forward = torch.compile(module) if compiled else module
    rows: list[tuple[int, float]] = []
    mean = math.nan
    bar = tqdm(range(start, recipe.steps), desc=recipe.name, initial=start, total=recipe.steps)
    for step in bar:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with accelerator.autocast():
            value = loss(forward, generator)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step < recipe.steps // 10:
            average.n_averaged.zero_()
        average.update_parameters(module)
        if step % 10 == 0:
            now = float(value.detach())
            if not math.isfinite(now):
                raise ValueError(
                    f"{recipe.name}: the loss is {now} at step {step}; train with a lower learning "
                    f"rate, from the last checkpoint in {state}"
                )
            mean = now if math.isnan(mean) else 0.9 * mean + 0.1 * now
            rows.append((step, now))
            bar.set_postfix(loss=f"{mean:.4f}")
        done = step + 1
        if done % recipe.save_every == 0 or done == recipe.steps:
            _save_state(accelerator, state, done)
            with log.open("a") as file:
                file.writelines(f"{i},{v:.6f}\n" for i, v in rows)
            rows.clear()
            _draw_curve(log, recipe.name)
        if preview and (done % max(1, recipe.steps // previews) == 0 or done == recipe.steps):
            preview(average.module, folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    return average.module.eval()


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


def _draw_curve(log: Path, name: str) -> None:
    import pandas as pd
    from matplotlib.figure import Figure

    curve = pd.read_csv(log)
    axes = Figure(figsize=(5, 3), layout="constrained").add_subplot()
    axes.plot(curve["step"], curve["loss"], alpha=0.3)
    axes.plot(curve["step"], curve["loss"].ewm(span=30).mean())
    axes.set(xlabel="step", ylabel="loss", title=name, yscale="log")
    with atomic(log.with_suffix(".png")) as fresh:
        axes.figure.savefig(fresh, dpi=100, format="png")


def save_grid(images: Tensor, path: Path, columns: int = 16) -> None:
    """Write pictures `[n, 3, h, w]` in 0..1 as one PNG grid."""
    from torchvision.utils import save_image

    with atomic(path) as fresh:
        save_image(images.float().clamp(0, 1), fresh, nrow=columns, format="png")
