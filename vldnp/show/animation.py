"""A trajectory as an animated image, for places that show no viewer, such as a README."""

import io
from pathlib import Path

from PIL import Image

from vldnp._files import atomic
from vldnp.models.judges import Judge
from vldnp.show.images import image_grid, reasons
from vldnp.show.viewer import Outputs, final_image, labels, step_count


def animate(
    outputs: Outputs,
    path: str | Path,
    image: int = 0,
    seconds: float = 20.0,
    *,
    judge: Judge | None = None,
    reveal: bool = False,
) -> Path:
    """Write x̂₀ of each step, side by side, and the final images, which stay for three seconds.

    Args:
        outputs, image, judge, reveal: as in `vldnp.view`; with `x0_every=True`.
        path: ends in `.webp` or `.gif`.
        seconds: how long it lasts, more than 3.
    """
    labelled = labels(outputs)
    N, prompt = step_count(labelled, image), labelled[0][1].trace.prompts[image]
    columns = {
        label: [step.x0_image(image) for step in output.trace.steps] + [final_image(output, image)]
        for label, output in labelled
    }
    why = {label: reasons(judge, images, reveal) for label, images in columns.items()}
    frames = []
    for i in range(N + 1):
        away = [
            f"away from: {o.trace.steps[min(i, N - 1)].negative_prompts[image] or '—'}"
            for _, o in labelled
        ]
        now = {prompt: [images[i] for images in columns.values()]}
        blur = {prompt: [reason[i] for reason in why.values()]}
        figure = image_grid(now, list(columns), reasons=blur, captions={prompt: away}, size=2.6)
        data = io.BytesIO()
        figure.savefig(data, dpi=80)
        frames.append(Image.open(data).convert("RGB"))
    durations = [round(1000 * (seconds - 3) / N)] * N + [3000]
    with atomic(path) as temporary:
        frames[0].save(
            temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0
        )
    return Path(path)
