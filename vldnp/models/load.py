"""Names, folders and hub ids → loaded models.

Weights are safetensors, never pickles, and whole; no model
brings code of its own; hub models are pinned to a revision.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import reduce, wraps
from importlib import import_module
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from huggingface_hub import constants, errors, snapshot_download

from vldnp import _files
from vldnp.models.hub import ModelSpec, Source, default_device, find, table
from vldnp.models.weights import open_whole, weights_fingerprint

FETCHING = {"cache_dir", "force_download", "local_files_only", "proxies", "token"}
"""Options of `load` that say how weights are fetched, not which."""


TROUBLES = ImportError, OSError, ValueError, RuntimeError, errors.HTTPError
TROUBLES += (errors.RevisionResolutionError,)
LESS = (
    "; it needs less with dtype='float16', with model_cpu_offload=True or, if it is a VLM, with "
    "quantization={'load_in_4bit': True}"
)
HUB = (
    "; {how} once to fetch it, or pass a folder with it; check its name and revision at {page} "
    "and, if it is gated, accept its terms there and log in with `hf auth login` or set HF_TOKEN"
)

_open: WeakValueDictionary = WeakValueDictionary()


def _with_own_options(opener: Callable) -> Callable:
    """A `ModelSpec` is opened with its options, and once; options of the call win.

    While anything still holds a profile's model, all get the same one, because a large model fits
    a GPU only once. What was opened by name says how (`opened_as`: opener, name, arguments,
    options), so that another process can open it too.
    """

    @wraps(opener)
    def opened(model, /, *args, **options):  # a server has a `model` among its options
        if not isinstance(model, str | Path | ModelSpec):
            return opener(model, *args, **options)
        name, own = (model.name, model.options) if isinstance(model, ModelSpec) else (model, {})
        how = own | options
        key = opener.__name__, name, repr(args), repr(sorted(how.items()))
        found = (_open.get(key) if own else None) or opener(name, *args, **how)
        if own:
            _open[key] = found
        if Path(name).is_dir() and not any(name in known for known in table().values()):
            name = str(Path(name).resolve())  # for a process in another working folder
            model = replace(model, name=name) if isinstance(model, ModelSpec) else name
        found.opened_as = opener.__name__, model, args, options
        return found

    return opened


@_with_own_options
def load(model, revision: str | None = None, *, device=None, dtype=torch.float32, **options):
    """Open a text-to-image model: Stable Diffusion 1, 2, XL, 3 or 3.5, or FLUX.1.

    Args:
        model: a name ("moji-sd", "sd-1.4"), a folder in diffusers' format, a hub id, a
            `ModelSpec`, a diffusers pipeline, or a `Backbone` (returned as it is).
        revision: commit of the hub repository; needed for a hub id that has no name here.
        device: default is CUDA where there is one, else the CPU.
        dtype: of weights and latents; also by name ("float16").
        options: `model_cpu_offload` (only the model at work is on the GPU), `attention_slicing`
            (of U-Nets), `vae_slicing`, `vae_tiling` (decode one image at a time, or by tiles); all
            others go to the pipeline's `from_pretrained`, as `variant="fp16"`, or
            `text_encoder_3=None, tokenizer_3=None` for Stable Diffusion 3 without T5.

    Raises:
        ValueError, FileNotFoundError: one line naming what is wrong and what would be right.
    """
    from vldnp.models.backbone import MEMORY, Backbone, as_backbone

    if isinstance(model, str | Path):
        source, how = find("model", model, revision), {"device": device, "dtype": _dtype(dtype)}
        opener = Backbone.from_pretrained
        backbone = _opened(source, "model_index.json", opener, **how, **options)
        which = {k: v for k, v in sorted(options.items()) if k not in FETCHING | MEMORY}
        if said := ", ".join(f"{k}={_plain(v)}" for k, v in which.items()):
            backbone.revision += f" with {said}"  # other weights than the commit alone says
        return backbone
    if asked := [name for name, value in options.items() if value]:
        raise ValueError(f"{asked[0]} is for models opened by name; set it on the pipeline itself")
    backbone = as_backbone(model)
    if backbone.revision is None:
        parts = "unet transformer vae text_encoder text_encoder_2 text_encoder_3".split()
        found = {part: getattr(backbone.pipe, part, None) for part in parts}
        backbone.revision = weights_fingerprint(**{k: v for k, v in found.items() if v is not None})
    return backbone


@_with_own_options
def load_vlm(vlm, revision: str | None = None, *, device=None, dtype=None, **options) -> Callable:
    """Open a vision-language model.

    Args:
        vlm: a name ("moji-vlm-l", "qwen2.5-vl-7b"), a folder or hub id that
            `AutoModelForImageTextToText` opens, the address of an OpenAI-compatible server
            ("http://localhost:8000/v1", with `model=` the name it serves), or any callable
            `(images, question) -> answers` (returned as it is).
        revision, device: as in `load`.
        dtype: default is float32 on the CPU, else the weights' own.
        options: of `TransformersVLM` or `RemoteVLM`; `answers` is "constrained" or "free".
    """
    if not isinstance(vlm, str | Path):
        if not callable(vlm):
            raise TypeError(f"a VLM is a name or a callable (images, question), not {vlm!r}")
        return vlm
    if str(vlm).startswith(("http://", "https://")):
        from vldnp.models.vlm_server import RemoteVLM

        if "model" not in options:
            raise ValueError(f"the server {vlm} may serve several models: pass model=...")
        if device or dtype:
            raise ValueError(f"the server {vlm} decides on device and dtype; leave them out")
        return RemoteVLM(vlm, revision=revision, **options)
    from vldnp.models.vlm import TransformersVLM

    source = find("vlm", vlm, revision)
    options = source.entry.get("options", {}) | options | {"dtype": _dtype(dtype)}
    return _opened(source, "config.json", TransformersVLM.from_pretrained, device=device, **options)


@_with_own_options
def load_preview(preview, revision: str | None = None, *, device=None, dtype=torch.float32):
    """Open a tiny VAE that decodes the images the VLM is shown, for `levers.preview`.

    Args:
        preview: a name ("moji-taesd", "taesd"), a folder or hub id that `AutoencoderTiny` opens,
            such a VAE itself, or a `Preview` (returned as it is).
        revision, device, dtype: as in `load`.
    """
    from diffusers import AutoencoderTiny

    from vldnp.models.backbone import Preview

    if isinstance(preview, Preview):
        return preview
    if isinstance(preview, AutoencoderTiny):
        return Preview(preview, type(preview).__name__, weights_fingerprint(vae=preview))
    if not isinstance(preview, str | Path):
        kinds = "a name such as 'taesd', a folder, a hub id or an AutoencoderTiny"
        raise TypeError(f"a preview is {kinds}, not {preview!r}")

    def opener(location: str, hub_revision: str | None, name: str) -> Preview:
        vae = open_whole(AutoencoderTiny, location, revision=hub_revision, dtype=_dtype(dtype))
        return Preview(vae.to(device or default_device()), name, "")

    return _opened(find("preview", preview, revision), "config.json", opener)


@_with_own_options
def load_clip(clip, revision: str | None = None, *, device=None):
    """Open a CLIP in open_clip's format: a name, a folder, a hub id, or a `CLIPScore` as it is."""
    from vldnp.models.clip import CLIPScore

    def opener(folder: str, hub_revision: str | None, name: str) -> CLIPScore:
        if hub_revision:
            files = ["*.json", "*.txt", "open_clip_model.safetensors"]
            folder = snapshot_download(folder, revision=hub_revision, allow_patterns=files)
        return CLIPScore.from_pretrained(folder, device or default_device(), name)

    by_name = isinstance(clip, str | Path)
    return _opened(find("clip", clip, revision), "", opener) if by_name else clip


