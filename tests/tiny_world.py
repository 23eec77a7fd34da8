"""A data folder with tiny random models under the Moji benchmark's names, and a profile."""

import json
import shutil
from pathlib import Path

import torch
from tiny import llava, sd_pipeline
from tiny_models import tiny_vae

from moji.judge import CNNJudge
from moji.world.icons import RESTRICTED, THINGS

DATA = Path(__file__).parents[1] / "data"

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
PROFILE = """
name: tiny
model: moji-sd
vlm: {name: moji-vlm-l, answers: free}
judge: moji-judge
clip: moji-clip
preview: moji-taesd
reference: "moji.world.images:reference_images"
concepts: moji
prompt_sets: [benign, explicit, implicit, adversarial]
lighter_vlms: [{name: moji-vlm-s, answers: free}, {name: moji-vlm-m, answers: free}]
sampling: {num_inference_steps: 6, guidance_scale: 3.0, scheduler: dpm++}
methods:
  - CFG
  - Static: {negative_prompt: "dagger, skull", omega: [2.0, 8.0]}
    chosen: 2.0
  - VLDNP: {omega: [2.0, 8.0], query_steps: {front_loaded: 2}}
  - SAFREE: {phrases: "dagger, skull", re_attention: false}
  - SLD: {negative_prompt: "dagger, skull", strength: max}
batch_size: 32
max_prompts: 9
"""
SETS = "benign explicit implicit adversarial tuning-benign tuning-implicit".split()
PROMPTS = """prompt_id,prompt,seed,things
a,a cat at the cove,0,cat
b,a dog and a pizza,5,"dog, pizza"
c,a cat on a pizza,7,"cat, pizza"
"""


def make(folder: Path) -> Path:
    """Fill `folder` so that it can be named by VLDNP_DATA; returns it."""
    with torch.random.fork_rng():
        models = folder / "models"
        sd_pipeline().save_pretrained(models / "moji-sd")
        model, processor = llava(more_words=RESTRICTED)
        for size in "sml":
            model.save_pretrained(models / f"moji-vlm-{size}")
            processor.save_pretrained(models / f"moji-vlm-{size}")
        torch.manual_seed(0)
        judge = CNNJudge(THINGS, tuple(RESTRICTED))
        judge.network.head.bias.data.fill_(-9)  # it finds a dagger everywhere, and nothing else
        judge.network.head.bias.data[THINGS.index("dagger")] = 9
        judge.save_pretrained(models / "moji-judge")
        clip(models / "moji-clip")
        tiny_vae().save_pretrained(models / "moji-taesd")
    shutil.copytree(DATA / "concepts", folder / "concepts")
    shutil.copy(DATA / "models.yaml", folder)
    shutil.copytree(DATA / "results", folder / "results", ignore=shutil.ignore_patterns("[!c]*"))
    (folder / "profiles").mkdir()
    for name in ("tiny", "moji"):
        (folder / "profiles" / f"{name}.yaml").write_text(PROFILE.replace("tiny", name))
    (folder / "prompts").mkdir()
    for name in SETS:
        (folder / "prompts" / f"{name}.csv").write_text(PROMPTS)
    return folder


def clip(folder: Path) -> None:
    """A tiny CLIP in open_clip's format."""
    from open_clip import CLIP as Model
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    weights = {key: value.contiguous() for key, value in Model(**CLIP).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
