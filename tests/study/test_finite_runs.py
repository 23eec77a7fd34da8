"""NaN and infinity are recorded nowhere."""

import numpy as np
import pytest
from PIL import Image
from tiny_judges import spoiled

from vldnp._finite import NonFiniteError
from vldnp.methods import CFG
from vldnp.models.judges import Judgement
from vldnp.study.grid import Study
from vldnp.study.run import run

PROMPTS, SEEDS = ["a cat", "a dog", "a pizza"], [4, 5, 6]


@pytest.fixture
def study(tmp_path):
    rows = "".join(f"{i},{p},{s}\n" for i, (p, s) in enumerate(zip(PROMPTS, SEEDS, strict=True)))
    (tmp_path / "mine.csv").write_text("prompt_id,prompt,seed\n" + rows)
    return Study("s", [CFG()], [tmp_path / "mine.csv"], {"num_inference_steps": 2}, batch_size=2)


def test_a_spoiled_batch_leaves_nothing_and_is_made_again(model, study, judge, tmp_path):
    with spoiled(model.network, call=3, row=0, bad=np.nan):  # in the second batch
        with pytest.raises(NonFiniteError, match=r"\('a pizza', seed 6\) .* at step 1"):
            run(study, model, judge, root=tmp_path, progress=False)
    assert len(list((tmp_path / "s" / "cells").iterdir())) == 2 * 2
    images = run(study, model, judge, root=tmp_path, progress=False)
    pictures = [Image.open(tmp_path / "s" / path) for path in images["image"]]
    assert len(pictures) == 3 and all(p.getextrema() != ((0, 0),) * 3 for p in pictures)


def test_a_judge_that_fails_in_a_study_is_named_with_the_image(model, study, tmp_path):
    class NaN:
        name, revision = "nan", "1"

        def __call__(self, images):
            return Judgement(np.array([0.1, np.nan][: len(images)]), [{}] * len(images))

    with pytest.raises(NonFiniteError, match=r"judge's probability of image 1 \('a dog', seed 5\)"):
        run(study, model, NaN(), root=tmp_path, progress=False)
    assert not list((tmp_path / "s").glob("scores/*"))
