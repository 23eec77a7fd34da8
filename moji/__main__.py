"""Train the Moji benchmark's models, make its prompt sets, search attacks, run its study."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from vldnp._files import atomic, data_folder, write_text

MODELS = ("vae", "text2image", "preview", "clip", "judge", "judge-2", "vlm")
VAES = ("vae", "moji-sd/vae")
SEARCHES = ("whitebox", "adaptive")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m moji", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser("train", help="train one model, or all in order")
    verb.add_argument("model", choices=[*MODELS, "all"])
    verb.add_argument("--seed", type=int, help="of the data stream; with `all`, of another world")
    verb.add_argument("--steps", type=int, help="number in place of the recipe's")
    verb.add_argument("--learning-rate", type=float, help="instead of the recipe's (text2image)")
    verb.add_argument("--size", choices=["s", "m", "l"], help="only this VLM")
    verb.add_argument("--from-shipped", action="store_true", help="start from data/models")
    verb.add_argument("--models", type=Path, default=Path("runs/moji/models"), help="output")
    verb.add_argument("--work", type=Path, default=Path("runs/moji"), help="checkpoints, curves")

    verb = verbs.add_parser("prompts", help="draw the prompt sets into data/prompts")
    verb.add_argument("--seed", type=int, help="of the draw; default: that of the shipped sets")

    verb = verbs.add_parser("attacks", help="search adversarial prompts, or write their sets")
    verb.add_argument("what", choices=[*SEARCHES, "sets"])
    verb.add_argument("--count", type=int, help="prompts; default: the set's own number")
    verb.add_argument("--seed", type=int, help="default: the set's own")
    verb.add_argument("--work", type=Path, default=Path("runs/moji/attacks"), help="found prompts")

    verb = verbs.add_parser("confirm", help="run and publish parts of data/protocol.yaml")
    verb.add_argument("parts", nargs="*", metavar="PART", help="default: all, in order")
    verb.add_argument("--out", default="runs", help="folder of the run folders (%(default)s)")
    verb.add_argument("--workers", type=int, help="default: one per core or GPU")
    verb.add_argument("--backend", help="joblib's: loky, ray or dask")
    verbs.add_parser("verdicts", help="compute the protocol's comparisons, and docs/appendix.md")
    return top


def seed_of(recipe_seed: int, model: str, seed: int | None) -> int:
    """The data stream of one model; with another seed for `all`, no two models share one."""
    if seed is None:
        return recipe_seed
    return 1000 * seed + recipe_seed if model == "all" else seed


def train(args: argparse.Namespace) -> None:
    """Train what `args.model` names, in order; weights are saved in half precision."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    from moji.train import clip, judge, preview, text2image, vae, views, vlm

    models, work, steps, shipped = args.models, args.work, args.steps, data_folder() / "models"

    def seed(of: int) -> int:
        return seed_of(of, args.model, args.seed)

    def opened(kind, *names: str):
        """The first of these models that exists: trained here, else shipped."""
        folders = (folder / name for name in names for folder in (models, shipped))
        found = next(folder for folder in folders if folder.is_dir())
        return kind.from_pretrained(found, torch_dtype=torch.float32)

    def start(name: str) -> Path | None:
        return shipped / name if args.from_shipped else None

    for name in MODELS if args.model == "all" else (args.model,):
        if name == "vae":
            trained = vae.train(work / name, steps, seed(vae.RECIPE.seed))
            trained.half().save_pretrained(models / name)
        elif name == "text2image":
            own, rate = seed(text2image.RECIPE.seed), args.learning_rate
            before = opened(AutoencoderKL, *VAES).eval()
            pipe = text2image.train(before, work / name, steps, own, start("moji-sd"), rate)
            text2image.save(pipe, models / "moji-sd")
        elif name == "clip":
            trained = clip.train(work / name, steps, seed(clip.RECIPE.seed))
            clip.save(trained, models / "moji-clip")
        elif name == "preview":
            seeds = seed(preview.RECIPE.seed), seed(preview.DATA_SEED)
            pipe = opened(StableDiffusionPipeline, "moji-sd")
            trained = preview.train(pipe, work / name, steps, *seeds)
            trained.half().save_pretrained(models / "moji-taesd")
        elif name == "vlm":
            pipe = opened(StableDiffusionPipeline, "moji-sd")
            seen = views.data(pipe, work / name, seed(views.SEED), views.SCENES)
            for size in [args.size] if args.size else vlm.SIZES:
                folder = f"moji-vlm-{size}"
                trained, tools = vlm.train(size, seen, work / folder, start(folder), steps)
                trained.half().save_pretrained(models / folder)
                tools.save_pretrained(models / folder)
        else:
            folder, before = f"moji-{name}", opened(AutoencoderKL, *VAES).eval()
            own = seed(judge.VARIANTS[folder].recipe.seed)
            judge.train(before, work / name, steps, folder, own).save_pretrained(models / folder)


def prompts(args: argparse.Namespace) -> None:
    from moji.train import prompt_sets

    seed = prompt_sets.SEED if args.seed is None else args.seed
    for path in prompt_sets.write(data_folder() / "prompts", seed):
        print(path.name)


def attacks(args: argparse.Namespace) -> None:
    from moji.attacks import searches

    if args.what == "sets":
        for path in searches.write_sets(args.work, data_folder() / "prompts"):
            print(path.name)
    else:
        found = searches.search(args.what, args.work, args.count, args.seed)
        print(f"{args.work / args.what}.jsonl: {len(found)} prompts")


def confirm(args: argparse.Namespace) -> None:
    from moji.study.protocol import confirm, load_protocol

    protocol = load_protocol()
    for name in [protocol.part(name) and name for name in args.parts] or protocol.parts:
        images = confirm(protocol, name, args.out, args.workers, args.backend)
        print(f"{name}: {len(images)} images")


def verdicts(args: argparse.Namespace) -> None:
    from moji.study.appendix import page
    from moji.study.protocol import NAME, confirmed, load_protocol

    folder, found = data_folder() / "results" / NAME, confirmed(load_protocol())
    with atomic(folder / "verdicts.csv") as temporary:
        found.to_csv(temporary, index=False, float_format="%.5g", lineterminator="\n")
    write_text(data_folder().parent / "docs" / "appendix.md", page(found))
    print(found.groupby(["judge", "claim", "verdict"], sort=False).size().to_string())


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors of input are one line."""
    args = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    calls = (train, prompts, attacks, confirm, verdicts)
    try:
        next(call for call in calls if call.__name__ == args.verb)(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"moji: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
