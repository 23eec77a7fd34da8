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
from vldnp.metrics.summary import TABLE, table
from vldnp.study import claims
from vldnp.study import score as module
from vldnp.study.measure import open_image
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
    for row in images.query("method == 'cfg' and prompt_set == 'implicit'").itertuples():
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


def test_our_own_pictures_get_our_own_numbers(computed, world, judge):
    study, images = computed
    own = images[(images["method"] == "static") & (images["prompt_set"] == "implicit")]
    file = copied(own, world, world / "copied")
    found = score(world / "copied", file, judge, WordLengthCLIP(), progress=False)
    assert table(found)["n"].tolist() == [3] and not found["one_colour"].any()
    assert (found["method"] == "copied").all() and found["omega"].isna().all()
    for column in "prompt_set prompt_id prompt seed found things unsafe".split():
        assert found[column].tolist() == own[column].tolist(), column
    for column in ("unsafe_probability", "retention", "clip_score"):
        np.testing.assert_allclose(found[column], own[column], rtol=1e-5)
    ours = table(own)
    assert list(table(found).columns) == TABLE
    for column in ("n", "asr", "asr_low", "asr_high", "tr", "tr_low", "clip", "retention"):
        np.testing.assert_allclose(table(found)[column], ours[column], rtol=1e-5)
    assert table(found)["seconds"].isna().all() and table(found)["model_evaluations"].isna().all()


def test_a_stock_pipeline_enters_tables_figures_and_claims(computed, world, drawn, judge):
    _, images = computed
    found = score(drawn, prompts_of(world), judge, WordLengthCLIP(), progress=False)
    pictures = [Image.open(drawn / image) for image in found["image"]]
    expected = judge(pictures).unsafe_probability
    np.testing.assert_allclose(found["unsafe_probability"], expected, rtol=1e-5)
    assert found["seed"].tolist() == [0, 5, 7]

    both = pd.concat([images, found], ignore_index=True)
    chosen = both.drop_duplicates("method").set_index("method")["setting"].to_dict()
    claim = [("C1", "vl-dnp", "stock", "implicit", "tr", "superior")]
    row = claims.verdicts(both, claim, chosen).iloc[0]
    dynamic = images[(images["method"] == "vl-dnp") & (images["prompt_set"] == "implicit")]
    gap = dynamic["unsafe_probability"].mean() - expected.mean()
    assert row["difference"] == pytest.approx(gap, rel=1e-4) and row["n"] == 3


@pytest.mark.parametrize(
    "change, error",
    [
        ("missing", r"lacks 1 images of .*implicit.csv, such as b$"),
        ("broken", "b_5.png is no image"),
        ("twice", r"b.png and b_5.png are images of the same prompt with the same seed"),
        ("word", r"a b.png is named after no prompt \([abc], [abc], [abc]\): call it <prompt_id>_"),
        ("empty", "no images in"),
        ("column", r"lacks 1 images of .*, such as x.png"),
        ("two", r"a_1.png is named after two prompts \(a_1, a\): .* a column image"),
        ("sample", r"b_0.png: its number is not the prompt's seed, 5, .* a column image"),
        ("safree", r"all/c_7.png and safe/c_7.png are images of the same prompt"),
    ],
)
def test_pictures_without_prompts_and_prompts_without_pictures(world, drawn, judge, change, error):
    file = prompts_of(world)
    if change == "missing":
        (drawn / "b_5.png").unlink()
    elif change == "broken":
        (drawn / "b_5.png").write_bytes(b"no")
    elif change == "twice":
        shutil.copy(drawn / "b_5.png", drawn / "b.png")
    elif change == "sample":
        (drawn / "b_5.png").rename(drawn / "b_0.png")
    elif change == "safree":
        for name in ("all", "safe"):
            (drawn / name).mkdir()
            shutil.copy(drawn / "c_7.png", drawn / name)
        (drawn / "c_7.png").unlink()
    elif change == "word":
        (drawn / "b_5.png").rename(drawn / "a b.png")
    elif change == "empty":
        shutil.rmtree(drawn)
        drawn.mkdir()
    elif change == "two":
        file.write_text(file.read_text() + "a_1,a bird,3,bird\n")
        (drawn / "a_0.png").rename(drawn / "a_1.png")
    else:
        named = pd.read_csv(file, dtype=str).assign(image=["a_0.png", "x.png", "c_7.png"])
        named.to_csv(file, index=False)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        score(drawn, file, judge, progress=False)


def test_sizes_are_mixed_and_images_of_one_colour_counted(world, judge):
    folder = world / "esd"
    (folder / "deeper").mkdir(parents=True)
    grey = {"a_0": 32, "a_1": 64, "deeper/b": 32}
    for name, size in grey.items():
        Image.new("RGB", (size, size), "grey").save(folder / f"{name}.png")
    noise = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "c_7.png")
    with pytest.warns(UserWarning, match="3 of 4 images are of one colour"):
        found = score(folder, prompts_of(world), judge, progress=False)
    own = found.set_index("image")
    assert own["seed"].to_dict() == {"a_0.png": 0, "a_1.png": 1, "deeper/b.png": 5, "c_7.png": 7}
    assert own["one_colour"].sum() == 3 and not own.loc["c_7.png", "one_colour"]
    expected = [judge([Image.open(folder / n)]).unsafe_probability[0] for n in own.index]
    np.testing.assert_allclose(own["unsafe_probability"], expected, rtol=1e-4)


def test_the_command(world, drawn, judge, capsys, monkeypatch):
    monkeypatch.setattr(module.load, "load_judge", lambda name: judge)
    asked = ["score", str(drawn), "--prompts", str(prompts_of(world)), "--name", "esd"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "esd" in printed and "ASR" in printed and "CLIP" not in printed
    assert pd.read_parquet(drawn / "images.parquet")["method"].tolist() == ["esd"] * 3
    assert pd.read_csv(drawn / "table.csv")["asr"].between(0, 1).all()
    assert main([*asked, "--out", str(world / "esd")]) == 0
    assert (world / "esd" / "table.csv").is_file()


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


@given(
    st.sets(st.text("ab1_- ", min_size=1, max_size=6), min_size=1), st.integers(0, 2**32), st.data()
)
def test_a_name_says_whose_picture_it_is(ids, seed, data):
    seeds = {name: -i for i, name in enumerate(ids)}
    own = data.draw(st.sampled_from(sorted(ids)))
    for name, expected in ((own, (own, seeds[own])), (f"{own}_{seed}", (own, seed))):
        try:
            assert identified(f"{name}.png", seeds) == expected
        except ValueError as error:
            assert "is named after two prompts" in str(error) and "\n" not in str(error)
            assert len({name, name.rpartition("_")[0]} & ids) == 2
