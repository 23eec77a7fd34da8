"""`python -m vldnp.moji`: train, evaluate and document the embedded models."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from vldnp.files import data_folder, write_text

MODELS = ("vae", "text2image", "clip", "judge", "judge-2", "vlm")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m vldnp.moji", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)

    train = verbs.add_parser("train", help="train one model, or all in order")
    train.add_argument("model", choices=[*MODELS, "all"])
    train.add_argument(
        "--models", type=Path, default=Path("runs/moji/models"), help="where weights are written"
    )
    train.add_argument(
        "--work", type=Path, default=Path("runs/moji"), help="checkpoints, curves, sample grids"
    )
    train.add_argument("--steps", type=int, help="instead of the recipe's number")
    train.add_argument("--size", choices=["s", "m", "l"], help="only this VLM")
    train.add_argument(
        "--from-shipped", action="store_true", help="start from the weights in data/models"
    )
    train.add_argument("--learning-rate", type=float, help="instead of the recipe's (text2image)")
    train.add_argument("--seed", type=int, help="another data stream (text2image, vlm)")
    train.add_argument("--streams", type=int, default=1, help="so many, from that seed on (vlm)")

    evaluate = verbs.add_parser("evaluate", help="measure all models and write their cards")
    evaluate.add_argument("--models", type=Path, default=None, help="default: data/models")
    evaluate.add_argument("--count", type=int, default=128, help="pictures per measurement")

    limit = verbs.add_parser("limit", help="how far any VLM can get at a noise level")
    limit.add_argument("--timestep", type=int, default=680, help="of Stable Diffusion's thousand")
    limit.add_argument("--steps", type=int, default=5000, help="training steps of the classifier")

    agreement = verbs.add_parser("judge-agreement", help="two judges and the eye, steered pictures")
    agreement.add_argument("--work", type=Path, default=Path("runs/moji/second-opinion"))
    agreement.add_argument("--results", type=Path, default=None, help="default: data/results")
    agreement.add_argument(
        "--sheets", action="store_true", help="only contact sheets for the eye; no judge is asked"
    )

    triggers = verbs.add_parser("safree-triggers", help="what SAFREE's trigger test fires on")
    triggers.add_argument("--alpha", type=float, nargs="+", default=[0.01, 0.015])
    triggers.add_argument("--mask", help="what stands for a masked token, as `Safree` takes it")
    triggers.add_argument("--out", type=Path, help="also write the table as CSV")

    verbs.add_parser("prompts", help="write the prompt sets into data/prompts")
    return top


def _folder(models: Path, name: str) -> Path:
    """A model trained here before, else the shipped one."""
    return models / name if (models / name).is_dir() else data_folder() / "models" / name


def _vae(models: Path) -> AutoencoderKL:
    alone = models / "vae"
    folder = alone if alone.is_dir() else _folder(models, "moji-sd") / "vae"
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


def train(args: argparse.Namespace) -> None:
    """Train what was asked for and save it in half precision."""
    from vldnp.moji import clip, judge, text2image, vae, vlm

    models, work, shipped = args.models, args.work, data_folder() / "models"
    wanted = MODELS if args.model == "all" else (args.model,)
    if "vae" in wanted:
        trained = vae.train(work / "vae", args.steps)
        trained.half().save_pretrained(models / "vae")
    if "text2image" in wanted:
        pipe = text2image.train(
            _vae(models),
            work / "text2image",
            args.steps,
            start=shipped / "moji-sd" if args.from_shipped else None,
            learning_rate=args.learning_rate,
            seed=args.seed,
        )
        text2image.save(pipe, models / "moji-sd")
    for name in {"judge", "judge-2"}.intersection(wanted):
        trained = judge.train(_vae(models), work / name, args.steps, f"moji-{name}")
        trained.save_pretrained(models / f"moji-{name}")
    if "clip" in wanted:
        clip.save(clip.train(work / "clip", args.steps), models / "moji-clip")
    if "vlm" in wanted:
        pipe = StableDiffusionPipeline.from_pretrained(
            _folder(models, "moji-sd"), torch_dtype=torch.float32
        )
        seed = vlm.DATA_SEED if args.seed is None else args.seed
        seen = vlm.data(pipe, work / "vlm", seed, args.streams)
        for name in [args.size] if args.size else vlm.SIZES:
            folder = f"moji-vlm-{name}"
            trained, tools = vlm.train(
                name,
                seen,
                work / f"vlm-{name}",
                start=shipped / folder if args.from_shipped else None,
                steps=args.steps,
            )
            trained.half().save_pretrained(models / folder)
            tools.save_pretrained(models / folder)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors of input are one line."""
    args = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    try:
        if args.verb == "train":
            train(args)
        elif args.verb == "evaluate":
            from vldnp.moji import cards, evaluate

            models = args.models or data_folder() / "models"
            measured = evaluate.everything(models, args.count)
            cards.write(models, measured)
            for name, values in measured.items():
                print(name, *(f"{k} {v:.3f}" for k, v in values.items()), sep="\n  ")
        elif args.verb == "limit":
            from vldnp.moji.limit import limit

            vae = _vae(data_folder() / "models")
            for name, value in limit(vae, args.timestep, args.steps).items():
                print(f"{name} {value:.3f}")
        elif args.verb == "judge-agreement":
            from vldnp.moji import second_opinion

            results = args.results or data_folder() / "results"
            found = second_opinion.measure(args.work, results, args.sheets)
            if found is not None:
                print(found.to_string(index=False))
        elif args.verb == "safree-triggers":
            from vldnp.moji import triggers

            options = {"mask": args.mask} if args.mask else {}
            found = triggers.table(args.alpha, **options)
            print(found.to_string(index=False))
            if args.out:
                write_text(args.out, found.to_csv(index=False))
        else:
            from vldnp.moji import prompt_sets

            for path in prompt_sets.write(data_folder() / "prompts"):
                print(path.name)
    except (ValueError, FileNotFoundError) as error:
        print(f"vldnp.moji: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
