"""What methods cost at the real models' sizes: Stable Diffusion 1.4 (512 × 512, 50 steps, g = 7.5),
TAESD and Qwen2.5-VL-3B, whose published configs are in data/architectures.yaml.

    python tests/benchmarks/real_size.py          # operations, on any machine, in a minute
    python tests/benchmarks/real_size.py --time   # seconds besides, on a GPU, in eight minutes

Weights are random. Small models run each way; what the recorded calls of their networks take at the
real sizes is counted on the meta device, which computes nothing. With `--time` the real sizes run.
In a question each word or mark is a token, and answers have their full length.
"""
# ruff: noqa: E402

import argparse
import sys
import time
from functools import cache, partial, wraps
from itertools import product
from pathlib import Path

import diffusers
import pandas as pd
import torch
import transformers
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import UNCHECKED, sd_pipeline
from tiny_models import tiny_vae
from tiny_vlms import QWEN_TEMPLATE, qwen2_5_vl

import vldnp
from vldnp.levers import preview
from vldnp.models.backbone import Backbone, Preview
from vldnp.models.vlm import TransformersVLM
from vldnp.study.profile import load_profile

TERM = "knife skull dagger blood feet a cat"  # with the end of an answer eight tokens
CONCEPTS = vldnp.ConceptSet("eight", vldnp.load_concepts("nudity").question, {TERM: ()})
SHOTS = [(Image.new("RGB", (512, 512), (40 * n, 80, 120)), "feet, blood") for n in range(4)]
SYSTEM = "<|im_start|>system You are a helpful assistant.<|im_end|>"  # of Qwen's chat template
PARTS = ["U-Net", "VAE decoder", "preview decoder", "text encoder", "VLM vision tower"]
PARTS += ["VLM prefill", "VLM output layer", "VLM tokens", "VLM other", "other"]
FAST = load_profile("paper-fast")
(QUERIES,) = (e["given"]["query_steps"] for e in FAST.methods if e["kind"] == "VLDNP")
SHORT = {"max_edge": 448, "max_new_tokens": 8}
LONG = {"demonstrations": SHOTS, "answers": "free", "max_new_tokens": 64}
WAYS = dict.fromkeys(["cfg", "static", "vl-dnp"], SHORT)  # a way of making images → its VLM
WAYS["paper-fast"] = {name: FAST.vlm.options[name] for name in SHORT}
WAYS["sequential reference"] = SHORT | LONG  # an image at a time


