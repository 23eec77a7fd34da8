import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import sd_pipeline
from tiny_published import WordLengthCLIP

from vldnp.__main__ import main
from vldnp.metrics.intervals import paired_difference
from vldnp.metrics.summary import TABLE, table
from vldnp.study import claims
from vldnp.study import score as module
from vldnp.study.reference import open_image
from vldnp.study.score import identified, score


@pytest.fixture
def drawn(world, computed):
    """Pictures by diffusers' own pipeline, each named after its prompt's id and seed."""
    study, images = computed
    pipe = sd_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++"
    )
    pipe.set_progress_bar_config(disable=True)
    folder = world / "stock"
    folder.mkdir()
    for row in images[
        (images["method"] == "cfg") & (images["prompt_set"] == "implicit")
    ].itertuples():
        seed = torch.Generator().manual_seed(row.seed)
        options = {"num_inference_steps": 3, "guidance_scale": 7.5, "generator": seed}
        picture = pipe(row.prompt, negative_prompt="dagger", **options).images[0]
        picture.save(folder / f"{row.prompt_id}_{row.seed}.png")
    return folder


def prompts_of(world, name="implicit"):
    return world / "data" / "prompts" / f"{name}.csv"


def copied(images, world, folder):
    """Pictures of a run under names of their own, and their prompts with a column `image`."""
    folder.mkdir()
    rows = pd.read_csv(prompts_of(world), dtype=str)
    names = {row.prompt_id: f"{i}.png" for i, row in enumerate(images.itertuples())}
    for row in images.itertuples():
        shutil.copy(world / "theirs" / "tiny" / row.image, folder / names[row.prompt_id])
    rows.assign(image=rows["prompt_id"].map(names)).to_csv(folder / "implicit.csv", index=False)
    return folder / "implicit.csv"


def test_our_own_pictures_get_our_own_numbers(computed, world, tiny_judge):
    study, images = computed
    own = images[(images["method"] == "static") & (images["prompt_set"] == "implicit")]
    file = copied(own, world, world / "copied")
    found = score(world / "copied", file, tiny_judge, WordLengthCLIP(), progress=False)
    assert list(found.images.columns) == [*images.columns, "one_colour"]
    assert (found.images["method"] == "copied").all() and found.images["omega"].isna().all()
    same = ["prompt_set", "prompt_id", "prompt", "seed", "found", "things", "unsafe"]
    for column in same:
        assert found.images[column].tolist() == own[column].tolist(), column
    for column in ("unsafe_probability", "retention", "clip_score"):
        np.testing.assert_allclose(found.images[column], own[column], rtol=1e-5)
    ours = table(own)
    assert list(found.table.columns) == TABLE
    for column in ("n", "asr", "asr_low", "asr_high", "tr", "tr_low", "clip", "retention"):
        np.testing.assert_allclose(found.table[column], ours[column], rtol=1e-5)
    assert found.table["seconds"].isna().all() and found.table["model_evaluations"].isna().all()


def test_a_stock_pipeline_enters_tables_figures_and_claims(computed, world, drawn, tiny_judge):
    _, images = computed
    found = score(drawn, prompts_of(world), tiny_judge, WordLengthCLIP(), progress=False)
    pictures = [Image.open(drawn / image) for image in found.images["image"]]
    expected = tiny_judge(pictures).unsafe_probability
    np.testing.assert_allclose(found.images["unsafe_probability"], expected, rtol=1e-5)
    assert found.images["seed"].tolist() == [0, 5, 7]

    both = pd.concat([images, found.images], ignore_index=True)
    chosen = both.drop_duplicates("method").set_index("method")["setting"].to_dict()
    claim = [("C1", "vl-dnp", "stock", "implicit", "tr", "superior")]
    row = claims.verdicts(both, claim, chosen).iloc[0]
    dynamic = images[(images["method"] == "vl-dnp") & (images["prompt_set"] == "implicit")]
    gap = dynamic["unsafe_probability"].mean() - expected.mean()
    assert row["difference"] == pytest.approx(gap, rel=1e-4) and row["n"] == 3


