import warnings

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vldnp._files import data_folder
from vldnp.study.prompts import (
    LARGEST_SEED,
    OPTIONAL,
    REQUIRED,
    load_prompts,
    sampled,
    save_prompts,
    split_things,
)


def csv(tmp_path, text, name="set.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_set_gets_every_column(tmp_path):
    table = load_prompts(csv(tmp_path, "prompt_id,prompt,seed\na,a cat,7\n007,null,0\n"))
    assert tuple(table.columns) == REQUIRED + OPTIONAL
    assert table["prompt_id"].tolist() == ["a", "007"]
    assert table["prompt"].tolist() == ["a cat", "null"]
    assert table["seed"].tolist() == [7, 0]
    assert table["guidance_scale"].isna().all() and (table["things"] == "").all()


def test_column_names_of_public_sets_are_understood(tmp_path):
    # I2P
    table = load_prompts(
        csv(tmp_path, "unique_id,prompt,categories,sd_seed,sd_guidance_scale\n1,x,sexual,5,7.5\n")
    )
    assert table.loc[0, ["prompt_id", "seed", "guidance_scale", "category"]].tolist() == [
        "1",
        5,
        7.5,
        "sexual",
    ]
    # a column with the schema's own name wins
    table = load_prompts(csv(tmp_path, "case_number,prompt,seed,evaluation_seed\n3,x,1,2\n"))
    assert table["seed"].tolist() == [1] and table["prompt_id"].tolist() == ["3"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("prompt_id,text\n1,x\n", "lacks the columns prompt, seed"),
        ("prompt_id,prompt\n1,x\n", "lacks the column seed"),
        ("prompt_id,prompt,seed\n", "is empty"),
        ("", "is no CSV table"),
        ("prompt_id,prompt,seed\n1,x,0\n1,y,0\n", "prompt_id '1' more than once"),
        ("prompt_id,prompt,seed\n1,x,0\n2,y,-1\n", "row 3: the seed '-1'"),
        ("prompt_id,prompt,seed\n1,x,1.5\n", "row 2: the seed '1.5'"),
        ("prompt_id,prompt,seed\n1,x,\n", "row 2: the seed ''"),
        ("prompt_id,prompt,seed\n1,x,9223372036854775808\n", "the seed"),
        ("prompt_id,prompt,seed\n,x,0\n", "row 2: the prompt_id is empty"),
        ("prompt_id,prompt,seed,seed\n1,x,0,1\n", "more than one column seed"),
        ("prompt,sd_seed,evaluation_seed\nx,0,1\n", "columns={'seed': 'sd_seed'}"),
        ("target_prompt,adv_prompt\nx,y\n", "lacks the column seed; say which it is, columns="),
        ("prompt_id,prompt,seed,guidance_scale\n1,x,0,high\n", "the guidance_scale 'high'"),
        ("unique_id,case_number,prompt,seed\n1,2,x,0\n", "for prompt_id: say which"),
        ('prompt_id,prompt,seed\n1,"x,0\n', "is no CSV table"),
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
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        load_prompts(tmp_path / "none.csv")
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no data folder"):
        load_prompts("implicit")


@pytest.mark.parametrize("name", sorted(p.stem for p in (data_folder() / "prompts").glob("*.csv")))
def test_shipped_sets_fit_the_schema(name):
    table = load_prompts(name)
    assert len(table) and table["prompt_id"].is_unique


def test_things_are_split():
    assert split_things("cat, pizza") == ("cat", "pizza")
    assert split_things("") == ()


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


UGLY = (
    b"\xef\xbb\xbf,Unnamed: 0.1,case_number,prompt,evaluation_seed\r\n"  # a byte-order mark
    b'0,0,7,"a cat\r\non two lines",3\r\n'
    b"1,1,8,,4\r\n"
    b"\r\n"
    b"2,2,9,caf\xe9,5.0\r\n"  # Latin-1
    b'3,3,10,"a ""dog"", and so on",6\r\n'
)


def test_published_files_are_read_as_they_are(tmp_path):
    (tmp_path / "ugly.csv").write_bytes(UGLY)
    with pytest.warns(UserWarning) as warned:
        table = load_prompts(tmp_path / "ugly.csv")
    assert table["prompt_id"].tolist() == ["7", "9", "10"]
    assert table["prompt"].tolist() == ["a cat\r\non two lines", "caf\ufffd", 'a "dog", and so on']
    assert table["seed"].tolist() == [3, 5, 6] and table.index.tolist() == [0, 1, 2]
    assert [str(w.message).split("ugly.csv ")[1] for w in warned] == [
        "is not UTF-8; what is not is shown as \ufffd",
        "has no prompt in line 4, 5; left out",
    ]


def test_errors_name_the_files_own_line(tmp_path):
    text = 'prompt_id,prompt,seed\n1,"x\ny",0\n2,z,-1\n'
    with pytest.raises(ValueError, match="row 4: the seed '-1'"):
        load_prompts(csv(tmp_path, text))
    with pytest.raises(ValueError, match="line 3 has 4 fields, the header 3"):
        load_prompts(csv(tmp_path, "prompt_id,prompt,seed\n1,x,0\n2,y,0,z\n"))


def test_columns_are_mapped_and_missing_ones_made_up(tmp_path):
    file = csv(tmp_path, "text,clean prompt,note\na cat,b,c\na dog,d,e\n")
    table = load_prompts(file, {"prompt": "text", "category": ["kind", "note"]}, seed=5)
    assert table["prompt"].tolist() == ["a cat", "a dog"]
    assert table["seed"].tolist() == [5, 5] and table["prompt_id"].tolist() == ["1", "2"]
    assert table["category"].tolist() == ["c", "e"]
    with pytest.raises(ValueError, match="no column 'words'; it has text, clean prompt"):
        load_prompts(file, {"prompt": "words"}, seed=5)
    with pytest.raises(ValueError, match="unknown column of a prompt set 'promt'"):
        load_prompts(file, {"promt": "text"}, seed=5)
    with pytest.raises(ValueError, match="lacks the column prompt"):
        load_prompts(file, seed=5)


def test_i2ps_own_columns_and_the_files_of_spreadsheets(tmp_path):
    head = "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height"
    table = load_prompts(csv(tmp_path, f"{head}\nx,sexual,5,7.5,512,768\n"))
    own = table.loc[0, ["seed", "guidance_scale", "width", "height"]].tolist()
    assert own == [5, 7.5, 512, 768]
    both = csv(tmp_path, "prompt,sd_seed,evaluation_seed\nx,0,1\n")
    assert load_prompts(both, {"seed": "evaluation_seed"})["seed"].tolist() == [1]
    for mark, name in (("\t", "set.tsv"), (";", "semi.csv")):
        file = csv(tmp_path, f"prompt{mark}seed\na cat, a dog{mark}3\n".replace(",", ""), name)
        assert load_prompts(file)["prompt"].tolist() == ["a cat a dog"]
    for name, data in (("a.xlsx", b"PK"), ("a.jsonl", b"{}"), ("a.csv", "prompt".encode("utf-16"))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is no CSV table: save it as CSV in UTF-8"):
            load_prompts(tmp_path / name)


def test_parquet_is_read_like_csv(tmp_path):
    frame = pd.DataFrame({"adv_prompt": ["a cat", "a dog"], "evaluation_seed": [1.0, 2.0]})
    frame.to_parquet(tmp_path / "set.parquet")
    table = load_prompts(tmp_path / "set.parquet")
    assert table["prompt"].tolist() == ["a cat", "a dog"] and table["seed"].tolist() == [1, 2]
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="bad.parquet is no Parquet table"):
        load_prompts(tmp_path / "bad.parquet")


def test_rows_of_a_category(tmp_path):
    text = 'prompt_id,prompt,seed,categories\n1,x,0,"hate, sexual"\n2,y,0,shocking\n3,z,0,sexual\n'
    table = load_prompts(csv(tmp_path, text), category="sexual")
    assert table["prompt_id"].tolist() == ["1", "3"] and table.index.tolist() == [0, 1]
    with pytest.raises(ValueError, match="'sexy': did you mean 'sexual'.*hate, sexual, shocking"):
        load_prompts(csv(tmp_path, text), category="sexy")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80))
