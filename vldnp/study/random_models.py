"""Real models' shapes as data: counted without memory, or built with random weights.

How long a network computes does not depend on the values of its weights, and how many it has not on
anything but its config. So costs can be planned and measured before anything is downloaded.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import nn

from vldnp._files import data_folder, unknown
from vldnp.models.backbone import Preview
from vldnp.models.vlm import TransformersVLM

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's noise schedule."""

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
QWEN_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


def known() -> dict[str, dict]:
    """Model name → `parts` (their configs) and `published` (in which dtype), none without the file.

    The file is `data/architectures.yaml`.
    """
    path = data_folder() / "architectures.yaml"
    return _read(path) if path.is_file() else {}


@cache
def _read(path: Path) -> dict[str, dict]:
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: said[model.get("same_as", name)] for name, model in said.items()}


def parameters(name: str) -> dict[str, int]:
    """Part → number of parameters, counted on the meta device; tied weights count once."""
    return {
        part: sum(p.numel() for p in module.parameters())
        for part, module in build(name, "meta").items()
    }


def build(
    name: str, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """Part → module with random weights (none on the "meta" device), for inference.

    Raises:
        ValueError: the model's shapes are not known; one line.
    """
    models = known()
    if name not in models:
        raise unknown("architecture", name, models)
    with torch.device(device), _default(dtype), torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {part: _part(config) for part, config in models[name]["parts"].items()}
    return {part: module.eval().requires_grad_(False) for part, module in parts.items()}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """New weights are of this dtype, so that none are first made in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _part(config: Mapping) -> nn.Module:
    config = dict(config)
    kind = config.pop("class")
    if kind == "open_clip":
        import open_clip

        return open_clip.model.CLIP(**open_clip.get_model_config(config["name"]))
    home = "diffusers" if hasattr(importlib.import_module("diffusers"), kind) else "transformers"
    made = getattr(importlib.import_module(home), kind)
    return made(**config) if home == "diffusers" else made(made.config_class(**config))


def clip_tokenizer():
    """CLIP's own tokenizer; its vocabulary comes with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(token, token): i for token, i in theirs.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks), model_max_length=77)


def stable_diffusion(
    name: str = "sd-1.4",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
):
    """A Stable Diffusion 1 pipeline of real size with random weights."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        **build(name, device, dtype),
        tokenizer=clip_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(**NOISE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def taesd(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Preview:
    """TAESD with random weights, for the pictures that a VLM is shown."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = AutoencoderTiny()  # its default shapes are TAESD's
    return Preview(tiny.to(device, dtype), "taesd (random weights)", "0")


def qwen(
    name: str = "qwen2.5-vl-3b",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options,
) -> TransformersVLM:
    """A Qwen2.5-VL of real size with random weights.

    Its tokenizer is a stand-in: every word is a token. Pictures become as many tokens as in the
    real model. An answer never ends by itself (but by chance), so `max_new_tokens` is its length.

    Args:
        name, device, dtype: as in `build`.
        options: of `TransformersVLM`.
    """
    model = build(name, device, dtype)["vlm"]
    processor = _qwen_processor(model.config.text_config.vocab_size)
    return TransformersVLM(model, processor, f"{name} (random weights)", "0", **options)


def _qwen_processor(vocabulary: int):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    named = {i: token for token, i in QWEN_TOKENS.items()}
    tokens = {named.get(i, f"word{i}"): i for i in range(vocabulary)}
    backend = Tokenizer(WordLevel(tokens, unk_token="word0"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(list(QWEN_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="word0",
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )


def modular_sdxl(guider):
    """diffusers' modular SDXL pipeline, small and with random weights, that VL-DNP steers.

    Args:
        guider: a `vldnp.baselines.modular_diffusers.VLDNPGuidance`.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLAutoBlocks

    from vldnp.baselines.modular_diffusers import looking, without_remarks

    with without_remarks():
        blocks = looking(StableDiffusionXLAutoBlocks().get_workflow("text2image"))
        pipe = blocks.init_pipeline()
        pipe.update_components(
            **build("small-sdxl", "cpu"),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
            guider=guider,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
