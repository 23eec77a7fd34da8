"""What a method costs beside another one: time and evaluations on the same batch, in one run."""

import time
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from vldnp.backbone import Backbone
from vldnp.methods import Method
from vldnp.sampler import Output, sample


def costs(
    model: Backbone,
    methods: Mapping[str, Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    repetitions: int = 3,
    progress: bool = True,
    **sampling,
) -> pd.DataFrame:
    """Time each method on one batch, relative to the first.

    Every method runs once unmeasured. Then they take turns, so that a machine that slows down
    slows all of them, and each repetition gives one ratio to the first method.

    Args:
        model: as in `vldnp.sample`.
        methods: label → method; the first is what the others are compared with.
        prompts, seeds: the batch.
        repetitions: measured runs of each method.
        progress: show a bar.
        sampling: further arguments of `vldnp.sample`, such as `num_inference_steps`.

    Returns:
        A row per method, indexed by label: `seconds` for the batch and `ratio` (medians over
        the repetitions), `ratio_low, ratio_high` (smallest and largest), `evaluations_per_step`
        and `vlm_calls` (means over the images), `images`.
    """
    if not methods:
        raise ValueError("no methods to time; give at least one")
    if repetitions < 1:
        raise ValueError(f"repetitions must be 1 or more, not {repetitions}")

    def timed(method: Method) -> tuple[float, Output]:
        started = time.perf_counter()
        output = sample(model, prompts, method, seeds=seeds, progress=False, **sampling)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - started, output

    outputs, seconds = {}, []
    with tqdm(
        total=(repetitions + 1) * len(methods), desc="timing", unit="run", disable=not progress
    ) as bar:
        for repetition in range(repetitions + 1):
            times = {}
            for label, method in methods.items():
                times[label], outputs[label] = timed(method)
                bar.update()
            if repetition:  # the first round warms up
                seconds.append(times)
    table = pd.DataFrame(seconds)
    ratios = table.div(table.iloc[:, 0], axis=0)
    return pd.DataFrame(
        {
            "seconds": table.median(),
            "ratio": ratios.median(),
            "ratio_low": ratios.min(),
            "ratio_high": ratios.max(),
            "evaluations_per_step": {
                label: sum(output.trace.model_evaluations)
                / (len(output.trace.steps) * len(output.trace.prompts))
                for label, output in outputs.items()
            },
            "vlm_calls": {
                label: sum(output.trace.vlm_calls) / len(output.trace.prompts)
                for label, output in outputs.items()
            },
            "images": len(prompts),
        }
    )
