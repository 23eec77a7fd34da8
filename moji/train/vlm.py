"""The Moji benchmark's VLMs: three sizes of a tiny LLaVA that says which restricted things it sees.

They learn from what they will be shown: pictures decoded from the text-to-image model's x̂₀
predictions of noised scenes, at all noise levels, with and without guidance. The answers are the
renderer's truth; the judge has no part in it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import trange
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
from moji.train.text2image import NOISE
from moji.train.vae import encode
from moji.world.icons import RESTRICTED, THINGS
from moji.world.scenes import (
    Scene,
    caption,
    compose,
    held_out,
    labels,
    patch_truth,
    sample_scene,
    shuffled_scene,
)
from vldnp._files import atomic
from vldnp.concepts import load_concepts
from vldnp.guidance import cfg
from vldnp.models.hub import default_device

SCENES = 24_000
DATA_SEED = 48
GUIDANCE_SCALE = 3.0
PATCH = 8
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of the vision tower and of the language model."""

    vision: tuple[int, int, int]
    language: tuple[int, int, int]
    eyes: Recipe
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
"""The three see the same pictures for the same number of steps; only the learning rate goes down
with width."""


def answer(seen: tuple[str, ...]) -> str:
    """What the VLM says of these restricted things: `"dagger, skull"`, or `"none"`."""
    return ", ".join(thing for thing in RESTRICTED if thing in seen) or "none"


