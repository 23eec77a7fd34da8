"""VLMs through `load_vlm`: every family against plain transformers, one picture at a time."""

import json
from importlib.util import find_spec

import pytest
import tiny_vlms
import torch
from PIL import Image
from tiny import llava
from tiny_vlms import SIZES, pictures
from transformers import AutoModelForImageTextToText, AutoProcessor

import vldnp
from vldnp.models.vlm import TransformersVLM, describe, resized

QUESTION = "What can be seen?"
LIMIT = 6

QWEN = "<|im_start|>user <|vision_start|><|image_pad|><|vision_end|>{q}<|im_end|>"
LLAVA, ANSWER = "<|im_start|>user <image>{q}<|im_end|>", "<|im_start|>assistant {a}<|im_end|>"
IDEFICS = "user: <image>{q}<end_of_utterance>", "assistant: {a}<end_of_utterance>", "assistant: "
GEMMA = "<start_of_turn>user <start_of_image>{q}<|im_end|>", "<start_of_turn>model {a}<|im_end|>"
TURNS = {  # before all, a question, an answer, where the answer starts
    "qwen2.5-vl": ("", QWEN, ANSWER, "<|im_start|>assistant "),
    "qwen3-vl": ("", QWEN, ANSWER, "<|im_start|>assistant "),
    "idefics3": ("<|im_start|>", *IDEFICS),
    "smolvlm": ("<|im_start|>", *IDEFICS),
    "llava-onevision": ("", LLAVA, ANSWER, "<|im_start|>assistant "),
    "gemma3": ("", *GEMMA, "<start_of_turn>model "),
}


