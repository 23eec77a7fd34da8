"""Tiny models with random weights, in the formats of the real ones; built in a second or two."""

from contextlib import contextmanager

import diffusers
import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

WORDS = "a cat dog pizza at the pirate cove knife skull dagger blood and on".split()
TOKEN_LIMIT = 16
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 4,
}  # fmt: skip
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer() -> hf.CLIPTokenizer:
    """A handmade vocabulary: the letters, and merges that make each of `WORDS` one token."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!?-'"
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            tokens += [] if parts[0] in tokens else [parts[0]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return hf.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKEN_LIMIT)


def text_encoder(width: int, projection: int | None = None, act: str = "quick_gelu"):
    tokenizer = clip_tokenizer()
    config = hf.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKEN_LIMIT, hidden_act=act,
        projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = (
        hf.CLIPTextModel(config) if projection is None else hf.CLIPTextModelWithProjection(config)
    )
    with torch.no_grad():  # the usual initial weights are so small that prompts hardly differ
        model.get_input_embeddings().weight.normal_()
    return model.eval()


def vae(channels: int, **settings) -> diffusers.AutoencoderKL:
    """32×32 pictures from 8×8 latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=channels, norm_num_groups=4,
        sample_size=32, scaling_factor=0.5, **settings,
    )  # fmt: skip


def sd_pipeline(
    prediction_type: str = "epsilon", seed: int = 0
) -> diffusers.StableDiffusionPipeline:
    """32×32 pictures from 4×8×8 latents."""
    torch.manual_seed(seed)
    tokenizer, encoder = clip_tokenizer(), text_encoder(16)
    unet = diffusers.UNet2DConditionModel(**UNET, cross_attention_dim=16, attention_head_dim=4)
    parts = {"vae": vae(4).eval(), "text_encoder": encoder, "tokenizer": tokenizer}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **NOISE, prediction_type=prediction_type, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        **parts, unet=unet.eval(), scheduler=scheduler, **UNCHECKED
    )


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generators(seed)[0], dtype=torch.float64)


@contextmanager
def counted_rows(network):
    """The list of how many rows go through the network in each call, which grows."""
    rows = []

    def count(_, args, kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


class ScriptedVLM:
    """Answers by picture or by number: `reply(image, question) -> answer`; counts its calls."""

    name = "scripted"
    revision = "1"

    def __init__(self, reply):
        self.reply, self.calls = reply, []

    def __call__(self, images, question):
        self.calls.append(len(images))
        assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
        return [self.reply(image, question) for image in images]


def by_brightness(image: Image.Image, question: str) -> str:
    """Different answers for different pictures, the same for all but equal ones."""
    band = int(np.asarray(image).mean() / 1.5)
    return ("none", "a knife", "a skull and a dagger")[band % 3]


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant: {% endif %}"
)


def llava(
    seed: int = 0, more_words=()
) -> tuple[hf.LlavaForConditionalGeneration, hf.LlavaProcessor]:
    """32×32 pictures as 16 patches; a word is a token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", ":", "user", "assistant", "what", "?"]
    words += [*WORDS, ",", "none", "restricted", "things", "can", "be", "seen"]
    words += [word for word in more_words if word not in words]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    pictures = hf.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = hf.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=8,
        vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(
                **size, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=16
            ),
            text_config=hf.LlamaConfig(
                **size,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=len(words),
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            image_token_index=vocabulary["<image>"],
            image_seq_length=17,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )
    with torch.no_grad():  # make the answer depend on the picture
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval(), processor
