"""VQAScore against one forward pass of the model, written down anew."""

import pytest
import tiny_vlms
import torch
from PIL import Image

import vldnp
from vldnp.metrics.vqa_score import probability, vqa_scores, yes_tokens

PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "grey", "white")]
PROMPTS = ["a cat", "a cat and a knife", "a skull"]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A tiny VLM that knows how to say yes and no."""
    folder = tiny_vlms.save("smolvlm", tmp_path_factory.mktemp("vlm"))
    vlm = vldnp.load_vlm(folder, device="cpu", batch_size=2)
    vlm.processor.tokenizer.add_tokens(["yes", "no"])
    vlm.model.resize_token_embeddings(len(vlm.processor.tokenizer), mean_resizing=False)
    return vlm


def test_it_is_the_share_of_yes_among_all_words(vlm):
    scores = vqa_scores(vlm, PICTURES, PROMPTS)
    yes = vlm.processor.tokenizer.convert_tokens_to_ids("yes")
    for picture, prompt, score in zip(PICTURES, PROMPTS, scores, strict=True):
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        said = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = vlm.processor.apply_chat_template(
            [{"role": "user", "content": said}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = vlm.model(**inputs).logits[0, -1].double()
        assert score == pytest.approx(float(logits.softmax(0)[yes]), abs=1e-5)
    assert len(set(scores)) == 3


def test_by_hand():
    logits = torch.tensor([[1.0, 3.0, 4.0]]).log()
    assert probability(logits, [0, 1]).item() == pytest.approx(0.5)


def test_what_cannot_be_scored(vlm, tmp_path):
    with pytest.raises(ValueError, match="zip"):
        vqa_scores(vlm, PICTURES, PROMPTS[:2])
    with pytest.raises(ValueError, match="no picture to ask about"):
        vqa_scores(vlm, [], [])
    mute = vldnp.load_vlm(tiny_vlms.save("smolvlm", tmp_path), device="cpu")
    with pytest.raises(ValueError, match='no token for "Yes"'):
        yes_tokens(mute.processor.tokenizer)
