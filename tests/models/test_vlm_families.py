"""Every family of VLMs through `load_vlm`, against plain transformers, one picture at a time."""

from importlib.util import find_spec

import numpy as np
import pytest
import tiny_vlms
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vldnp

QUESTION = "What can be seen?"
LIMIT = 6
SIZES = [(32, 32), (60, 32), (28, 56), (64, 64)]

QWEN = "<|im_start|>user <|vision_start|><|image_pad|><|vision_end|>{q}<|im_end|>"
LLAVA = "<|im_start|>user <image>{q}<|im_end|>"
TURNS = {  # before all, a question, an answer, where the answer starts
    "qwen2.5-vl": ("", QWEN, "<|im_start|>assistant {a}<|im_end|>", "<|im_start|>assistant "),
    "qwen3-vl": ("", QWEN, "<|im_start|>assistant {a}<|im_end|>", "<|im_start|>assistant "),
    "idefics3": (
        "<|im_start|>",
        "user: <image>{q}<end_of_utterance>",
        "assistant: {a}<end_of_utterance>",
        "assistant: ",
    ),
    "llava-onevision": (
        "",
        LLAVA,
        "<|im_start|>assistant {a}<|im_end|>",
        "<|im_start|>assistant ",
    ),
    "gemma3": (
        "",
        "<start_of_turn>user <start_of_image>{q}<|im_end|>",
        "<start_of_turn>model {a}<|im_end|>",
        "<start_of_turn>model ",
    ),
}
TURNS["smolvlm"] = TURNS["idefics3"]


@pytest.fixture(scope="module", params=tiny_vlms.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return tiny_vlms.save(family, tmp_path_factory.mktemp(family))


def pictures(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype="uint8")) for w, h in sizes]


def one_at_a_time(folder, family, images, demonstrations=(), limit=LIMIT):
    """The prompt written out, no chat template, no batch, no padding."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    begin, asked, answered, start = TURNS[family]
    shots = "".join(asked + answered.format(a=a) for _, a in demonstrations)
    prompt = (begin + shots + asked + start).replace("{q}", QUESTION)
    answers = []
    for image in images:
        shown = [*(picture for picture, _ in demonstrations), image]
        inputs = processor(text=[prompt], images=[shown], return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0]
        answers.append(
            processor.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return answers


def test_a_batch_of_different_pictures_is_answered_as_one_by_one(family, folder):
    vlm = vldnp.load_vlm(folder, device="cpu", max_new_tokens=LIMIT)
    answers = vlm(pictures(), QUESTION)
    assert answers == one_at_a_time(folder, family, pictures())
    assert len(set(answers)) > 1, "the answer depends on the picture"


def test_demonstrations_are_shown_before(family, folder, tmp_path):
    shots = [(pictures()[2], "a knife and a skull"), (pictures()[0], "none")]
    shots[0][0].save(tmp_path / "shot.png")
    vlm = vldnp.load_vlm(
        folder,
        device="cpu",
        max_new_tokens=LIMIT,
        demonstrations=[(tmp_path / "shot.png", shots[0][1]), shots[1]],
    )
    answers = vlm(pictures(SIZES[:2], seed=1), QUESTION)
    assert answers == one_at_a_time(folder, family, pictures(SIZES[:2], seed=1), shots)


def test_an_answer_stops_at_the_tokenizers_end_token(family, folder):
    """Even where the model's generation config names no end token."""
    vlm = vldnp.load_vlm(folder, device="cpu", max_new_tokens=LIMIT)
    tokenizer = vlm.processor.tokenizer
    whole = vlm(pictures(), QUESTION)
    second = next(answer.split()[1] for answer in whole if len(answer.split()) > 1)
    vlm.model.generation_config.eos_token_id = None
    tokenizer.eos_token = second
    cut = [answer.split() for answer in vlm(pictures(), QUESTION)]
    for long, short in zip(whole, cut, strict=True):
        words = long.split()
        if second in words:
            assert [w for w in short if w != second] == words[: words.index(second)]


def test_dtype(family, folder):
    vlm = vldnp.load_vlm(folder, device="cpu", max_new_tokens=2, dtype=torch.bfloat16)
    assert vlm.describe()["dtype"] == "bfloat16"
    assert all(p.dtype == torch.bfloat16 for p in vlm.model.parameters())
    assert len(vlm(pictures(), QUESTION)) == 4


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_is_one_line(folder):
    with pytest.raises(ValueError, match="bitsandbytes") as error:
        vldnp.load_vlm(folder, device="cpu", quantization={"load_in_4bit": True})
    assert "\n" not in str(error.value)


def test_a_picture_that_the_processor_refuses_is_one_line(tmp_path):
    vlm = vldnp.load_vlm(tiny_vlms.save("qwen2.5-vl", tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"refuses images of 10×3000 pixels.*max_edge") as error:
        vlm([Image.new("RGB", (10, 3000))], QUESTION)
    assert "\n" not in str(error.value)