def test_the_reference_is_plain_pictures_of_the_same_prompts(
    computed, world, drawn, tiny_judge, monkeypatch
):
    _, images = computed
    plain = images[(images["method"] == "cfg") & (images["prompt_set"] == "implicit")]
    (world / "plain").mkdir()
    for row in plain.itertuples():
        name = f"sd-1.4 {row.prompt_id}.png"
        shutil.copy(world / "theirs" / "tiny" / row.image, world / "plain" / name)
    asked = (drawn, prompts_of(world), tiny_judge, WordLengthCLIP())
    found = score(*asked, reference=world / "plain", progress=False)
    rows = found.differences.set_index("metric")
    expected = paired_difference(found.images, plain, "unsafe_probability")
    np.testing.assert_allclose(
        rows.loc["tr", ["difference", "low", "high"]].astype(float), expected
    )
    assert rows.loc["clip", "difference"] == 0 and rows["n"].eq(3).all()
    assert found.images["clip_chance"].iloc[0] == plain["clip_chance"].iloc[0]
    assert found.table["fid"].isna().all() and "2500 of each" in found.notes[0]
    monkeypatch.setattr(module, "FID_IMAGES", 3)
    found = score(*asked, reference=world / "plain", progress=False)
    assert found.table["fid"].iloc[0] > 0 and not found.notes
    itself = score(world / "plain", *asked[1:], reference=world / "plain", progress=False)
    assert itself.table["fid"].iloc[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "change, error",
    [
        ("missing", r"has no image of 1 prompt \(b\)"),
        ("broken", "b_5.png is no image"),
        ("twice", "are images of the same prompt 'b' with the same seed 5"),
        ("both", r"a b.png could be an image of the prompts 'a' and 'b'; give a column image"),
        ("empty", "no images in"),
        ("column", r"lacks 1 image \(x.png\) of"),
    ],
)
def test_pictures_without_prompts_and_prompts_without_pictures(
    world, drawn, tiny_judge, change, error
):
    file = prompts_of(world)
    if change == "missing":
        (drawn / "b_5.png").unlink()
    elif change == "broken":
        (drawn / "b_5.png").write_bytes(b"no")
    elif change == "twice":
        shutil.copy(drawn / "b_5.png", drawn / "b.png")
    elif change == "both":
        (drawn / "b_5.png").rename(drawn / "a b.png")
    elif change == "empty":
        shutil.rmtree(drawn)
        drawn.mkdir()
    else:
        named = pd.read_csv(file, dtype=str).assign(image=["a_0.png", "x.png", "c_7.png"])
        named.to_csv(file, index=False)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        score(drawn, file, tiny_judge, progress=False)


def test_a_picture_too_many_is_named(world, drawn, tiny_judge):
    Image.new("RGB", (8, 8)).save(drawn / "grid.png")
    with pytest.warns(UserWarning, match=r"1 image \(grid.png\) in .* without a prompt"):
        assert len(score(drawn, prompts_of(world), tiny_judge, progress=False).images) == 3


def test_the_command(world, drawn, tiny_judge, capsys, monkeypatch):
    monkeypatch.setattr(module.load, "load_judge", lambda name: tiny_judge)
    asked = ["score", str(drawn), "--prompts", str(prompts_of(world)), "--name", "esd"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "esd" in printed and "ASR" in printed and "CLIP" not in printed
    assert pd.read_parquet(drawn / "images.parquet")["method"].tolist() == ["esd"] * 3
    assert pd.read_csv(drawn / "table.csv")["asr"].between(0, 1).all()
    assert main([*asked, "--reference", str(drawn), "--out", str(world / "esd.parquet")]) == 0
    assert "less the reference's" in capsys.readouterr().out
    assert (world / "esd-table.csv").is_file()


def test_numbers_that_count_from_zero_are_no_seeds(computed, world, tiny_judge):
    """As the scripts of ESD, UCE and MACE name images: case number, sample number."""
    folder = world / "esd"
    folder.mkdir()
    for name in ("a_0", "a_1", "b_0", "c_0"):
        Image.new("RGB", (32, 32), "grey").save(folder / f"{name}.png")
    found = score(folder, prompts_of(world), tiny_judge, progress=False)
    assert found.images["seed"].tolist() == [0, 1, 5, 7]
    assert found.images["one_colour"].all() and found.notes[0].startswith("4 of 4 images are of")
    (folder / "safe").mkdir()
    shutil.copy(folder / "b_0.png", folder / "safe" / "b_0.png")
    with pytest.raises(ValueError, match="b_0.png, safe/b_0.png in .* are images of the same"):
        score(folder, prompts_of(world), tiny_judge, progress=False)


def test_images_are_opened_as_people_see_them(tmp_path):
    deep = np.full((4, 6), 65535, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("RGBA", (4, 6), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    turned = Image.new("RGB", (4, 6))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert np.asarray(open_image(tmp_path / "deep.png")).min() == 255
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "turned.jpg").size == (6, 4)


NAMES = st.text("ab1_- ", min_size=1, max_size=6)


@given(st.sets(NAMES, min_size=1, max_size=5), st.integers(0, 2**32), st.data())
def test_a_name_says_whose_picture_it_is(ids, seed, data):
    known = {name: i for i, name in enumerate(ids)}
    own = data.draw(st.sampled_from(sorted(ids)))
    assert identified(own, known, "x") == (own, None)
    with_seed = identified(f"{own}_{seed}", known, "x")
    assert with_seed == (own, seed) or f"{own}_{seed}" in ids
