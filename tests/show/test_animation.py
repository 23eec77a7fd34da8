"""The animation of a trajectory, read back from its file."""

import numpy as np
import pytest
from PIL import Image

from vldnp.show import animation
from vldnp.show.blur import data_uri

RED, GREEN, BLUE = (np.array(colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200)))


def column(colour, *, queries=(), reason=None):
    """Three places: no picture, a grey one, one of this colour."""
    pictures = [Image.new("RGB", (8, 8), "grey"), Image.new("RGB", (8, 8), tuple(colour))]
    captions = [["step 0"], ["step 1", "VLM: “$a <b>”", "away from: a"], ["final image"]]
    return {
        "label": "any",
        "method": "vl-dnp" if queries else "cfg",
        "pictures": [data_uri(picture) for picture in pictures],
        "reasons": [None, reason],
        "queries": list(queries),
        "places": [
            {"picture": picture, "probability": None, "caption": lines}
            for picture, lines in zip((None, 0, 1), captions, strict=True)
        ],
    }


def trajectory(*columns):
    return {"prompt": "a $cat\n" * 50, "seed": 0, "num_steps": 2, "columns": list(columns)}


def share(picture, colour) -> float:
    """How much of a picture is of about this colour."""
    return (np.abs(np.asarray(picture.convert("RGB"), float) - colour).max(-1) < 40).mean()


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_all_places_side_by_side_in_the_given_time(tmp_path, suffix):
    path = tmp_path / "figures" / f"any.{suffix}"
    path = animation.save(trajectory(column(RED), column(BLUE, queries=[1])), path, seconds=5)
    milliseconds, seen = [], []
    with Image.open(path) as moving:
        assert moving.n_frames == 3 and moving.info["loop"] == 0
        for place in range(3):
            moving.seek(place)
            moving.load()
            milliseconds.append(moving.info["duration"])
            halves = [moving.crop(box) for box in ((0, 0, 330, 500), (330, 0, 660, 500))]
            seen.append([share(halves[0], RED) > 0.3, share(halves[1], BLUE) > 0.3])
    assert milliseconds == [1000, 1000, 3000]
    assert seen == [[False, False], [False, False], [True, True]]
    assert list(path.parent.iterdir()) == [path]


def test_the_vlms_words_stay_until_it_is_asked_again():
    asked = column(RED, queries=[0, 2])
    asked["places"][0]["caption"] = ["step 0", "VLM: “first”", "away from: a"]
    asked["places"][1]["caption"] = ["step 1", "away from: a"]
    assert animation._caption(asked, 1) == ["step 1", "VLM: “first”", "away from: a"]
    assert animation._caption(asked, 0) == asked["places"][0]["caption"]
    assert animation._caption(asked, 2) == ["final image"]


def test_what_the_judge_flags_is_blurred_unless_revealed():
    half = column(RED, reason="judged unsafe: a knife")
    stripes = np.where(np.arange(64)[:, None, None] % 8 < 4, RED, GREEN).repeat(64, 1)
    half["pictures"][1] = data_uri(Image.fromarray(stripes.astype(np.uint8)))
    hidden, shown = (animation.frame(trajectory(half), 2, reveal) for reveal in (False, True))
    assert share(shown, RED) > 0.1 and share(hidden, RED) < 0.02


def test_an_animation_shorter_than_its_final_image(tmp_path):
    with pytest.raises(ValueError, match="more than 3 seconds, not 2"):
        animation.save(trajectory(column(RED)), tmp_path / "any.webp", seconds=2)
    assert not list(tmp_path.iterdir())
