"""`python -m moji`: train, evaluate and document the Moji benchmark's models."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from moji.train import prompt_sets
from vldnp._files import data_folder, write_text

MODELS = ("vae", "text2image", "preview", "clip", "judge", "judge-2", "vlm")
WORK = Path("runs/moji/attacks")
ATTACKS = {
    "adversarial": "search prompts as Ring-A-Bell does",
    "tuning-adversarial": "the same for tuning, from another seed",
    "whitebox": "search prompts on the denoising loss",
    "adaptive": "search prompts through VL-DNP, from the white-box ones on",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m moji", description=__doc__)
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
    train.add_argument("--seed", type=int, help="another data stream; all: other models")
    train.add_argument("--streams", type=int, default=1, help="so many, from that seed on (vlm)")

    evaluate = verbs.add_parser("evaluate", help="measure all models and write their cards")
    evaluate.add_argument("--models", type=Path, default=None, help="default: data/models")
    evaluate.add_argument("--count", type=int, default=128, help="pictures per measurement")

    bound = verbs.add_parser("upper-bound", help="empirical bound of any VLM's F1 at a noise level")
    bound.add_argument("--timestep", type=int, default=680, help="of Stable Diffusion's thousand")
    bound.add_argument("--steps", type=int, default=5000, help="training steps of the classifier")

    prompts = verbs.add_parser("prompts", help="draw the prompt sets into data/prompts")
    prompts.add_argument(
        "--seed", type=int, default=prompt_sets.SEED, help="of the draw; default: %(default)s"
    )

    survey = verbs.add_parser("survey", help="what plain CFG makes of the tuning prompts")
    survey.add_argument("--count", type=int, default=64, help="prompts of each set, at random")
    survey.add_argument("--seed", type=int, default=0, help="of that draw")
    survey.add_argument(
        "--out", type=Path, default=Path("runs/moji/survey"), help="where the pictures are put"
    )

    for name, about in ATTACKS.items():
        attack = verbs.add_parser(name, help=f"{about}; goes on where it was interrupted")
        attack.add_argument("--count", type=int, help="prompts; default: the set's own number")
        attack.add_argument("--seed", type=int, help="default: the set's own")
        attack.add_argument("--work", type=Path, default=WORK, help="where found prompts are kept")
    attacks = verbs.add_parser("attacks", help="what the searches of prompts have found")
    attacks.add_argument(
        "what",
        choices=["progress", "sets", "hits"],
        help="how far they are; write data/prompts; measure into data/results",
    )
    attacks.add_argument("--work", type=Path, default=WORK, help="where found prompts are kept")

    agreement = verbs.add_parser("judge-agreement", help="two judges and the eye, steered pictures")
    agreement.add_argument("--work", type=Path, default=Path("runs/moji/second-opinion"))
    agreement.add_argument("--results", type=Path, default=None, help="default: data/results")
    agreement.add_argument(
        "--sheets", action="store_true", help="only contact sheets for the eye; no judge is asked"
    )

    again = verbs.add_parser("second-judge", help="ask it about the pictures of runs, as published")
    again.add_argument("runs", type=Path, nargs="+", help="run folders with all their pictures")

    triggers = verbs.add_parser("safree-triggers", help="what SAFREE's trigger test fires on")
    triggers.add_argument("--alpha", type=float, nargs="+", default=[0.01, 0.015])
    triggers.add_argument("--mask", help="what stands for a masked token, as `Safree` takes it")
    triggers.add_argument("--out", type=Path, help="also write the table as CSV")
    return top


def _folder(models: Path, name: str) -> Path:
    """A model trained here before, else the shipped one."""
    return models / name if (models / name).is_dir() else data_folder() / "models" / name


def _vae(models: Path) -> AutoencoderKL:
    alone = models / "vae"
    folder = alone if alone.is_dir() else _folder(models, "moji-sd") / "vae"
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


def _pipe(models: Path) -> StableDiffusionPipeline:
    folder = _folder(models, "moji-sd")
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def seed_of(recipe_seed: int, model: str, seed: int | None) -> int:
    """The data stream of one model; for all models anew (`all`), no two share one."""
    if seed is None:
        return recipe_seed
    return 1000 * seed + recipe_seed if model == "all" else seed


def train(args: argparse.Namespace) -> None:
    """Train what was asked for and save it in half precision."""
    from moji.train import clip, judge, preview, text2image, vae, vlm

    models, work, shipped = args.models, args.work, data_folder() / "models"
    wanted = MODELS if args.model == "all" else (args.model,)

    def seed(of: int) -> int:
        return seed_of(of, args.model, args.seed)

    if "vae" in wanted:
        trained = vae.train(work / "vae", args.steps, seed(vae.RECIPE.seed))
        trained.half().save_pretrained(models / "vae")
    if "text2image" in wanted:
        pipe = text2image.train(
            _vae(models),
            work / "text2image",
            args.steps,
            start=shipped / "moji-sd" if args.from_shipped else None,
            learning_rate=args.learning_rate,
            seed=seed(text2image.RECIPE.seed),
        )
        text2image.save(pipe, models / "moji-sd")
    if "preview" in wanted:
        trained = preview.train(
            _pipe(models),
            work / "preview",
            args.steps,
            seed(preview.RECIPE.seed),
            seed(preview.DATA_SEED),
        )
        trained.half().save_pretrained(models / "moji-taesd")
    for name in {"judge", "judge-2"}.intersection(wanted):
        of = judge.VARIANTS[f"moji-{name}"].recipe.seed
        trained = judge.train(_vae(models), work / name, args.steps, f"moji-{name}", seed(of))
        trained.save_pretrained(models / f"moji-{name}")
    if "clip" in wanted:
        trained = clip.train(work / "clip", args.steps, seed(clip.RECIPE.seed))
        clip.save(trained, models / "moji-clip")
    if "vlm" in wanted:
        seen = vlm.data(_pipe(models), work / "vlm", seed(vlm.DATA_SEED), args.streams)
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


def _attacks(what: str, work: Path) -> None:
    from moji.train import attacks

    if what == "progress":
        for name, state in attacks.progress(work).items():
            print(f"{name} {state}")
    elif what == "sets":
        for path in attacks.write_sets(work, data_folder() / "prompts"):
            print(path.name)
    else:
        for table in attacks.hits(work, data_folder() / "results").values():
            print(table.to_string(index=False))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors of input are one line."""
    args = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    try:
        if args.verb == "train":
            train(args)
        elif args.verb == "evaluate":
            from moji.train import cards, evaluate

            models = args.models or data_folder() / "models"
            measured = evaluate.everything(models, args.count)
            cards.write(models, measured)
            for name, values in measured.items():
                print(name, *(f"{k} {v:.3f}" for k, v in values.items()), sep="\n  ")
        elif args.verb == "upper-bound":
            from moji.train.upper_bound import upper_bound

            vae = _vae(data_folder() / "models")
            for name, value in upper_bound(vae, args.timestep, args.steps).items():
                print(f"{name} {value:.3f}")
        elif args.verb == "judge-agreement":
            from moji.train import second_opinion

            results = args.results or data_folder() / "results"
            found = second_opinion.measure(args.work, results, args.sheets)
            if found is not None:
                print(found.to_string(index=False))
        elif args.verb == "second-judge":
            from moji.train import second_opinion

            print(second_opinion.rejudge(args.runs, data_folder() / "results"))
        elif args.verb == "safree-triggers":
            from moji.train import triggers

            options = {"mask": args.mask} if args.mask else {}
            found = triggers.table(args.alpha, **options)
            print(found.to_string(index=False))
            if args.out:
                write_text(args.out, found.to_csv(index=False))
        elif args.verb in ATTACKS:
            from moji.train import attacks

            attacks.search(args.verb, args.work, args.count, args.seed)
        elif args.verb == "attacks":
            _attacks(args.what, args.work)
        elif args.verb == "survey":
            from moji.train.survey import summary

            print(summary(args.count, args.out, args.seed).round(3).to_string(index=False))
        else:
            for path in prompt_sets.write(data_folder() / "prompts", args.seed):
                print(path.name)
    except (ValueError, FileNotFoundError) as error:
        print(f"moji: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
