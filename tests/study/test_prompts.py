"""Prompt sets as tables."""

import warnings

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moji.train.prompt_sets import save_prompts
from vldnp._files import data_folder
from vldnp.study.prompts import LARGEST_SEED, OPTIONAL, REQUIRED, load_prompts, sampled


def csv(tmp_path, text, name="set.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_minimal_set_gets_every_column(tmp_path):
    table = load_prompts(csv(tmp_path, "prompt_id,prompt,seed\na,a cat,7\n007,null,0\n"))
    assert tuple(table.columns) == REQUIRED + OPTIONAL
    assert table["prompt_id"].tolist() == ["a", "007"]
    assert table["prompt"].tolist() == ["a cat", "null"] and table["seed"].tolist() == [7, 0]
    assert table["guidance_scale"].isna().all() and (table["things"] == "").all()


def test_column_names_of_public_sets_are_understood(tmp_path):
    head = "unique_id,prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height"
    table = load_prompts(csv(tmp_path, f"{head}\n1,x,sexual,5,7.5,512,768\n"))
    own = ["prompt_id", "seed", "guidance_scale", "category", "width", "height"]
    assert table.loc[0, own].tolist() == ["1", 5, 7.5, "sexual", 512, 768]
    head = "case_number,prompt,adv_prompt,seed,evaluation_seed"  # our own names go first
    table = load_prompts(csv(tmp_path, f"{head}\n3,x,y,1,2\n"))
    assert table.loc[0, [*REQUIRED]].tolist() == ["3", "x", 1]
    both = csv(tmp_path, "prompt,sd_seed,evaluation_seed\nx,0,1\n")
    assert load_prompts(both)["seed"].tolist() == [1]
    assert load_prompts(both, {"seed": "sd_seed"})["seed"].tolist() == [0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("prompt_id,text\n1,x\n", "lacks prompt and seed; it has prompt_id, text: say with col"),
        ("prompt_id,prompt\n1,x\n", "lacks seed; it has"),
        ("prompt_id,prompt,seed\n", "is empty"),
        ("", "is no table, CSV or TSV in UTF-8"),
        ("prompt_id,prompt,seed\n1,x,0\n1,y,0\n", "row 3: the prompt_id '1' is empty, or there"),
        ("prompt_id,prompt,seed\n1,x,0\n2,y,-1\n", "row 3: the seed '-1' is not a whole number"),
        ("prompt_id,prompt,seed\n1,x,1.5\n", "row 2: the seed '1.5'"),
        ("prompt_id,prompt,seed\n1,x,\n", "row 2: the seed ''"),
        ("prompt_id,prompt,seed\n1,x,9223372036854775808\n", "the seed"),
        ("prompt_id,prompt,seed\n,x,0\n", "row 2: the prompt_id '' is empty"),
        ("prompt_id,prompt,seed,seed\n1,x,0,1\n", "more than one column 'seed'"),
        ("prompt_id,prompt,seed,guidance_scale\n1,x,0,high\n", "the guidance_scale 'high'"),
        ('prompt_id,prompt,seed\n1,"x,0\n', "is no table"),
        ("prompt_id,prompt,seed\n1,x,0\n2,y,0,z\n", "Expected 3 fields in line 3, saw 4"),
        (b"prompt_id,prompt,seed\n1,caf\xe9,0\n", "can't decode byte 0xe9"),
        ("prompt,seed\n".encode("utf-16"), "is no table"),
        ("prompt_id;prompt;seed\n1;x;0\n", "is separated by ';': save it with ','"),
        ("prompt\tseed\nx\t0\n", "is separated by '\\t': save it with ','"),
    ],
)
def test_bad_sets_are_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        load_prompts(csv(tmp_path, text))
    assert message in str(error.value) and "set.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_sets_are_named_with_the_closest(tmp_path, monkeypatch):
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "profiles").mkdir()
    csv(tmp_path / "prompts", "prompt_id,prompt,seed\n1,x,0\n", "implicit.csv")
    assert len(load_prompts("implicit")) == 1
    with pytest.raises(ValueError, match="unknown prompt set 'implicid': did you mean 'implicit'"):
        load_prompts("implicid")
    for name, message in (("none.csv", "does not exist"), ("set.jsonl", "is no table")):
        csv(tmp_path, "{}", "set.jsonl")
        with pytest.raises((FileNotFoundError, ValueError), match=f"{name} {message}"):
            load_prompts(tmp_path / name)
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no data in"):
        load_prompts("implicit")


@pytest.mark.parametrize("name", sorted(p.stem for p in (data_folder() / "prompts").glob("*.csv")))
def test_shipped_sets_fit_the_schema(name):
    table = load_prompts(name)
    assert len(table) and table["prompt_id"].is_unique


