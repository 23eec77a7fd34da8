"""How likely a comparison of rates is to show what is asked, before it is made."""

import numpy as np
import pandas as pd

from moji.study.protocol import Protocol
from vldnp.metrics.hypotheses import ALPHA, evidence, hypotheses
from vldnp.study.claims import asked_of
from vldnp.study.published import results_folder

TUNING = "tuning-"
"""Begins the names of tuning sets; the rest is that of the set that they stand for."""


def power(
    own: float,
    other: float,
    prompts: int,
    asked: str,
    seeds: int = 1,
    family: int = 1,
    draws: int = 200,
    seed: int = 0,
) -> float:
    """The share of simulated studies in which an unsafe rate's comparison shows what is asked.

    The two methods' images are drawn independently, which asks for more prompts than images of the
    same prompts and seeds do; seeds of a prompt are independent too, which asks for fewer.

    Args:
        own, other: the rates, in 0 … 1, of the method and of what it is compared with.
        prompts, seeds: how many of each.
        asked: as in a comparison, such as `superior` or `non-inferior 0.1`.
        family: the number of comparisons in the claim, all corrected as strictly as Holm's first.
        draws: simulated studies.
    """
    what, margin = asked_of(asked, "asr")
    rng = np.random.default_rng(seed)
    shown = 0
    for _ in range(draws):
        pairs = [rng.random((prompts, seeds)) < rate for rate in (other, own)]
        gains = pairs[0].mean(axis=1) - pairs[1].mean(axis=1)
        known = evidence(gains, np.full(prompts, seeds), rates=True)
        shown += hypotheses(known, margin)[what] * family <= ALPHA
    return shown / draws


def tuned(profile: str) -> pd.DataFrame:
    """ASR on tuning prompts at the chosen settings: a row per method, a column per prompt set.

    It comes from the tuning runs that were published as `<profile>-tuning-…`, and is empty where
    there are none.
    """
    runs = sorted(results_folder().glob(f"{profile}-tuning-*/tuning.csv"))
    if not runs:
        return pd.DataFrame()
    rows = pd.concat(map(pd.read_csv, runs))
    rates = rows[rows["chosen"]].set_index("method").filter(like=f"asr-{TUNING}")
    return rates.rename(columns=lambda name: name.removeprefix(f"asr-{TUNING}"))


def planned(protocol: Protocol, rates: pd.DataFrame) -> pd.DataFrame:
    """The power of each of a protocol's comparisons of ASR at chosen settings.

    Args:
        protocol: what will be compared.
        rates: expected ASR, a row per method and a column per prompt set, as from tuning.

    Returns:
        `claim, method, against, prompt_set, asked, own, other, prompts, seeds, power`; comparisons
        for which a rate is lacking are left out.
    """
    sizes = {
        (method, name): (count, part.seeds)
        for part in protocol.parts.values()
        if not part.omegas
        for method in part.methods
        for name, count in part.prompts.items()
    }
    rows = []
    for claim, method, against, prompts, metric, asked in protocol.comparisons:
        family = sum(row[0] == claim for row in protocol.comparisons)
        for name in protocol.attacks if prompts == "attacks" else (prompts,):
            if metric != "asr" or name not in rates or not {method, against} <= set(rates.index):
                continue
            own, other = rates.at[method, name], rates.at[against, name]
            if np.isnan(own + other) or (method, name) not in sizes:
                continue
            count, seeds = sizes[method, name]
            rows.append(
                {
                    "claim": claim,
                    "method": method,
                    "against": against,
                    "prompt_set": name,
                    "asked": asked,
                    "own": own,
                    "other": other,
                    "prompts": count,
                    "seeds": seeds,
                    "power": power(own, other, count, asked, seeds, family),
                }
            )
    return pd.DataFrame(rows)
