"""Names, folders and hub ids → loaded models: whole, from safetensors, at a pinned revision."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from weakref import WeakValueDictionary

import torch
from huggingface_hub import constants

from vldnp._files import first_line, read_yaml, unknown
from vldnp.models.backbone import MEMORY, Backbone, Preview, as_backbone
from vldnp.models.clip import CLIPScore
from vldnp.models.hub import ModelSpec, Source, default_device, find, table
from vldnp.models.vlm import TransformersVLM
from vldnp.models.vlm_server import RemoteVLM

# Options of `load` that decide how weights are fetched, not which.
FETCHING = {"cache_dir", "force_download", "local_files_only", "proxies", "token"}
LESS = "; less is needed with dtype='float16', model_cpu_offload=True, or a VLM's quantization="
HUB = "; fetch it once (HF_HUB_OFFLINE={}), and see {}/{}; if it is gated, run `hf auth login`"
_open: WeakValueDictionary = WeakValueDictionary()


def _with_own_options(opener: Callable) -> Callable:
    """Opens a `ModelSpec` with its options, and only once while an object refers to it, because a
    large model fits a GPU only once. `opened_as` is for opening it in another process."""

    @wraps(opener)
    def opened(model, /, *args, **options):  # a server has a `model` among its options
        if not isinstance(model, str | Path | ModelSpec):  # most objects are taken as they are
            checked = opener.__name__ in ("load", "load_vlm")
            return opener(model, *args, **options) if checked else model
        name, own = (model.name, model.options) if isinstance(model, ModelSpec) else (model, {})
        key = opener.__name__, name, repr(args), repr(sorted((own | options).items()))
        found = (_open.get(key) if own else None) or opener(name, *args, **own | options)
        if own:
            _open[key] = found
        found.opened_as = opener.__name__, model, args, options
        return found

    return opened


@_with_own_options
def load(model, revision: str | None = None, *, device=None, dtype=torch.float32, **options):
    """Open a text-to-image model: Stable Diffusion 1, 2, XL, 3 or 3.5, or FLUX.1.

    `model` is a name ("moji-sd", "sd-1.4"), a folder in diffusers' format, a hub id, which needs
    the commit as `revision` where it has no name here, a `ModelSpec`, a diffusers pipeline, or a
    `Backbone`. `device` is CUDA where there is one; `dtype` that of weights and latents, also by
    name. `options` that need less memory are `model_cpu_offload`, `attention_slicing` (of U-Nets),
    `vae_slicing` and `vae_tiling`; others go to the pipeline's `from_pretrained`."""
    if isinstance(model, str | Path):
        source, how = find("model", model, revision), {"device": device, "dtype": _dtype(dtype)}
        backbone = _opened(source, "model_index.json", Backbone.from_pretrained, **how, **options)
        which = {k: options[k] for k in sorted(options.keys() - FETCHING - MEMORY)}
        plain = str | int | float | None
        said = [f"{k}={v if isinstance(v, plain) else type(v).__name__}" for k, v in which.items()]
        backbone.revision += f" with {', '.join(said)}" if said else ""  # than the commit says
        return backbone
    backbone = as_backbone(model, **options)
    backbone.revision = backbone.revision or backbone.fingerprint()
    return backbone


@_with_own_options
def load_vlm(vlm, revision: str | None = None, **options) -> Callable:
    """Open a vision-language model: a name ("moji-vlm-l", "qwen2.5-vl-7b"), a folder or hub id of
    an image-text-to-text model, the address of an OpenAI-compatible server (`model=`: the served
    name), or a callable `(images, question) -> answers` (returned as it is). Options are those
    of `TransformersVLM.from_pretrained` or `RemoteVLM`."""
    if callable(vlm):
        return vlm
    if not isinstance(vlm, str | Path):
        raise TypeError(f"a VLM is a name or a callable (images, question), not {vlm!r}")
    if str(vlm).startswith(("http://", "https://")):
        return RemoteVLM(vlm, revision=revision, **options)
    source = find("vlm", vlm, revision)
    options = source.entry.get("options", {}) | options
    options["dtype"] = _dtype(options.get("dtype"))
    return _opened(source, "config.json", TransformersVLM.from_pretrained, **options)


@_with_own_options
def load_preview(preview, revision: str | None = None, *, device=None, dtype=torch.float32):
    """Open a tiny VAE for `levers.preview`: a name ("moji-taesd", "taesd"), a folder or hub id that
    `AutoencoderTiny` opens, or a `Preview` (returned as it is). Arguments are those of `load`."""
    how, source = {"device": device, "dtype": _dtype(dtype)}, find("preview", preview, revision)
    return _opened(source, "config.json", Preview.from_pretrained, **how)


@_with_own_options
def load_clip(clip, revision: str | None = None, *, device=None):
    """Open a CLIP in open_clip's format: a name, a folder, a hub id, or a CLIP score as it is."""
    source, config = find("clip", clip, revision), "open_clip_config.json"
    if "opener" in source.entry:
        return resolve_name(source.entry["opener"])(device)
    return _opened(source, config, CLIPScore.from_pretrained, device=device)


@_with_own_options
def load_judge(judge, revision: str | None = None, *, device=None, **options):
    """Open a judge: a name ("moji-judge", "nudenet", "nudenet-v2", "opennsfw"), the path of NudeNet
    v2's `.onnx` file, a judge's folder, or a judge as it is; options are those of its class."""
    source, openers = find("judge", judge, revision), table()["openers"]
    if "opener" in source.entry:
        if source.location and not Path(source.location).is_file():
            raise FileNotFoundError(f"get {source.entry['url']} and save it as {source.location}")
        try:
            return resolve_name(source.entry["opener"])(*filter(None, [source.location]), **options)
        except Exception as error:  # onnxruntime raises its own
            kind, hint = ValueError, ""
            if isinstance(error, ImportError):
                kind, hint = ImportError, "; pip install 'vldnp[judges]'"
            raise kind(f"{str(judge)!r} cannot be opened: {first_line(error)}{hint}") from error
    config = read_yaml(Path(source.location, "config.json"), "config of a judge")
    if (kind := str(config.get("_class_name"))) not in openers:
        raise unknown("kind of judge", kind, openers)
    return _opened(source, "", resolve_name(openers[kind]), device=device, **options)


def _opened(source: Source, file: str, opener: Callable, *, device=None, **options):
    """The result of `opener` for a folder with that `file`, or the hub; errors are one line."""
    if source.hub_revision is None and not Path(source.location, file).exists():
        raise FileNotFoundError(f"no model to open in {source.location}: {file} is missing")
    options |= {"name": source.name, "device": device or default_device()}
    options |= {"revision": source.hub_revision} if source.hub_revision else {}
    try:
        model = opener(source.location, **options)
    except Exception as error:  # libraries raise errors of all kinds
        if type(error) in (ValueError, FileNotFoundError) and "\n" not in str(error):
            raise  # raised by vldnp
        hint = LESS if isinstance(error, torch.OutOfMemoryError) else ""
        if source.hub_revision and not isinstance(error, ImportError) and not hint:
            hint = HUB.format(int(constants.HF_HUB_OFFLINE), constants.ENDPOINT, source.location)
        said = f"{source.location} at revision {source.revision}: {first_line(error).rstrip('.')}"
        raise ValueError(f"{source.name!r} cannot be opened from {said}{hint}") from error
    model.revision = source.revision
    return model


def _dtype(dtype) -> torch.dtype | str | None:
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    if not isinstance(found := getattr(torch, dtype, None), torch.dtype):
        raise unknown("dtype", dtype, ["float32", "float16", "bfloat16"])
    return found