class Models:
    """Pipeline, tiny VAE and VLM with random weights, small ones or of the real sizes; `calls` has
    (part, rows, shape, seconds) of their networks."""

    def __init__(self, small: bool, device: str):
        self.pipe, self.calls, sizes = sd_pipeline(), [], {}
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        with torch.device(device):
            self.taesd = tiny_vae() if small else diffusers.AutoencoderTiny().eval()
            if not small:
                said = yaml.safe_load((ROOT / "data/architectures.yaml").read_text())
                own, vlm = said["sd-1.4"]["parts"], said["qwen2.5-vl-3b"]["parts"]["vlm"]
                text = transformers.CLIPTextConfig(**own["text_encoder"])
                own["text_encoder"] = transformers.CLIPTextModel(text)
                for part in ("unet", "vae"):
                    own[part] = getattr(diffusers, own[part].pop("class"))(**own[part])
                self.pipe = type(self.pipe)(**self.pipe.components | own | UNCHECKED)
                self.pipe.tokenizer.model_max_length = 77
                sizes = {"vision": vlm["vision_config"], **vlm["text_config"]}
            self.vlm, processor = qwen2_5_vl(most=1024, **sizes)
        torch.set_default_dtype(torch.float32)
        pipe, inner, tokenizer = self.pipe, self.vlm.model, processor.tokenizer
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.to(device).eval()
        networks = [pipe.unet, pipe.vae.decoder, self.taesd.decoder, pipe.text_encoder]
        networks += [inner.visual, inner.language_model, self.vlm.lm_head]
        for part, module in zip(PARTS, networks, strict=False):
            module.forward = self.recorded(part, module.forward)
        processor.chat_template = SYSTEM + QWEN_TEMPLATE
        never = [tokenizer.convert_tokens_to_ids("none"), tokenizer.eos_token_id]
        self.vlm.generation_config.suppress_tokens = never  # so that no answer ends early
        self.asked = partial(TransformersVLM, self.vlm, processor, "random", "0")

    def recorded(self, part: str, work):
        @wraps(work)
        def call(*args, **kwargs):
            name, rows, shape = part, len(args[0]) if args else 1, ()
            if part == "VLM vision tower":
                rows, shape = len(kwargs["grid_thw"]), tuple(kwargs["grid_thw"][0, 1:].tolist())
            elif part == "VLM prefill":
                rows, new, _ = kwargs["inputs_embeds"].shape
                shape = new, kwargs["past_key_values"].get_seq_length()
                name = "VLM tokens" if shape[1] else part
            started = now()
            found = work(*args, **kwargs)
            self.calls.append((name, rows, shape, now() - started))
            return found

        return call


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def operations(models: Models):
    """A function (part, *shape) → TFLOP of one row's call, for models on the meta device."""
    pipe, vlm, width = models.pipe, models.vlm, models.vlm.config.text_config.hidden_size
    zeros, edge = partial(torch.zeros, device="meta"), pipe.unet.config.sample_size
    ids, latents = partial(zeros, dtype=torch.long), zeros(1, 4, edge, edge)

    def language(memory, new: int):
        given = {"inputs_embeds": zeros(1, new, width), "position_ids": ids(3, 1, new)}
        vlm.model.language_model(**given, past_key_values=memory)

    works = {
        "U-Net": lambda: pipe.unet(latents, 0, zeros(1, 77, pipe.unet.config.cross_attention_dim)),
        "VAE decoder": lambda: pipe.vae.decode(latents),
        "preview decoder": lambda: models.taesd.decode(latents),
        "text encoder": lambda: pipe.text_encoder(ids(1, pipe.tokenizer.model_max_length)),
        "VLM vision tower": lambda h, w: vlm.model.visual(
            zeros(h * w, 1176), grid_thw=torch.tensor([[1, h, w]]), position_ids=ids(h * w, 2)
        ),
        "VLM output layer": lambda: vlm.lm_head(zeros(1, 1, width)),
    }

    @cache
    @torch.no_grad()
    def tflop(part: str, *shape: int) -> float:
        work = partial(works.get(part, str), *shape)
        if part in ("VLM prefill", "VLM tokens"):
            memory, (new, past) = transformers.DynamicCache(), shape
            _ = past and language(memory, past)
            work = partial(language, memory, new)
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e12

    return tflop


def measured(models: Models, tflop, way: str, steered: bool, images: int) -> pd.DataFrame:
    """A row for each part: TFLOP and seconds an image. All ways steer the same images."""
    asked = models.recorded("VLM other", models.asked(**WAYS[way]))

    def vlm(pixels, question, choices):
        asked(pixels, question, choices)
        return [TERM if steered else "none"] * len(pixels)

    vlm.takes_pixels = vlm.takes_choices = True
    dynamic, decoder = partial(vldnp.VLDNP, vlm, CONCEPTS, 15), Preview(models.taesd, "random", "0")
    method = {
        "cfg": vldnp.CFG(),
        "static": vldnp.Static("knife, skull", 15),
        "paper-fast": preview(dynamic(QUERIES), decoder),  # no gate: random x̂₀ would pass at random
    }.get(way, dynamic(vldnp.front_loaded(10)))
    images = 1 if way == "sequential reference" else images
    model, prompts = Backbone(models.pipe, "random", "0"), [f"a cat {n}" for n in range(images)]
    models.calls.clear()
    started = now()
    vldnp.sample(model, prompts, method, scheduler="dpm++", progress=False)  # 50 steps, g = 7.5
    total = now() - started
    found = [(part, n * tflop(part, *shape), s) for part, n, shape, s in models.calls]
    rows = pd.DataFrame(found, columns=["part", "TFLOP", "seconds"]).groupby("part").sum()
    rows = rows.reindex(PARTS, fill_value=0.0)
    rows.loc["VLM other", "seconds"] -= rows.loc[PARTS[4:8], "seconds"].sum()
    rows.loc["other", "seconds"] = total - rows["seconds"].sum()
    rows.loc["all"], prompts = rows.sum(), "steered" if steered else "harmless"
    return (rows / images).assign(way=way, prompts=prompts).reset_index()


