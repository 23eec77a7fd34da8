"""The Moji benchmark's VLMs: three sizes of a tiny LLaVA that names restricted things.

They are trained on images decoded from the text-to-image model's x̂₀ predictions of noised scenes,
at all noise levels, with and without guidance. The answers are the renderer's labels; no judge is
involved.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from moji.train.loop import Recipe, fit
from moji.train.vae import to_model
from moji.train.views import PATCH, NoisyViews
from moji.world.icons import RESTRICTED, THINGS
from vldnp.concepts import load_concepts
from vldnp.models.hub import default_device

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of the vision tower and of the language model; the recipes of the
    tower alone and of the whole model."""

    vision: tuple[int, int, int]
    language: tuple[int, int, int]
    tower: Recipe
    recipe: Recipe


SIZES = {
    "s": Size(
        (32, 2, 2),
        (32, 2, 2),
        Recipe("vlm-s-eyes", 3500, 2e-3, seed=41, ema=0.998),
        Recipe("vlm-s", 2600, 2e-3, seed=42, ema=0.998),
    ),
    "m": Size(
        (64, 3, 4),
        (64, 2, 4),
        Recipe("vlm-m-eyes", 3500, 2e-3, seed=43, ema=0.998),
        Recipe("vlm-m", 2600, 1.5e-3, seed=44, ema=0.998),
    ),
    "l": Size(
        (128, 4, 4),
        (128, 2, 4),
        Recipe("vlm-l-eyes", 3500, 1.5e-3, seed=45, ema=0.998),
        Recipe("vlm-l", 2600, 1e-3, seed=46, ema=0.998),
    ),
}
"""All train on the same images for as many steps; the learning rate goes down with width."""


def processor() -> LlavaProcessor:
    """Image preprocessing, a byte-level tokenizer and the chat template."""
    corpus = [
        TEMPLATE,
        "user: assistant:",
        load_concepts("moji").question,
        ", ".join(THINGS),
        *(f" {thing}, none" for thing in THINGS),
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1000,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = CLIPImageProcessor(
        size={"height": 64, "width": 64},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def network(size: Size, tools: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A fresh LLaVA of one of the three sizes."""
    tokenizer = tools.tokenizer
    (vision, vision_depth, vision_heads), (width, depth, heads) = size.vision, size.language
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=vision,
                intermediate_size=4 * vision,
                projection_dim=vision,
                num_hidden_layers=vision_depth,
                num_attention_heads=vision_heads,
                image_size=64,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=512,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                tie_word_embeddings=True,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(64 // PATCH) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )


class PatchClassifier(nn.Module):
    """The vision tower with a classifier per patch: the first stage of training."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(tower.config.hidden_size, len(THINGS) + 1)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.tower(pixel_values=pixels).last_hidden_state
        return self.head(hidden[:, 1:])


class Answer(nn.Module):
    """LLaVA's loss on the answer's tokens, the form that the training loop wraps."""

    def __init__(self, llava: LlavaForConditionalGeneration):
        super().__init__()
        self.llava = llava

    def forward(self, pixels: Tensor, prompt: Tensor, reply: Tensor) -> Tensor:
        tokens = torch.cat([prompt.expand(len(reply), -1), reply], dim=1)
        logits = self.llava(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels,
            logits_to_keep=reply.shape[1] + 1,
        ).logits[:, :-1]
        pad = self.llava.config.text_config.pad_token_id
        return F.cross_entropy(logits.float().flatten(0, 1), reply.flatten(), ignore_index=pad)


def replies(tools: LlavaProcessor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of the question, `[1, P]`, and of each scene's answer, `[n, R]`."""
    content = [{"type": "image"}, {"type": "text", "text": load_concepts("moji").question}]
    conversation = [{"role": "user", "content": content}]
    text = tools.apply_chat_template(conversation, add_generation_prompt=True)
    text = text.replace("<image>", "<image>" * (64 // PATCH) ** 2)
    columns = [THINGS.index(thing) for thing in RESTRICTED]
    answers = [
        f" {', '.join(itertools.compress(RESTRICTED, row)) or 'none'}</s>"
        for row in targets[:, columns].bool().tolist()
    ]
    question = tools.tokenizer(text, return_tensors="pt")
    reply = tools.tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")
    return question.input_ids, reply.input_ids


def train(
    name: str, views: NoisyViews, folder: Path, start: Path | None = None, steps: int | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Train the VLM of size `name` ("s", "m", "l"): first its vision tower alone, then all of it.

    `steps` replaces the recipe's number in both stages. `start` is a folder whose training
    continues, with the second stage only and in another order of images.
    """
    size, tools, device = SIZES[name], processor(), default_device()

    def batch(recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(views.pixels), (recipe.batch_size,), generator=generator)
        return rows, to_model(views.pixels[rows]).to(device)

    def patch_loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows, shown = batch(size.tower, generator)
        wanted = views.patches[rows].flatten().to(device)
        return F.cross_entropy(module(shown).float().flatten(0, 1), wanted)

    if start is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(size.tower.seed)
            model = network(size, tools)
        recipe = replace(size.tower, steps=steps or size.tower.steps)
        tower = PatchClassifier(model.model.vision_tower)
        tower = fit(recipe, tower, patch_loss, folder / "tower", compiled=True).tower
        model.model.vision_tower.load_state_dict(tower.state_dict())
    else:
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    prompt, reply = replies(tools, views.targets)
    prompt = prompt.to(device)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows, shown = batch(size.recipe, generator)
        return module(shown, prompt, reply[rows].to(device))

    seed = size.recipe.seed + (100 if start else 0)
    recipe = replace(size.recipe, steps=steps or size.recipe.steps, seed=seed)
    return fit(recipe, Answer(model), loss, folder).llava, tools
