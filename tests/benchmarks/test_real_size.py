"""The command that counts and times the real models, with tiny ones."""

import pandas as pd
import pytest
from benchmarks import real_size

# Rows of the U-Net, where steered, of the VAE decoder and the preview decoder.
CALLS = {"cfg": (100, 1, 0), "static": (150, 1, 0), "vl-dnp": (145, 11, 0)}
CALLS |= {"paper-fast": (145, 1, 5), "sequential reference": (145, 11, 0)}


@pytest.mark.slow
def test_each_way_has_all_parts_and_operations_follow_from_the_rows(tmp_path):
    real_size.main(["--tiny", "--time", "--out", str(tmp_path / "cost.csv")])
    rows = pd.read_csv(tmp_path / "cost.csv")
    one = rows[rows["way"] == "one"].set_index("part")["TFLOP"]
    for (way, prompts), found in rows.dropna(subset="prompts").groupby(["way", "prompts"]):
        found, (evaluated, *decoded) = found.set_index("part"), CALLS[way]
        evaluated -= 45 * (prompts == "harmless" and evaluated == 145)
        assert list(found.index) == [*real_size.PARTS, "all"] and (found["seconds"] >= 0).all()
        calls = (found["TFLOP"] / one)[real_size.PARTS[:3]].tolist()
        assert calls == pytest.approx([evaluated, *decoded], rel=1e-4), way
    assert {*rows["way"]} == {"one", *CALLS} and CALLS["cfg"][0] == 2 * 50
