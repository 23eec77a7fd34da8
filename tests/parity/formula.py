"""A small Stable Diffusion 1 whose weights are a formula: float64, the same with every torch."""

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# The text encoder is wider than there are phrases, or SAFREE's projector is ill-posed.
TEXT = {
    "hidden_size": 48, "projection_dim": 48, "intermediate_size": 64, "hidden_act": "quick_gelu",
}  # fmt: skip
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 77}
TEXT |= {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
UNET = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1}
UNET |= {"norm_num_groups": 8, "cross_attention_dim": 48, "attention_head_dim": 4}
UNET["down_block_types"] = ("CrossAttnDownBlock2D", "DownBlock2D")
UNET["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4}
VAE |= {"norm_num_groups": 4, "sample_size": 64, "scaling_factor": 0.18215}
VAE["down_block_types"] = ("DownEncoderBlock2D",) * 4
VAE["up_block_types"] = ("UpDecoderBlock2D",) * 4
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@torch.no_grad()
def filled(module: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """Weights from whole numbers alone, which every machine computes alike."""
    named = {name.removeprefix("text_model."): p for name, p in module.named_parameters()}
    for k, (name, p) in enumerate(sorted(named.items())):
        n = (torch.arange(p.numel(), dtype=torch.int64) * 40503 + k * 7919 + 12345) % 2**31
        for factor in (1103515245, 747796405, 1664525):
            n = (n * factor + 12345) % 2**31
            n = n ^ (n >> 13)
        wave = (n.double() / 2**30 - 1).reshape(p.shape)
        if "embedding" in name and p.ndim == 2:
            p.copy_(wave)
        elif p.ndim > 1:
            attention = 3.0 if "attn2" in name else 1.0
            p.copy_(wave * gain * (3.0 / p[0].numel()) ** 0.5 * attention)
        else:
            scale = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * wave if scale else 0.05 * wave)
    return module.double().eval()


def tokenizer() -> CLIPTokenizer:
    """CLIP's own, whose vocabulary comes with open_clip."""
    theirs = SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(token, token): i for token, i in theirs.encoder.items()}
    merges = list(theirs.bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=filled(AutoencoderKL(**VAE)),
        text_encoder=filled(CLIPTextModel(CLIPTextConfig(**TEXT)), 2.0), tokenizer=tokenizer(),
        unet=filled(UNet2DConditionModel(**UNET), 1.5),
        scheduler=PNDMScheduler.from_config(NOISE | PNDM), **UNCHECKED,
    )  # fmt: skip