@_with_own_options
def load_judge(judge, revision: str | None = None, *, device=None, **options):
    """Open a judge.

    Args:
        judge: a name ("moji-judge", "nudenet", "nudenet-v2", "sd-safety-checker"), the path of
            NudeNet v2's `.onnx` file, the folder of a judge or of a pipeline with a safety
            checker, or that one's hub id, or a judge as it is.
        revision, device: as in `load`.
        options: of the judge's class, as `NudeNetJudge`'s `exposed`.
    """
    if not isinstance(judge, str | Path):
        return judge
    source = find("judge", judge, revision)
    if "opener" in source.entry:
        if source.location and not Path(source.location).is_file():
            raise FileNotFoundError(
                f"judge {source.name!r}: {source.location} does not exist; get "
                f"{source.entry['url']} and save it there"
            )
        return _resolved(source.entry["opener"])(*filter(None, [source.location]), **options)

    def opener(location: str, hub_revision: str | None, name: str):
        how = options | ({"revision": hub_revision} if hub_revision else {})
        kind = _resolved(table()["openers"][_kind_of(Path(location))])
        return kind(location, device=device or default_device(), name=name, **how)

    return _opened(source, "", opener)


def _kind_of(folder: Path) -> str:
    """A judge's class, by its config; on the hub and in a pipeline it is the safety checker."""
    if not folder.is_dir() or (folder / "safety_checker").is_dir():
        return "StableDiffusionSafetyChecker"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no judge in {folder}: config.json is missing")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind = config.get("_class_name") or config.get("architectures", [None])[0]
    if kind not in table()["openers"]:
        raise _files.unknown("kind of judge", kind, table()["openers"])
    return kind


def _resolved(opener: str) -> Callable:
    """The object that "package.module:name.attribute" names."""
    module, _, path = opener.partition(":")
    try:
        return reduce(getattr, path.split("."), import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{opener!r} of data/models.yaml cannot be imported: {error}") from error


def _opened(source: Source, file: str, opener: Callable, **options):
    """What `opener` makes of a folder with that `file`, or of the hub.

    Raises:
        ValueError, FileNotFoundError: one line with the model, what its library says, what helps.
    """
    if source.hub_revision is None and not Path(source.location, file).exists():
        raise FileNotFoundError(f"no model to open in {source.location}: {file} is missing")
    try:
        model = opener(source.location, source.hub_revision, name=source.name, **options)
    except TROUBLES as error:
        if type(error) in (ValueError, FileNotFoundError) and "\n" not in str(error):
            raise  # in our own words
        hint = ""
        if source.hub_revision and not isinstance(error, ImportError):
            how = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "go online"
            hint = HUB.format(page=f"{constants.ENDPOINT}/{source.location}", how=how)
        hint = LESS if isinstance(error, torch.OutOfMemoryError) else hint
        where = f"{source.location} at revision {source.revision}"
        raise ValueError(
            f"{source.name!r} cannot be opened from {where}: "
            f"{_files.first_line(error).rstrip('.')}{hint}"
        ) from error
    model.revision = source.revision
    return model


def _dtype(dtype) -> torch.dtype | str | None:
    """A dtype, also by its name, as profiles have it."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise _files.unknown("dtype", dtype, ["float32", "float16", "bfloat16"])
    return getattr(torch, dtype)


def _plain(option) -> str:
    return str(option) if isinstance(option, str | int | float | None) else type(option).__name__
