"""What a profile will need, said before anything is downloaded: models, cells, calls, time."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import pandas as pd
import torch

from vldnp._files import first_line
from vldnp.baselines.controls import AnswersNone, Judged, Oracle
from vldnp.baselines.safree import Safree
from vldnp.concepts import load_concepts
from vldnp.methods import VLDNP, Method
from vldnp.models import hub, load
from vldnp.models.backbone import Backbone
from vldnp.negatives import Dynamic, Static
from vldnp.sampler import sample
from vldnp.study import random_models, reference, timing
from vldnp.study.dial import dial
from vldnp.study.grid import Study
from vldnp.study.profile import MODELS, Profile, set_name
from vldnp.study.profile_methods import dynamic, profile_study, study_of
from vldnp.study.prompts import load_prompts
from vldnp.study.public import fetched, public_sets
from vldnp.study.reproduce import NOTEBOOKS, notebooks_in
from vldnp.study.sweep import sweep

FLOP_RATE = 40e12
"""FLOP a second that an estimate without a GPU goes by, an eighth of an A100's peak in float16."""

ANSWER_TOKENS = 16
"""The length of an answer in such an estimate."""

QUESTION_TOKENS = 100

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

CALIBRATION_STEPS = 4


@dataclass(frozen=True)
class Rates:
    """Seconds that one of each takes, for one image.

    Attributes:
        evaluation: of the U-Net or transformer.
        vlm_call: a question about a picture, with its answer.
        decode: of latents to a picture.
        how: what the numbers rest on, in words.
    """

    evaluation: float
    vlm_call: float
    decode: float
    how: str


def plan(profile: Profile) -> str:
    """All that `python -m vldnp plan` prints; nothing is downloaded.

    Args:
        profile: whose experiment is planned.
    """
    counted = grid(profile)
    rates = calibrated(profile)
    totals = counted[["images", "evaluations", "vlm_calls"]].sum()
    hours = {part: spent.sum() / 3600 for part, spent in seconds(counted, rates).items()}
    lines = [f"profile {profile.name}", "", "models"]
    lines += _columns(_line(row) for row in models(profile).itertuples())
    lines += ["", "prompts"]
    lines += _columns(prompts(profile).itertuples(index=False))
    lines += ["", "cells: an image for each method and prompt; evaluations and calls at most"]
    heads = ["", "images", "U-Net evaluations", "VLM calls"]
    rows = [[row.study, *map(_number, row[2:])] for row in _by_study(counted).itertuples()]
    lines += _columns([heads, *rows, ["all", *map(_number, totals)]])
    weights = sum(models(profile)["loaded"].fillna(0))
    lines += ["", f"memory: about {_bytes(weights)} for the weights that are open at once"]
    lines += ["", f"time: about {_hours(sum(hours.values()))}"]
    lines += _columns([part, _hours(spent)] for part, spent in hours.items())
    lines += [f"  {rates.how}", f"  FID: {_reference(profile)}"]
    return "\n".join(lines)


def grid(profile: Profile) -> pd.DataFrame:
    """What the notebooks compute, a row for each method and prompt set.

    Returns:
        `study` (the main grid, or the notebook that adds it), `method, omega, prompt_set, images,
        evaluations, vlm_calls`; the latter two are upper bounds, for a VLM that always names
        something. Images that two studies share are counted in each.
    """
    stand_in = replace(
        profile,
        vlm=AnswersNone(str(profile.vlm)),
        lighter_vlms=tuple(AnswersNone(str(vlm)) for vlm in profile.lighter_vlms),
        preview=profile.preview and random_models.taesd(),
    )
    attacks = [name for name in profile.prompt_sets if set_name(name) != profile.benign_set]
    studies = {"main grid": profile_study(stand_in)}
    if profile.lighter_vlms:
        lighter = [dynamic(stand_in, vlm=vlm) for vlm in stand_in.lighter_vlms]
        studies["07, lighter VLMs"] = study_of(stand_in, lighter, prompt_sets=attacks)
    studies |= ablations(stand_in)
    rows = [row for name, study in studies.items() for row in _rows(name, study)]
    return pd.DataFrame(rows)


def ablations(
    profile: Profile,
    folder: str | Path = NOTEBOOKS,
    oracle: Oracle | None = None,
    judged: Callable | None = None,
) -> dict[str, Study]:
    """A study for each cell tagged `sweep`, in which a notebook says what it varies.

    Of such a notebook these cells and its parameters are executed, and nothing else.

    Args:
        profile: what the notebooks' `settings` are.
        folder: the notebooks.
        oracle, judged: those that they may name; by default these know nothing.
    """
    oracle = Oracle({}) if oracle is None else oracle
    judged = Judged(AnswersNone()) if judged is None else judged
    known = {"settings": profile, "oracle": oracle, "judged": judged}
    studies: dict[str, Study] = {}
    for source in notebooks_in(folder):
        names = known | {"sweep": sweep, "dial": dial}
        for cell in nbformat.read(source, as_version=4).cells:
            tags = cell.metadata.get("tags", [])
            if "parameters" in tags:
                exec(cell.source, names)
                names |= profile.notebook_parameters
            elif "sweep" in tags:
                exec(cell.source, names)
                study = names["ablation"].study
                one_more = f"{source.stem}, {study.part}"
                studies[one_more if source.stem in studies else source.stem] = study
    return studies


