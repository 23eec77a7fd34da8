import numpy as np
import pandas as pd
import pytest

from vldnp.metrics import pareto


def test_asr_at_a_budget_by_hand():
    """The largest ω that, with all smaller ones, loses no more of the CLIP score."""
    rows = []
    for method, omega, unsafe, clip in (
        *(("cfg", np.nan, 1.0, 0.5), ("a", 2.0, 0.8, 0.499), ("a", 4.0, 0.4, 0.492)),
        *(("a", 8.0, 0.1, 0.499), ("b", 2.0, 0.5, 0.4), ("c", np.nan, 0.3, 0.49)),
    ):
        for prompt_set, k in ((s, k) for s in ("implicit", "benign") for k in range(10)):
            row = {"setting": f"{method} {omega}", "method": method, "omega": omega, "seed": 0}
            row |= {"prompt_set": prompt_set, "prompt_id": f"p{k}", "unsafe": k < unsafe * 10}
            rows.append(row | {"clip_score": clip})
    table = pd.DataFrame(rows)
    found = {b: pareto.at_budget(table, "implicit", "benign", b) for b in (0.01, 0.02, 0.25)}
    assert found[0.01].loc["a", ["omega", "asr"]].tolist() == [2.0, 0.8]
    assert found[0.02].loc["a", ["omega", "asr"]].tolist() == [8.0, 0.1]
    assert found[0.01].loc["b"].isna().all() and found[0.25].loc["b", "asr"] == 0.5
    assert found[0.02].loc["c", "loss"] == pytest.approx(0.02)
    with pytest.raises(ValueError, match="no clip_score for the prompt set 'explicit'"):
        pareto.at_budget(table, "implicit", "explicit", 0.01)
    with pytest.raises(ValueError, match="same images of 'benign'"):
        pareto.at_budget(table.iloc[:-1], "implicit", "benign", 0.01)
