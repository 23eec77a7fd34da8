"""Shapes of real models against what is published of them; random stand-ins that run."""

import pytest
import torch
from PIL import Image
from vldnp.baselines.modular_diffusers import VLDNPGuidance

from vldnp.methods import VLDNP
from vldnp.models import hub
from vldnp.models.vlm import TransformersVLM
from vldnp.study import random_models

PUBLISHED = {  # parameters, as the repositories' safetensors files have them
    "sd-1.4": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "qwen2.5-vl-3b": {"vlm": 3_754_622_976},
    "qwen2.5-vl-7b": {"vlm": 8_292_166_656},
    "smolvlm-500m": {"vlm": 507_482_304},
    "clip-vit-l-14": {"clip": 427_616_513},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert random_models.parameters(name) == PUBLISHED[name]


def test_what_profiles_plan_with_has_a_name_in_the_zoo():
    named = {*hub.names("model"), *hub.names("vlm"), *hub.names("clip")}
    assert set(random_models.known()) - named == {"small-sdxl"}
    with pytest.raises(ValueError, match="unknown architecture 'sd-1.3': did you mean 'sd-1"):
        random_models.build("sd-1.3", "meta")


def test_the_tokenizer_is_clips():
    ids = random_models.clip_tokenizer()("a photo of an astronaut", padding="max_length").input_ids
    assert ids[:7] == [49406, 320, 1125, 539, 550, 18376, 49407] and len(ids) == 77


def test_a_picture_is_as_many_tokens_as_in_qwen():
    processor = random_models._qwen_processor(151_936)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a b"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (448, 448))], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(151_655) == 16 * 16, "a token for each 28×28 pixels"
    assert ids.count(151_644) == 2 and ids.count(0) == 4  # user, a, b, assistant


def test_a_random_qwen_answers(monkeypatch):
    small = dict(random_models.known()["qwen2.5-vl-3b"]["parts"]["vlm"])
    small["text_config"] = small["text_config"] | {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    small["vision_config"] = small["vision_config"] | {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    monkeypatch.setattr(random_models, "known", lambda: {"small": {"parts": {"vlm": small}}})
    vlm = random_models.qwen("small", max_new_tokens=3, max_edge=56)
    assert isinstance(vlm, TransformersVLM)
    answers = vlm([Image.new("RGB", (90, 90))] * 2, "What can be seen?")
    assert [len(answer.split()) for answer in answers] == [3, 3]


def test_a_modular_pipeline_is_steered():
    asked = []

    def vlm(images, question):
        asked.append(len(images))
        return ["a dagger"] * len(images)

    method = VLDNP(vlm, "moji", omega=4, query_steps=(0, 2))
    guider = VLDNPGuidance(method, guidance_scale=5.0)
    pipe = random_models.modular_sdxl(guider)
    pictures = pipe(
        prompt="a cat",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output="images",
    )
    assert len(pictures) == 1 and asked == [1, 1]
    assert "dagger" in guider.negatives[0].prompt