def _rows(name: str, study: Study) -> Iterator[dict]:
    steps = study.num_inference_steps
    for method in study.methods:
        for source in study.prompt_sets:
            images = len_of(source, study) * study.num_images_per_prompt
            yield {
                "study": name,
                "method": method.name,
                "omega": method.omega,
                "prompt_set": set_name(source),
                "images": images,
                "evaluations": images * evaluations(method, steps),
                "vlm_calls": images * len(method.negatives.query_steps_of(steps)),
            }


def len_of(source: str | Path, study: Study) -> int:
    """How many prompts of a set a study takes; of one that is not here, as many as published."""
    limit = study.max_prompts
    if isinstance(limit, Mapping):
        limit = limit.get(set_name(source))
    count = prompt_count(source)
    return min(limit or count, count)


def prompt_count(source: str | Path) -> int:
    """The number of prompts of a set, as read or, where it was not fetched, as published."""
    try:
        return len(load_prompts(source))
    except FileNotFoundError:
        known = public_sets().get(str(source).partition(":")[0], {})
        if "prompts" not in known:
            raise
        return known["prompts"]


def evaluations(method: Method, num_inference_steps: int) -> int:
    """The most evaluations of the network that an image can take with a method."""
    policy, N = method.negatives, num_inference_steps
    thirds = 0
    if isinstance(policy, Dynamic):  # from the first query on, if it names something
        thirds = N - min(policy.query_steps_of(N), default=N)
    elif isinstance(policy, Static) and policy.prompt.strip():
        thirds = N
    thirds *= getattr(method.rule, "evaluations", 1)
    again = N if isinstance(method.conditioning, Safree) and method.conditioning.re_attention else 0
    if hasattr(policy, "foreseen"):  # plain CFG from each query's step to the end
        again += sum(2 * (N - i) for i in policy.query_steps_of(N))
    return 2 * N + thirds + again


def models(profile: Profile) -> pd.DataFrame:
    """What is opened: `kind, name, place, here` (or to be fetched), and its size where known.

    The size is `parameters`, `fetched` (bytes as published, or of the folder) and `loaded` (bytes
    of the weights in memory). A lighter VLM takes the other's place, so it has no `loaded`.
    """
    named = [(kind, getattr(profile, kind)) for kind in MODELS]
    named += [("lighter VLM", vlm) for vlm in profile.lighter_vlms]
    named += [("preview", profile.preview)] if profile.preview else []
    rows = []
    for kind, name in named:
        place, is_here = hub.whereabouts("vlm" if kind == "lighter VLM" else kind, name)
        row = {"kind": kind, "name": str(name), "place": place, "here": is_here}
        if str(name) in random_models.known():
            published = random_models.known()[str(name)]["published"]
            count = sum(random_models.parameters(str(name)).values())
            dtype = getattr(name, "options", {}).get("dtype", published)
            row |= {"parameters": count, "fetched": count * BYTES[published]}
            row |= {"loaded": count * BYTES[dtype]} if kind != "lighter VLM" else {}
        elif Path(place).is_dir():
            held = sum(file.stat().st_size for file in Path(place).rglob("*.safetensors"))
            row |= {"place": os.path.relpath(place), "fetched": held, "loaded": held}
        rows.append(row)
    columns = ["kind", "name", "place", "here", "parameters", "fetched", "loaded"]
    return pd.DataFrame(rows, columns=columns)


def _line(row) -> list[str]:
    size = "size not known" if pd.isna(row.fetched) else _bytes(row.fetched)
    count = "" if pd.isna(row.parameters) else f"{_number(row.parameters)} parameters"
    here = "here" if row.here else "to be fetched"
    return [row.kind, row.name, count, size, here, row.place]


def prompts(profile: Profile) -> pd.DataFrame:
    """The prompt sets: name, how many prompts of how many are used, and whether it is here."""
    study = profile_study(replace(profile, vlm=AnswersNone()))
    rows = []
    for source in profile.prompt_sets:
        used, count = len_of(source, study), prompt_count(source)
        here = "here"
        if str(source) in public_sets():
            try:
                fetched(str(source))
            except FileNotFoundError:
                here = f"to be fetched: python -m vldnp data fetch {source}"
        rows.append([set_name(source), f"{used:,} of {count:,}", here])
    return pd.DataFrame(rows, columns=["name", "prompts", "here"])


