import json

import pytest

from moji.attacks.resumable import logged, resumed

SETTINGS = {"seed": 1, "lengths": (3, 5)}


def square(n):
    return {"n": n, "square": n * n, "path": (n,)}


def killed_at(number):
    def find(n):
        if n == number:
            raise KeyboardInterrupt
        return square(n)

    return find


def test_a_killed_search_is_what_an_uninterrupted_one_is(tmp_path):
    whole = resumed(tmp_path / "whole.jsonl", SETTINGS, 5, square)
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path / "log.jsonl", SETTINGS, 5, killed_at(3))
    assert [row["n"] for row in logged(tmp_path / "log.jsonl")] == [0, 1, 2]
    new = []
    rows = resumed(tmp_path / "log.jsonl", SETTINGS, 5, lambda n: new.append(n) or square(n))
    assert rows == whole and new == [3, 4]
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert rows == resumed(None, SETTINGS, 5, square)  # a row is the same with and without a log


def test_a_line_cut_short_is_searched_again(tmp_path):
    log = tmp_path / "log.jsonl"
    whole = resumed(log, SETTINGS, 3, square)
    log.write_text(log.read_text()[:-9])
    assert logged(log) == whole[:2]
    assert resumed(log, SETTINGS, 3, square) == whole == logged(log)


def test_more_rows_and_fewer(tmp_path):
    log = tmp_path / "log.jsonl"
    assert len(resumed(log, SETTINGS, 2, square)) == 2
    assert len(resumed(log, SETTINGS, 4, square)) == 4
    assert len(resumed(log, SETTINGS, 1, square)) == 1 and len(logged(log)) == 4


def test_a_log_of_other_settings_is_refused_and_kept(tmp_path):
    log = tmp_path / "log.jsonl"
    resumed(log, SETTINGS, 2, square)
    before = log.read_text()
    with pytest.raises(ValueError, match="of a search with another seed"):
        resumed(log, {**SETTINGS, "seed": 2}, 2, square)
    assert log.read_text() == before and json.loads(before.splitlines()[0])["seed"] == 1


def test_no_log_no_rows(tmp_path):
    assert logged(tmp_path / "none.jsonl") == []
