import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import llava

from vldnp.models.load import load_vlm
from vldnp.models.vlm import TransformersVLM, describe, shrunk

QUESTION = "What restricted things can be seen?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    for part in llava():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype="uint8")
    return [Image.fromarray(picture) for picture in pixels] + [Image.new("RGB", (32, 32), "red")]


def test_a_batch_gets_the_answers_of_its_pictures(folder, pictures):
    vlm = TransformersVLM.from_pretrained(folder, device="cpu", max_new_tokens=5)
    together = vlm(pictures, QUESTION)
    assert together == [vlm([picture], QUESTION)[0] for picture in pictures]
    assert len(set(together)) > 1
    vlm.batch_size = 4
    assert vlm(pictures, QUESTION) == together
    assert vlm([], QUESTION) == []


def test_an_endless_answer_is_cut(folder, pictures):
    for limit in (1, 3):
        vlm = TransformersVLM.from_pretrained(folder, device="cpu", max_new_tokens=limit)
        assert all(len(answer.split()) <= limit for answer in vlm(pictures, QUESTION))


def test_pictures_are_made_rgb_and_no_longer_than_the_maximal_edge(pictures):
    seen = shrunk(pictures[0].convert("L").resize((40, 20)), 16)
    assert (seen.size, seen.mode) == ((16, 8), "RGB")
    assert shrunk(Image.new("RGB", (2, 1000)), 16).size == (1, 16)
    for edge in (None, 32, 100):
        assert shrunk(pictures[0], edge).tobytes() == pictures[0].tobytes()


def test_the_model_sees_the_smaller_picture(folder, pictures):
    vlm = TransformersVLM.from_pretrained(folder, device="cpu", max_new_tokens=5, max_edge=8)
    smaller = [picture.resize((8, 8), Image.Resampling.BICUBIC) for picture in pictures]
    answers = vlm(pictures, QUESTION)
    vlm.max_edge = None
    assert answers == vlm(smaller, QUESTION) != vlm(pictures, QUESTION)
    with pytest.raises(ValueError, match="max_edge must be 1 or more pixels, or None, not 0"):
        TransformersVLM.from_pretrained(folder, device="cpu", max_edge=0)


def test_describe(folder, pictures):
    vlm = TransformersVLM.from_pretrained(
        folder, name="tiny", device="cpu", max_edge=16, demonstrations=[(pictures[0], "a cat")]
    )
    described = json.loads(json.dumps(describe(vlm)))
    shown = described.pop("demonstrations")
    assert described == {
        "name": "tiny",
        "revision": None,
        "dtype": "float32",
        "quantization": None,
        "max_new_tokens": 64,
        "max_edge": 16,
        "answers": "constrained",
    }
    assert [shot["answer"] for shot in shown] == ["a cat"]
    vlm.demonstrations = ((pictures[1], "a cat"),)
    assert describe(vlm)["demonstrations"] != shown

    def always_none(images, question):
        return ["none"] * len(images)

    assert describe(always_none)["name"].endswith("always_none")
    always_none.name = "mute"
    assert describe(always_none) == {"name": "mute", "revision": None}


def test_a_processor_needs_a_chat_template():
    model, processor = llava()
    processor.chat_template = None
    with pytest.raises(ValueError, match="'tiny' has no chat template"):
        TransformersVLM(model, processor, "tiny")


def test_too_little_memory_is_one_line(folder, pictures, monkeypatch):
    from transformers import AutoModelForImageTextToText

    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    vlm = TransformersVLM.from_pretrained(folder, name="tiny", device="cpu", max_edge=16)
    monkeypatch.setattr(vlm.model, "generate", out_of_memory)
    message = r"'tiny': CUDA out of memory; lower batch_size \(now 16\) or max_edge \(now 16\)"
    with pytest.raises(torch.OutOfMemoryError, match=message) as error:
        vlm(pictures, QUESTION)
    assert "\n" not in str(error.value)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", out_of_memory)
    message = "cannot be opened .*: CUDA out of memory; .*quantization={'load_in_4bit': True}"
    with pytest.raises(ValueError, match=message) as error:
        load_vlm(folder, device="cpu")
    assert "\n" not in str(error.value)