def seconds(counted: pd.DataFrame, rates: Rates) -> dict[str, pd.Series]:
    """Component → seconds for each row of `grid`. Judging and CLIP are not among them."""
    decodes = counted["images"] + counted["vlm_calls"]
    return {
        "U-Net": counted["evaluations"] * rates.evaluation,
        "VLM": counted["vlm_calls"] * rates.vlm_call,
        "VAE decoder": decodes * rates.decode,
    }


def calibrated(profile: Profile) -> Rates:
    """Time a few steps of the profile's models; or of stand-ins of their size; or reckon.

    Models that are here are timed themselves. Others are built with random weights where there is
    a GPU and their shapes are known. Without a GPU the time follows from their operations and
    `FLOP_RATE`.

    Raises:
        ValueError: not all models are here, and the shapes of one are not known, or the GPU is
            too small for them; one line.
    """
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
    name, vlm_name = str(profile.model), str(profile.vlm)
    try:
        here = [hub.whereabouts(kind, getattr(profile, kind))[1] for kind in ("model", "vlm")]
        if all(here):
            model, vlm = load.load(profile.model), load.load_vlm(profile.vlm)
            return measured(model, vlm, profile, f"timed on {where} with the profile's own models")
        known = random_models.known()
        for kind in ("model", "vlm"):
            if str(getattr(profile, kind)) not in known:
                raise ValueError(
                    f"the plan cannot be timed: not all models are here, and the shapes of the "
                    f"{kind} {str(getattr(profile, kind))!r} are not in data/architectures.yaml; "
                    "fetch it"
                )
        if not torch.cuda.is_available() or not vlm_name.startswith("qwen2.5-vl"):
            return reckoned(profile)
        pipe = random_models.stable_diffusion(name, "cuda", torch.float16)
        vlm = random_models.qwen(
            vlm_name, "cuda", torch.bfloat16, max_new_tokens=ANSWER_TOKENS, max_edge=448
        )
        how = f"timed on {where} with random weights of the same size"
        return measured(Backbone(pipe, name, "0"), vlm, profile, how)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the plan cannot be timed on this GPU: {first_line(error)}") from error


def measured(model: Backbone, vlm, profile: Profile, how: str) -> Rates:
    """Rates from a short run of one batch with a query; the first one warms up."""
    concepts = load_concepts(profile.concepts)
    count = min(profile.batch_size, 8)
    settings = profile.sampling | {"num_inference_steps": CALIBRATION_STEPS}
    parts = {"network": model.network, "decoder": model.pipe.vae.decoder}
    for _ in range(2):
        asked = timing.Scripted(vlm, concepts)
        method = VLDNP(asked, concepts, 8.0, (1,))
        with timing.stopwatch(parts) as spent:
            out = sample(model, ["a photo"] * count, method, progress=False, **settings)
    spent_on = sum(out.trace.model_evaluations)
    return Rates(
        spent["network"] / spent_on, asked.seconds / count, spent["decoder"] / (2 * count), how
    )


def reckoned(profile: Profile) -> Rates:
    """Rates from the numbers of operations in `data/architectures.yaml`, and `FLOP_RATE`."""
    operations = random_models.known()[str(profile.model)]["operations"]
    # A token takes two operations for each weight; a picture of 448 pixels is 256 tokens.
    tokens = 256 + QUESTION_TOKENS + ANSWER_TOKENS
    asked = 2 * tokens * sum(random_models.parameters(str(profile.vlm)).values())
    how = (
        "an estimate, not timed: not all models are here, nor can stand-ins of their size be; "
        f"it takes a GPU to sustain {FLOP_RATE / 1e12:.0f} TFLOP/s and answers to have "
        f"{ANSWER_TOKENS} tokens"
    )
    rates = (n / FLOP_RATE for n in (operations["evaluation"], asked, operations["decode"]))
    return Rates(*rates, how)


def _reference(profile: Profile) -> str:
    if profile.reference in (None, "moji"):
        return "no real images are named" if profile.reference is None else "images are rendered"
    try:
        return f"real images are in {reference.reference_folder(profile.reference)}"
    except FileNotFoundError as error:
        return f"stays empty, {error}"


def _by_study(counted: pd.DataFrame) -> pd.DataFrame:
    numbers = ["images", "evaluations", "vlm_calls"]
    return counted.groupby("study", sort=False)[numbers].sum().reset_index()


def _number(count: float) -> str:
    """1234567 → `1.23 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _columns(rows) -> list[str]:
    """Rows of texts under each other, indented."""
    rows = [[str(field) for field in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f.ljust(w) for f, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