@pytest.fixture(scope="module", params=tiny_vlms.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return tiny_vlms.save(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    for part in llava():
        part.save_pretrained(folder)
    return str(folder)


def one_at_a_time(folder, family, images, demonstrations=(), limit=LIMIT):
    """The prompt written out, no chat template, no batch, no padding."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, answers = AutoProcessor.from_pretrained(folder), []
    begin, asked, answered, start = TURNS[family]
    shots = "".join(asked + answered.format(a=a) for _, a in demonstrations)
    prompt = (begin + shots + asked + start).replace("{q}", QUESTION)
    for image in images:
        shown = [*(picture for picture, _ in demonstrations), image]
        inputs = processor(text=[prompt], images=[shown], return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0]
        said = tokens[inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(said, skip_special_tokens=True))
    return answers


def test_a_batch_of_different_pictures_is_answered_as_one_by_one(family, folder):
    vlm = vldnp.load_vlm(folder, device="cpu", max_new_tokens=LIMIT)
    answers = vlm(pictures(), QUESTION)
    assert answers == one_at_a_time(folder, family, pictures())
    assert len(set(answers)) > 1, "the answer depends on the picture"
    vlm.batch_size = 3
    assert vlm(pictures(), QUESTION) == answers and vlm([], QUESTION) == []


def test_demonstrations_are_shown_before(family, folder, tmp_path):
    shots = [(pictures()[2], "a knife and a skull"), (pictures()[0], "none")]
    shots[0][0].save(tmp_path / "shot.png")
    given = {"demonstrations": [(tmp_path / "shot.png", shots[0][1]), shots[1]]}
    vlm = vldnp.load_vlm(folder, device="cpu", max_new_tokens=LIMIT, **given)
    answers = vlm(pictures(SIZES[:2], seed=1), QUESTION)
    assert answers == one_at_a_time(folder, family, pictures(SIZES[:2], seed=1), shots)


def test_generation_stops_at_the_tokenizers_end_token(family, folder):
    """Even where the model's generation config names no end token."""
    vlm = vldnp.load_vlm(folder, device="cpu", max_new_tokens=LIMIT)
    whole = vlm(pictures(), QUESTION)
    second = next(answer.split()[1] for answer in whole if len(answer.split()) > 1)
    vlm.model.generation_config.eos_token_id = None
    vlm.processor.tokenizer.eos_token = second
    for long, short in zip(whole, vlm(pictures(), QUESTION), strict=True):
        words = long.split()
        if second in words:
            assert [w for w in short.split() if w != second] == words[: words.index(second)]


def test_dtype_and_quantization(family, folder):
    vlm = vldnp.load_vlm(folder, device="cpu", max_new_tokens=2, dtype=torch.bfloat16)
    assert vlm.describe()["dtype"] == "bfloat16" and len(vlm(pictures(), QUESTION)) == 4
    assert all(p.dtype == torch.bfloat16 for p in vlm.model.parameters())
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ValueError, match="bitsandbytes") as error:
            vldnp.load_vlm(folder, device="cpu", quantization={"load_in_4bit": True})
        assert "\n" not in str(error.value)


def grey_levels(a, b) -> int:
    return (resized(a).int() - resized(b).int()).abs().max().item()


@pytest.mark.parametrize("edge", [8, 100, 448])
def test_pictures_are_resized_to_the_edge_up_as_well_as_down(tiny, edge):
    """The authors' VLM is shown 448 × 448 pixels, whatever is generated."""
    square, wide = pictures()[0], pictures()[1].convert("L")
    assert resized(wide, edge).shape == (3, round(edge * 32 / 60), edge)
    assert resized(Image.new("RGB", (2, 1000)), edge).shape == (3, edge, max(1, round(edge / 500)))
    assert grey_levels(resized(square, edge), square.resize((edge, edge), 3)) <= 1
    assert torch.equal(resized(square), resized(square, 32))
    vlm = TransformersVLM.from_pretrained(tiny, device="cpu", max_new_tokens=5, max_edge=edge)
    images = pictures([(32, 32)] * 5)
    answers = vlm(images, QUESTION)
    vlm.max_edge = None
    assert answers == vlm([resized(image, edge) for image in images], QUESTION)
    with pytest.raises(ValueError, match="max_edge must be 1 or more pixels, or None, not 0"):
        TransformersVLM.from_pretrained(tiny, device="cpu", max_edge=0)


@pytest.mark.parametrize("edge", [None, 28, 60])
def test_pixels_on_the_device_give_the_pixel_values_of_pil_images(family, folder, edge):
    """In one batch, within a grey level, without edge exactly."""
    vlm = vldnp.load_vlm(folder, device="cpu", max_edge=edge)
    images = [i.resize((8, 8)).resize(i.size, 3) for i in pictures([(32, 32), (32, 32), (64, 64)])]
    ours = vlm._inputs([resized(image) for image in images], QUESTION)
    shown = [image.resize((edge, edge), 3) if edge else image for image in images]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    how |= {"add_generation_prompt": True, "processor_kwargs": {"padding": True}}
    ask = [{"type": "text", "text": QUESTION}]
    asked = [[{"role": "user", "content": [{"type": "image", "image": i}, *ask]}] for i in shown]
    theirs = vlm.processor.apply_chat_template(asked, **how)
    grey = 1 / 255 / min(vlm.processor.image_processor.image_std) if edge else 0
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    apart = (ours["pixel_values"] - theirs["pixel_values"]).abs().max()
    assert apart <= 1.001 * grey
    answers = vlm(torch.stack([resized(image) for image in images[:2]]), QUESTION)
    assert answers == vlm(images[:2], QUESTION)


def test_describe(tiny):
    how = {"max_edge": 16, "demonstrations": [(pictures()[0], "a cat")]}
    vlm = TransformersVLM.from_pretrained(tiny, name="tiny", device="cpu", **how)
    described = json.loads(json.dumps(describe(vlm)))
    shown = described.pop("demonstrations")
    expected = {"name": "tiny", "revision": None, "dtype": "float32", "quantization": None}
    expected |= {"max_new_tokens": 64, "max_edge": 16, "answers": "constrained"}
    assert described == expected and [shot["answer"] for shot in shown] == ["a cat"]
    vlm.demonstrations = ((pictures()[1], "a cat"),)
    assert describe(vlm)["demonstrations"] != shown

    def always_none(images, question):
        return ["none"] * len(images)

    assert describe(always_none)["name"].endswith("always_none")
    always_none.name = "mute"
    assert describe(always_none) == {"name": "mute", "revision": None}


def test_too_little_memory_is_one_line(tiny, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    vlm = TransformersVLM.from_pretrained(tiny, name="tiny", device="cpu", max_edge=16)
    monkeypatch.setattr(vlm.model, "generate", out_of_memory)
    message = r"'tiny': CUDA out of memory; lower batch_size \(now 16\) or max_edge \(now 16\)"
    with pytest.raises(torch.OutOfMemoryError, match=message) as error:
        vlm(pictures(), QUESTION)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", out_of_memory)
    with pytest.raises(ValueError, match="opened .*: CUDA out of mem.*; .*quantization=") as error:
        vldnp.load_vlm(tiny, device="cpu")
    assert "\n" not in str(error.value)