@given(st.integers(1, 40), st.integers(0, 45), st.integers(0, 99))
def test_a_sample_is_rows_in_order_and_a_smaller_one_is_part_of_it(size, count, seed):
    table = pd.DataFrame({"prompt_id": [f"{n}" for n in range(size)]})
    drawn = sampled(table, count, seed)
    assert len(drawn) == min(count or size, size) and drawn.index.is_monotonic_increasing
    assert drawn.index.is_unique and sampled(table, count, seed).equals(drawn)
    if count:
        assert set(sampled(table, max(1, count // 2), seed)["prompt_id"]) <= set(drawn["prompt_id"])


def test_every_row_is_drawn_as_often():
    table = pd.DataFrame({"prompt_id": range(10)})
    counts = pd.concat(sampled(table, 3, seed)["prompt_id"] for seed in range(2000)).value_counts()
    assert len(counts) == 10 and counts.between(480, 720).all()  # 600 ± 6 standard deviations
    assert sampled(table, None) is table


def test_published_files_are_read_as_they_are(tmp_path):
    ugly = (
        b"\xef\xbb\xbf,Unnamed: 0.1,case_number,prompt,evaluation_seed\r\n"  # a byte-order mark
        b'0,0,7,"a cat\r\non two lines",3\r\n1,1,8,,4\r\n\r\n2,2,9,caf\xc3\xa9,5.0\r\n'
        b'3,3,10,"a ""dog"", and so on",6\r\n'
    )
    with pytest.warns(UserWarning, match="has no prompt in row 3, 4; left out"):
        table = load_prompts(csv(tmp_path, ugly))
    assert table["prompt_id"].tolist() == ["7", "9", "10"]
    assert table["prompt"].tolist() == ["a cat\r\non two lines", "café", 'a "dog", and so on']
    assert table["seed"].tolist() == [3, 5, 6] and table.index.tolist() == [0, 1, 2]


def test_columns_are_mapped_and_missing_ones_made_up(tmp_path):
    files = csv(tmp_path, "text\tnote\na cat\tc\n", "a.tsv"), csv(tmp_path, "text,note\na cat,c")
    for file in files:
        table = load_prompts(file, {"prompt": "text", "category": "note"}, seed=5)
        assert table.loc[0, [*REQUIRED, "category"]].tolist() == ["1", "a cat", 5, "c"]
    with pytest.raises(ValueError, match="no column 'words'; it has text, note"):
        load_prompts(file, {"prompt": "words"}, seed=5)
    with pytest.raises(ValueError, match="unknown column of a prompt set 'promt'"):
        load_prompts(file, {"prompt": "text", "promt": "text"}, seed=5)


def test_parquet_is_read_like_csv(tmp_path):
    frame = pd.DataFrame({"adv_prompt": ["a cat", "a dog"], "evaluation_seed": [1.0, 2.0]})
    frame.assign(n=[4, 5], g=[7.5, 3.0]).to_parquet(tmp_path / "set.parquet")
    table = load_prompts(tmp_path / "set.parquet")
    assert table["prompt"].tolist() == ["a cat", "a dog"] and table["seed"].tolist() == [1, 2]
    table = load_prompts(tmp_path / "set.parquet", {"seed": "n", "guidance_scale": "g"})
    assert table["seed"].tolist() == [4, 5] and table["guidance_scale"].tolist() == [7.5, 3]
    with pytest.raises(ValueError, match="bad.parquet is no table"):
        load_prompts(csv(tmp_path, b"no table", "bad.parquet"))


any_folder = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_folder
@given(st.binary(max_size=80))
def test_any_bytes_are_a_table_or_one_line(tmp_path, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert len(load_prompts(csv(tmp_path, b"prompt,seed\n" + data)))
        except ValueError as error:
            assert "set.csv" in str(error) and "\n" not in str(error)


text = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=20)
row = {"prompt_id": text, "prompt": text.filter(str.strip), "seed": st.integers(0, LARGEST_SEED)}
row |= {name: st.just("") | text for name in ("category", "things")}
row["guidance_scale"] = st.none() | st.floats(0, 100)


@any_folder
@given(
    st.lists(st.fixed_dictionaries(row), min_size=1, max_size=6, unique_by=lambda r: r["prompt_id"])
)
def test_what_is_saved_comes_back(tmp_path, records):
    table = pd.DataFrame(records)
    save_prompts(table, tmp_path / "round.csv")
    loaded = load_prompts(tmp_path / "round.csv")
    for column in ("prompt_id", "prompt", "seed", "category", "things"):
        assert loaded[column].tolist() == table[column].tolist()
    scales = table["guidance_scale"].astype(float)
    pd.testing.assert_series_equal(loaded["guidance_scale"], scales)