def processor() -> LlavaProcessor:
    """Picture preprocessing, a byte-level tokenizer and the chat template."""
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
    pictures = CLIPImageProcessor(
        size={"height": 64, "width": 64},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def network(size: Size, tools: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A fresh LLaVA of one of the three sizes."""
    tokenizer = tools.tokenizer
    (seen, deep, eyes), (width, depth, heads) = size.vision, size.language
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=seen,
                intermediate_size=4 * seen,
                projection_dim=seen,
                num_hidden_layers=deep,
                num_attention_heads=eyes,
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


def training_scene(seed: int, index: int) -> tuple[Scene, str]:
    """A scene and the caption its x̂₀ is predicted with.

    Half are ordinary scenes. The others are shuffled ones, whose caption names the harmless
    things and the place only, so that the place does not give the answer away.
    """
    if index % 2:
        scene = sample_scene(seed, index)
        return scene, scene.caption
    scene = shuffled_scene(seed, index)
    harmless = tuple(thing for thing in scene.things if thing not in RESTRICTED)
    words = "" if held_out(harmless, scene.place) else caption(harmless, scene.place)
    return scene, words


class Glimpses(NamedTuple):
    """What the VLM sees while pictures form, with the truth, for n scenes.

    Attributes:
        pixels: uint8 `[n, 3, 64, 64]`, decoded from x̂₀.
        targets: float32 `[n, 44]`, 1 for each thing that is in the scene.
        patches: int64 `[n, 64]`, what covers each patch (`scenes.patch_truth`).
        x0: float32 `[n, 4, 16, 16]`, the x̂₀ themselves, of unit variance.
    """

    pixels: Tensor
    targets: Tensor
    patches: Tensor
    x0: Tensor


@torch.inference_mode()
def glimpses(
    pipe: StableDiffusionPipeline,
    count: int,
    seed: int,
    evaluation: bool = False,
    timestep: int | None = None,
) -> Glimpses:
    """Noise scenes, predict x̂₀ with `pipe`, decode.

    Half of the x̂₀ come from the guided prediction, half from the plain one. Timesteps are uniform,
    one scene in ten at 0 (a finished picture); or all are at `timestep`.
    """
    device = pipe.device
    schedule = DDPMScheduler(**NOISE)
    generator = torch.Generator().manual_seed(seed)
    blank = _embed(pipe, [""])
    parts = []
    for start in trange(0, count, 64, desc="predict x̂₀", leave=False):
        rows = range(start, min(count, start + 64))
        if evaluation:
            pairs = [(s, s.caption) for s in (sample_scene(seed, i, evaluation=True) for i in rows)]
        else:
            pairs = [training_scene(seed, i) for i in rows]
        drawn = [compose(scene) for scene, _ in pairs]
        pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in drawn])
        t = torch.randint(1000, (len(pairs),), generator=generator)
        t[torch.rand(len(pairs), generator=generator) < 0.1] = 0
        if timestep is not None:
            t.fill_(timestep)
        guided = torch.arange(len(pairs)) % 4 < 2
        alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not evaluation):
            clean = (encode(pipe.vae, pixels) * pipe.vae.config.scaling_factor).to(device)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            noisy = schedule.add_noise(clean, noise, t.to(device))
            words = _embed(pipe, [words for _, words in pairs])
            predicted = pipe.unet(noisy, t.to(device), words).sample.float()
            some = noisy[guided]
            plain = pipe.unet(some, t[guided].to(device), blank.expand(len(some), -1, -1)).sample
            predicted[guided] = cfg(plain.float(), predicted[guided], GUIDANCE_SCALE)
            x0 = (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
            decoded = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample.float()
        parts.append(
            Glimpses(
                ((decoded.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8),
                torch.stack([torch.from_numpy(labels(scene)) for scene, _ in pairs]),
                torch.stack([torch.from_numpy(patch_truth(o, PATCH)) for _, o in drawn]),
                x0.float().cpu(),
            )
        )
    return Glimpses(*map(torch.cat, zip(*parts, strict=True)))


def data(
    pipe: StableDiffusionPipeline,
    folder: Path,
    seed: int = DATA_SEED,
    streams: int = 1,
    scenes: int = SCENES,
) -> Glimpses:
    """Training pictures of a VLM, made once and kept in `folder`: `scenes` of each stream.

    `streams` of them have the seeds `seed`, `seed` + 1, …
    """
    made = [_stream(pipe, folder, seed + k, scenes) for k in range(streams)]
    return Glimpses(*map(torch.cat, zip(*made, strict=True)))


def _stream(pipe: StableDiffusionPipeline, folder: Path, seed: int, scenes: int) -> Glimpses:
    cache = folder / f"glimpses-{seed}.pt"
    if cache.exists():
        return Glimpses(*torch.load(cache, weights_only=True))
    made = glimpses(pipe, scenes, seed)
    with atomic(cache) as fresh:
        torch.save(list(made), fresh)
    return made


def _embed(pipe: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    tokens = pipe.tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return pipe.text_encoder(tokens.to(pipe.device)).last_hidden_state


class Eyes(nn.Module):
    """The vision tower with a classifier per patch: a fast first stage, then thrown away.

    To be told what every patch shows teaches a transformer to see from few pictures.
    """

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
        length = reply.shape[1]
        logits = self.llava(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels,
            logits_to_keep=length + 1,
        ).logits[:, :-1]
        pad = self.llava.config.text_config.pad_token_id
        return F.cross_entropy(logits.float().flatten(0, 1), reply.flatten(), ignore_index=pad)


def conversation() -> list[dict]:
    """The one question, in the chat format."""
    content = [{"type": "image"}, {"type": "text", "text": load_concepts("moji").question}]
    return [{"role": "user", "content": content}]


def train(
    name: str,
    seen: Glimpses,
    folder: Path,
    start: Path | None = None,
    steps: int | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Train the VLM of size `name` ("s", "m", "l"): first its eyes alone, then all of it.

    `steps` replaces the recipe's number in both stages; `start` is a folder to go on from, with
    the second stage only and in another order of pictures.
    """
    size = SIZES[name]
    tools = processor()
    pixels, targets, patches, _ = seen
    device = default_device()
    if start is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(size.eyes.seed)
            model = network(size, tools)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)

    def batch(recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        return rows, (pixels[rows].float() / 127.5 - 1).to(device)

    def eyes_loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows, shown = batch(size.eyes, generator)
        logits = module(shown).float()
        return F.cross_entropy(logits.flatten(0, 1), patches[rows].flatten().to(device))

    if start is None:
        recipe = replace(size.eyes, steps=steps or size.eyes.steps)
        eyes = Eyes(model.model.vision_tower)
        eyes = fit(recipe, eyes, eyes_loss, folder / "eyes", compiled=True)
        model.model.vision_tower.load_state_dict(eyes.tower.state_dict())

    tokenizer = tools.tokenizer
    text = tools.apply_chat_template(conversation(), add_generation_prompt=True)
    image_tokens = "<image>" * (64 // PATCH) ** 2
    prompt = tokenizer(text.replace("<image>", image_tokens), return_tensors="pt").input_ids
    prompt = prompt.to(device)
    restricted = targets[:, [THINGS.index(thing) for thing in RESTRICTED]].bool()
    replies = [
        " " + answer(tuple(itertools.compress(RESTRICTED, row))) + "</s>"
        for row in restricted.tolist()
    ]
    reply = tokenizer(replies, padding=True, padding_side="right", return_tensors="pt").input_ids

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows, shown = batch(size.recipe, generator)
        return module(shown, prompt, reply[rows].to(device))

    seed = size.recipe.seed + (100 if start else 0)
    recipe = replace(size.recipe, steps=steps or size.recipe.steps, seed=seed)
    model = fit(recipe, Answer(model), loss, folder).llava
    return model, tools
