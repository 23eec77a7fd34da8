"""Stand-ins for the model families: the real classes and blocks, with few channels."""

import diffusers
import torch
from tiny import NOISE, UNCHECKED, UNET, WORDS, clip_tokenizer, sd_pipeline, text_encoder, vae
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

SHIFTED = {"shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}


def sd2_pipeline(seed: int = 0) -> diffusers.StableDiffusionPipeline:
    """As Stable Diffusion 2.1: v-prediction, linear projections, heads by level, GELU."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        **UNET, cross_attention_dim=24, attention_head_dim=(1, 2), use_linear_projection=True
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **NOISE, prediction_type="v_prediction", steps_offset=1
    )
    parts = {"vae": vae(4).eval(), "text_encoder": text_encoder(24, act="gelu")}
    parts |= {"tokenizer": clip_tokenizer(), "unet": unet.eval(), "scheduler": scheduler}
    return diffusers.StableDiffusionPipeline(**parts, **UNCHECKED)


def sdxl_pipeline(seed: int = 0) -> diffusers.StableDiffusionXLPipeline:
    """As SDXL base: two text encoders, pooled states of the second, time ids, zeros for ε_u."""
    torch.manual_seed(seed)
    second = clip_tokenizer()
    second.pad_token = "!"
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DConditionModel(
        **UNET | {"down_block_types": down, "up_block_types": up},
        transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), use_linear_projection=True,
        cross_attention_dim=16 + 24, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4).eval(),
        text_encoder=text_encoder(16),
        text_encoder_2=text_encoder(24, projection=12, act="gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=second,
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(
            **NOISE, timestep_spacing="leading", steps_offset=1
        ),
        add_watermarker=False,
    )


def sd3_pipeline(seed: int = 0, **scheduling) -> diffusers.StableDiffusion3Pipeline:
    """As Stable Diffusion 3.5 medium: a transformer with dual attention and normed queries and
    keys, two CLIPs and T5, 16 channels with a shift, flow matching."""
    torch.manual_seed(seed)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
        caption_projection_dim=16, pooled_projection_dim=12 + 10, pos_embed_max_size=12,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(16, **SHIFTED).eval(), text_encoder=text_encoder(16, projection=12),
        text_encoder_2=text_encoder(24, projection=10, act="gelu"), text_encoder_3=t5(),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduling),
    )  # fmt: skip


def flux_pipeline(seed: int = 0, guidance_embeds: bool = True) -> diffusers.FluxPipeline:
    """As FLUX.1-dev: blocks of two streams and of one, rotary places, 2 × 2 latents a token, CLIP's
    pooled states and T5's, a distilled guidance scale, timesteps that depend on the size."""
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=16,
        guidance_embeds=guidance_embeds, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        vae=vae(16, **SHIFTED).eval(),
        text_encoder=text_encoder(16),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
    )
    pipe.default_sample_size = 8
    return pipe


def tiny_vae(channels: int = 4, seed: int = 0) -> diffusers.AutoencoderTiny:
    """As TAESD, for 8×8 latents of 32×32 pictures."""
    torch.manual_seed(seed)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=channels,
    ).eval()


def t5() -> T5EncoderModel:
    size = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **size)).eval()


def t5_tokenizer() -> T5TokenizerFast:
    """Words, and letters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.!?-'"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


PIPELINES = {
    "sd-1": sd_pipeline, "sd-1-v": lambda: sd_pipeline("v_prediction"), "sd-2": sd2_pipeline,
    "sdxl": sdxl_pipeline, "sd-3": sd3_pipeline, "flux": flux_pipeline,
}  # fmt: skip
"""A stand-in for each family."""
