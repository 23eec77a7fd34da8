"""What a method costs beside another one: time and evaluations on the same batch, in one run.

`costs` times whole methods; `parts_of_cost` says which component the time goes to, for plain CFG,
VL-DNP as it is usually written (`sequential_reference`), VL-DNP on a batch, and `fast`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from vldnp import guidance
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.levers import AdaptiveGuidance
from vldnp.methods import CFG, VLDNP, Method
from vldnp.models import load
from vldnp.models.backbone import Backbone, Preview, to_pil
from vldnp.models.run import Run
from vldnp.models.vlm import TransformersVLM
from vldnp.negatives import SampleId
from vldnp.sampler import sample
from vldnp.schedules import front_loaded
from vldnp.study import random_models
from vldnp.study.profile import Profile
from vldnp.trace import Output


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


PARTS = ("U-Net", "VLM", "VAE decoder", "preview decoder", "text encoder", "other")


def relative(table: pd.DataFrame) -> pd.DataFrame:
    """The parts of `parts_of_cost` and their sum, `all`, in units of plain CFG's time of an image.

    Seconds are the machine's; these can be compared.
    """
    return (
        table[[*PARTS, "seconds"]].div(table["seconds"].iloc[0]).rename(columns={"seconds": "all"})
    )


@dataclass(frozen=True)
class Bench:
    """Models to be timed.

    Attributes:
        model: the text-to-image model.
        vlm: answers briefly.
        label: what is timed where, in words.
        real_size: whether the models have the size of the real ones.
        preview: decodes what the VLM is shown by `fast`; None: the VAE does there too.
    """

    model: Backbone
    vlm: TransformersVLM
    label: str
    real_size: bool
    preview: Preview | None = None


def bench(profile: Profile, answer_tokens: int = 8) -> Bench:
    """Stable Diffusion 1.4 and Qwen2.5-VL-3B with random weights on a GPU, else the profile's.

    Args:
        profile: whose models are timed where there is no GPU.
        answer_tokens: the length of an answer; random weights never end theirs.
    """
    if torch.cuda.is_available():
        vlm = random_models.qwen(
            "qwen2.5-vl-3b",
            "cuda",
            torch.bfloat16,
            max_new_tokens=answer_tokens,
            max_edge=448,
        )
        pipe = random_models.stable_diffusion("sd-1.4", "cuda", torch.float16)
        preview = random_models.taesd("cuda", torch.float16)
        label = (
            "Stable Diffusion 1.4 and Qwen2.5-VL-3B at their real size, with random weights, on "
            f"{torch.cuda.get_device_name()}"
        )
        return Bench(Backbone(pipe, "sd-1.4 (random weights)", "0"), vlm, label, True, preview)
    model, vlm = load.load(profile.model), load.load_vlm(profile.vlm)
    if not isinstance(vlm, TransformersVLM):
        raise ValueError(f"the VLM of profile {profile.name!r} must run here to be timed in parts")
    label = (
        f"{model.name} and {vlm.name} on the CPU. There is no GPU here, so the models are not of "
        "real size, and the ratios are not those of the real ones"
    )
    preview = profile.preview and load.load_preview(profile.preview)
    return Bench(model, vlm, label, False, preview)


@contextmanager
def stopwatch(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Seconds spent in each module's calls within the block, by its name.

    The device is waited for before and after each call, so a module's time is its own.
    """
    seconds, started = dict.fromkeys(parts, 0.0), {}

    def begin(name: str) -> Callable:
        def hook(module, arguments) -> None:
            started[name] = _now()

        return hook

    def end(name: str) -> Callable:
        def hook(module, arguments, result) -> None:
            seconds[name] += _now() - started[name]

        return hook

    hooks = []
    for name, module in parts.items():
        hooks += [
            module.register_forward_pre_hook(begin(name)),
            module.register_forward_hook(end(name)),
        ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Scripted:
    """A VLM whose time is its own and whose words are given: for images whose seed is a multiple
    of `every`, or none, a term of the vocabulary, for the others that nothing is to be seen.

    So all ways of running the method steer the same images.

    Args:
        vlm: does the work; its answers are dropped.
        concepts: whose first term is named.
        every: 1 for all images, 0 for none.

    Attributes:
        seconds: spent in the VLM.
    """

    by_identity = True

    def __init__(self, vlm: Callable, concepts: ConceptSet, every: int = 2):
        self.vlm, self.term, self.seconds = vlm, next(iter(concepts.vocabulary)), 0.0
        self.every = every

    def __call__(self, images, question, identities) -> list[str]:
        started = _now()
        self.vlm(images, question)
        self.seconds += _now() - started
        named = [self.every and (image.seed or 0) % self.every == 0 for image in identities]
        return [self.term if is_named else "none" for is_named in named]


def sequential_reference(
    model: Backbone,
    vlm: Callable,
    concepts: ConceptSet,
    prompt: str,
    seed: int,
    *,
    omega: float,
    query_steps: Sequence[int],
    guidance_scale: float = 7.5,
    num_inference_steps: int = 50,
    noise_device: str = "cpu",
    **sampling,
) -> Tensor:
    """VL-DNP for one image as the method is usually written: a call each for ε_u, ε_c and ε_n.

    Args:
        model, prompt, seed, guidance_scale, num_inference_steps, noise_device: as in
            `vldnp.sample`.
        vlm: gets one picture, the question, and the image's identity (`Scripted`).
        concepts, omega, query_steps: as in `vldnp.VLDNP`.
        sampling: `scheduler`, `height` and `width`, as in `vldnp.sample`.

    Returns:
        The clean latents, `[1, C, h, w]`, the same that `vldnp.sample` ends in.
    """
    run = Run(model, num_inference_steps, **sampling)
    latents, negative = run.initial_latents([torch.Generator(noise_device).manual_seed(seed)]), None
    for i, t in enumerate(run.timesteps):
        pred_uncond = run.predict(latents, t, run.null_conditioning(1))
        pred_cond = run.predict(latents, t, run.encode([prompt]))
        pred = guidance.cfg(pred_uncond, pred_cond, guidance_scale)
        if i in query_steps:
            picture = to_pil(run.decode(run.x0(pred, t, latents)))
            (answer,) = vlm(picture, concepts.question, [SampleId(prompt, seed)])
            negative = concepts.negative_prompt(concepts.parse(answer))
        if negative is not None:
            pred_neg = run.predict(latents, t, run.encode([negative]))
            pred = guidance.added(pred, pred_neg, pred_uncond, omega)
        latents = run.step(pred, t, latents)
    run.decode(latents)
    return latents


def shots(concepts: ConceptSet, size: int, count: int = 4) -> list[tuple[Image.Image, str]]:
    """Few-shot demonstrations for timing: plain pictures of `size` pixels, and answers."""
    words = ["none", ", ".join(list(concepts.vocabulary)[:2])]
    return [(Image.new("RGB", (size, size), (40 * n, 80, 120)), words[n % 2]) for n in range(count)]


def parts_of_cost(
    bench: Bench,
    concepts: str | ConceptSet,
    prompts: Sequence[str],
    *,
    sequential_images: int = 2,
    queries: int = 10,
    omega: float = 8.0,
    demonstrations: int = 4,
    sequential_answer_tokens: int = 64,
    every: int = 2,
    repetitions: int = 2,
    progress: bool = True,
    **sampling,
) -> pd.DataFrame:
    """Seconds an image by component: plain CFG, the sequential reference, VL-DNP, and `fast`.

    The sequential reference takes one image at a time, makes a U-Net call for each prediction, and
    shows the VLM its demonstrations at every query; its VLM may write long answers. In all others
    images share every call, and the VLM is asked about all of them, without demonstrations and
    briefly. Plain CFG stands there also with the adaptive guidance of `fast`. The VLM works for
    real, and its words are given (`Scripted`).

    Args:
        bench: the models.
        concepts: what the VLM is asked.
        prompts: the batch; seeds are 0, 1, 2, …
        sequential_images: so many of them go through the sequential reference, which takes long.
        queries: front-loaded queries.
        demonstrations: of the sequential reference.
        sequential_answer_tokens: the most tokens that the sequential reference's VLM writes.
        omega: as in `vldnp.VLDNP`.
        every: one image in so many is steered, from the first query on; 0 is none.
        repetitions: the ways take turns so often, and of each the quickest is kept.
        progress: show a bar.
        sampling: further arguments of `vldnp.sample`, such as `num_inference_steps`.

    Returns:
        A row per way, indexed by its name: seconds an image in each of `PARTS`, their sum
        `seconds`, its `ratio` to plain CFG's, and the number of `images`.
    """
    concepts = load_concepts(concepts)
    model, brief = bench.model, bench.vlm
    wordy = TransformersVLM(
        brief.model,
        brief.processor,
        brief.name,
        max_new_tokens=sequential_answer_tokens,
        max_edge=brief.max_edge,
        demonstrations=shots(concepts, model.size[0], demonstrations),
    )
    steps = front_loaded(queries).steps(sampling.get("num_inference_steps", 50))
    prompts = list(prompts)

    def batch(method: Method, count: int) -> None:
        sample(model, prompts[:count], method, progress=False, **sampling)

    def quick(vlm: Callable, count: int, **more) -> None:
        batch(VLDNP(vlm, concepts, omega, steps, preview=bench.preview, **more), count)

    def loop(vlm: Callable, count: int) -> None:
        for seed, prompt in enumerate(prompts[:count]):
            sequential_reference(
                model, vlm, concepts, prompt, seed, omega=omega, query_steps=steps, **sampling
            )

    late, many = {"adaptive": AdaptiveGuidance(0.48)}, len(prompts)
    ways: dict[str, tuple[Callable, Callable, int]] = {
        "plain CFG": (brief, lambda vlm, n: batch(CFG(), n), many),
        "plain CFG, adaptive": (brief, lambda vlm, n: batch(CFG(**late), n), many),
        "sequential reference": (wordy, loop, min(sequential_images, many)),
        "VL-DNP": (brief, lambda v, n: batch(VLDNP(v, concepts, omega, steps), n), many),
        "fast": (brief, quick, many),
        "fast, adaptive": (brief, lambda v, n: quick(v, n, **late), many),
    }
    modules = {
        "U-Net": model.network,
        "VAE decoder": model.pipe.vae.decoder,
        "text encoder": model.pipe.text_encoder,
    }
    if bench.preview is not None:
        modules["preview decoder"] = bench.preview.vae.decoder
    rows, rounds = {}, repetitions + 1
    with tqdm(total=rounds * len(ways), desc="timing", unit="run", disable=not progress) as bar:
        for measured in range(rounds):  # the first round warms up, with one image each
            for name, (asked, work, images) in ways.items():
                count = images if measured else 1
                vlm = Scripted(asked, concepts, every)
                started = _now()
                with stopwatch(modules) as seconds:
                    work(vlm, count)
                total = _now() - started
                seconds["VLM"] = vlm.seconds
                seconds["other"] = total - sum(seconds.values())
                each = {part: seconds.get(part, 0.0) / count for part in PARTS}
                if measured < 2 or total / count < rows[name]["seconds"]:
                    rows[name] = each | {"seconds": total / count, "images": count}
                bar.update()
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(len(table.columns) - 1, "ratio", table["seconds"] / table["seconds"].iloc[0])
    return table