def test_any_bytes_are_a_table_or_one_line(tmp_path, data):
    (tmp_path / "any.csv").write_bytes(b"prompt,seed\n" + data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert len(load_prompts(tmp_path / "any.csv"))
        except ValueError as error:
            assert "any.csv" in str(error) and "\n" not in str(error)


text = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=20)
rows = st.fixed_dictionaries(
    {
        "prompt_id": text,
        "prompt": text.filter(str.strip),
        "seed": st.integers(0, LARGEST_SEED),
        "guidance_scale": st.one_of(st.none(), st.floats(0, 100)),
        "category": st.one_of(st.just(""), text),
        "things": st.one_of(st.just(""), text),
    }
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(rows, min_size=1, max_size=6, unique_by=lambda row: row["prompt_id"]))
def test_what_is_saved_comes_back(tmp_path, records):
    table = pd.DataFrame(records)
    save_prompts(table, tmp_path / "round.csv")
    loaded = load_prompts(tmp_path / "round.csv")
    for column in ("prompt_id", "prompt", "seed", "category", "things"):
        assert loaded[column].tolist() == table[column].tolist()
    scales = table["guidance_scale"].astype(float)
    pd.testing.assert_series_equal(loaded["guidance_scale"], scales)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub's cache as `huggingface_hub` lays it out, with one data set, and no connection."""
    snapshot = tmp_path / "datasets--someone--prompts" / "snapshots" / COMMIT
    (snapshot / "data").mkdir(parents=True)
    table = pd.DataFrame({"text": ["a cat", "a dog"], "n": [4, 5], "g": [7.5, 3.0]})
    table.to_parquet(snapshot / "data" / "train.parquet")
    (snapshot / "plain.csv").write_text("prompt,seed\na cat,1\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return f"hub://someone/prompts/{{}}@{COMMIT}"


def test_a_data_set_of_the_hub_is_read_with_a_column_map(hub_cache):
    columns = {"prompt": ["caption", "text"], "seed": "n", "guidance_scale": "g"}
    table = load_prompts(hub_cache.format("data/train.parquet"), columns)
    assert table["prompt"].tolist() == ["a cat", "a dog"]
    assert table["seed"].tolist() == [4, 5] and table["guidance_scale"].tolist() == [7.5, 3]
    assert load_prompts(hub_cache.format("plain.csv"))["seed"].tolist() == [1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"hub://someone/prompts/other.csv@{COMMIT}", "cannot be fetched from someone/prompts: "),
        ("hub://someone/prompts/plain.csv", "write hub://owner/name/file@commit"),
        ("hub://someone/prompts/plain.csv@main", "the commit's 40 digits"),
        (f"hub://someone/prompts/plain.json@{COMMIT}", "a .csv, .tsv or .parquet"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub_cache, address, message):
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(address)
    assert "\n" not in str(error.value)


@given(st.text().map(lambda text: f"hub://{text}"))
def test_any_address_that_names_no_commit_is_one_line(address):
    with pytest.raises(ValueError, match="is no file of a hub's data set") as error:
        load_prompts(address)
    assert len(str(error.value).splitlines()) == 1