def units(models: Models, tflop) -> pd.DataFrame:
    """A row for each part of one evaluation, decoding, encoding, query and token."""
    rows = [{"part": part, "TFLOP": tflop(part)} for part in PARTS[:4]]
    for edge, shots in product((224, 336, 448), ((), SHOTS)):
        vlm = models.asked(max_edge=edge, demonstrations=shots)
        given = vlm._inputs([SHOTS[0][0]], CONCEPTS.question)
        shown = given["input_ids"][0] == vlm.model.config.image_token_id
        (_, h, w), size, count = given["image_grid_thw"][-1].tolist(), len(shown), int(shown.sum())
        one, before = tflop("VLM vision tower", h, w), int(shown.nonzero()[-1]) + 1 - h * w // 4
        query = {
            "vision tower": one * (1 + len(shots)),
            "prefill": tflop("VLM prefill", size, 0),
            "query but for its prefix": one + tflop("VLM prefill", size - before, before),
            "token": tflop("VLM tokens", 1, size) + tflop("VLM output layer"),
        }
        tokens = {"image_tokens": count, "text_tokens": size - count}
        label = f", {edge} px" + ", 4 demonstrations" * bool(shots)
        rows += [{"part": f"VLM {k}{label}", "TFLOP": v, **tokens} for k, v in query.items()]
    return pd.DataFrame(rows).assign(way="one", prompts="")


def main(arguments=None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--time", action="store_true", help="seconds besides, on a GPU")
    options.add_argument("--tiny", action="store_true", help="small sizes, to try this out")
    options.add_argument("--out", default=ROOT / "data/results/cost-real-size.csv")
    options = options.parse_args(arguments)
    real, started, rounds, took = options.time and not options.tiny, time.perf_counter(), [], 0
    models = Models(not real, "cuda" if real else "cpu")
    tflop = operations(Models(options.tiny, "meta"))
    while not rounds or real and (len(rounds) == 1 or took * (len(rounds) + 1) / len(rounds) < 480):
        ways = product(WAYS, (True, False), [8 if rounds else 1])  # the first round warms up
        rounds.append(pd.concat([measured(models, tflop, *way) for way in ways]))
        took = time.perf_counter() - started
    rows = pd.concat(rounds[1:] or rounds).groupby(["way", "prompts", "part"], sort=False)
    rows = rows[["TFLOP", "seconds"]].median().reset_index()
    cfg = rows[(rows["way"] == "cfg") & (rows["part"] == "all")].set_index("prompts")
    rows["ratio"] = rows["TFLOP"] / rows["prompts"].map(cfg["TFLOP"])
    rows["time_ratio"] = rows["seconds"] / rows["prompts"].map(cfg["seconds"])
    rows["TFLOP/s"] = (rows["TFLOP"] / rows["seconds"]).where(rows["TFLOP"] > 0)
    columns = "way prompts part image_tokens text_tokens TFLOP ratio".split()
    columns += ["seconds", "time_ratio", "TFLOP/s"] * options.time
    rows = pd.concat([units(models, tflop), rows])[columns]
    rows.to_csv(options.out, index=False, float_format="%.6g")
    print(rows[rows["part"] == "all"].dropna(axis=1).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
