"""How early, and how rightly, VLMs see what a picture will hold.

Plain CFG's pictures are drawn once; every VLM is shown x̂₀ on the way, and its answers are
compared with what the judge finds at the end. No method is guided by any of it.
"""

from collections.abc import Callable, Mapping

import pandas as pd
from tqdm.auto import tqdm

from vldnp.concepts import ConceptSet, load_concepts
from vldnp.methods import CFG
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.backbone import Backbone
from vldnp.models.judges import Judge
from vldnp.models.vlm import ask
from vldnp.negatives import SampleId
from vldnp.sampler import sample
from vldnp.study.prompts import own_scales
from vldnp.trace import Output


def detection(
    model: Backbone,
    vlms: Mapping[str, Callable],
    judge: Judge,
    prompts: pd.DataFrame,
    concepts: str | ConceptSet,
    *,
    every: int = 3,
    batch_size: int = 32,
    progress: bool = True,
    **sampling,
) -> pd.DataFrame:
    """Precision, recall and F1 of each VLM's answers by step.

    Where the judge knows the vocabulary's terms, every term of every picture is a decision;
    otherwise every picture is one: is there anything to name?

    Args:
        model, judge: as `vldnp.load` and `vldnp.load_judge` open them.
        vlms: name → VLM.
        prompts: a prompt set.
        concepts: what the VLMs are asked about.
        every: x̂₀ is shown at every so many steps.
        batch_size: pictures drawn together.
        progress: show a bar.
        sampling: further arguments of `vldnp.sample`; a prompt's own guidance scale goes before
            that given here.

    Returns:
        `vlm, step, timestep, precision, recall, f1`; the first two are NaN where nothing was
        named, or nothing was to be found.
    """
    concepts = load_concepts(concepts)
    counts: list[dict] = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc="detection", unit="batch", disable=not progress):
        part = prompts.iloc[start : start + batch_size]
        out = sample(
            model,
            list(part["prompt"]),
            CFG(),
            seeds=list(part["seed"]),
            x0_every=True,
            progress=False,
            **sampling | own_scales(part, sampling),
        )
        counts += _counted(out, vlms, judge, concepts, every)
    found = pd.DataFrame(counts).groupby(["vlm", "step", "timestep"], sort=False).sum()
    hit, said, true = found["hit"], found["said"], found["true"]
    table = found.assign(
        precision=hit / said.where(said > 0),
        recall=hit / true.where(true > 0),
        f1=2 * hit / (said + true).where(said + true > 0),
    )
    return table[["precision", "recall", "f1"]].reset_index()


def _counted(
    out: Output, vlms: Mapping[str, Callable], judge: Judge, concepts: ConceptSet, every: int
) -> list[dict]:
    judged = judge(out.images)
    by_term = all(set(seen) & set(concepts.vocabulary) for seen in judged.concepts)
    if by_term:
        truth = [set(found) for found in judged.found()]
    else:
        truth = [{"any"} if p >= UNSAFE_THRESHOLD else set() for p in judged.unsafe_probability]
    identities = [
        SampleId(*image) for image in zip(out.trace.prompts, out.trace.seeds, strict=True)
    ]
    rows = []
    for step in out.trace.steps[::every]:
        for name, vlm in vlms.items():
            said = ask(vlm, step.x0_images, concepts.question, identities, concepts.vocabulary)
            answers = [set(concepts.parse(answer)) for answer in said]
            if not by_term:
                answers = [{"any"} if answer else set() for answer in answers]
            pairs = list(zip(answers, truth, strict=True))
            rows.append(
                {
                    "vlm": name,
                    "step": step.index,
                    "timestep": step.timestep,
                    "hit": sum(len(found & true) for found, true in pairs),
                    "said": sum(len(found) for found, _ in pairs),
                    "true": sum(len(true) for _, true in pairs),
                }
            )
    return rows
