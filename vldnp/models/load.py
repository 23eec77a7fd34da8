"""The model registry: names → loaded models, shipped, from a folder or from the hub.

Weights are safetensors, never pickles; no model brings code of its own; hub models are pinned to
a revision.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from moji.judge import CNNJudge
from vldnp._files import unknown
from vldnp.models.clip import CLIPScore
from vldnp.models.errors import opening
from vldnp.models.hub import (
    EMBEDDED,
    FETCHING,
    ModelSpec,
    Source,
    default_device,
    find,
    nudenet_v2,
    require,
)
from vldnp.models.judges import Judge, NudeNetClassifier, NudeNetJudge, SafetyChecker

_open: WeakValueDictionary = WeakValueDictionary()


def _with_own_options(opener: Callable) -> Callable:
    """A `ModelSpec` is opened with its options, and once; options of the call win.

    A profile's model is asked for in many places; while any of them still holds it, the others
    get the same one, because a large model fits a GPU only once. What was opened by name says how
    (`opened_as`: opener, name, arguments, options), so that another process can open it too.
    """

    @wraps(opener)
    def opened(model, /, *args, **options):  # a server has a `model` among its options
        found = from_spec(model, *args, **options)
        if isinstance(model, str | Path | ModelSpec):
            found.opened_as = opener.__name__, _anywhere(model), args, options
        return found

    def from_spec(model, /, *args, **options):
        if not isinstance(model, ModelSpec):
            return opener(model, *args, **options)
        if not model.options:
            return opener(model.name, *args, **options)
        options = {**model.options, **options}
        key = opener.__name__, model.name, repr(args), repr(sorted(options.items()))
        if (known := _open.get(key)) is None:
            known = _open[key] = opener(model.name, *args, **options)
        return known

    return opened


def _anywhere(model: str | Path | ModelSpec) -> str | Path | ModelSpec:
    """The same model as a process in another working folder would name it."""
    text = str(model)
    if any(text in names for names in EMBEDDED.values()) or not Path(text).is_dir():
        return model
    absolute = str(Path(text).resolve())
    return replace(model, name=absolute) if isinstance(model, ModelSpec) else absolute


def _dtype(dtype) -> torch.dtype | str | None:
    """A dtype, also by its name, as profiles have it."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise unknown("dtype", dtype, ["float32", "float16", "bfloat16"])
    return getattr(torch, dtype)


@_with_own_options
def load(
    model,
    revision: str | None = None,
    *,
    device=None,
    dtype=torch.float32,
    model_cpu_offload: bool = False,
    attention_slicing: bool = False,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    **options,
):
    """Open a text-to-image model: Stable Diffusion 1, 2, XL, 3 or 3.5.

    Args:
        model: a name ("moji-sd", "sd-1.4", "sdxl"), a folder in diffusers' format, a hub id, a
            `ModelSpec`, a diffusers pipeline, or a `Backbone` (returned as it is).
        revision: commit of the hub repository; needed for a hub id that has no name here.
        device: default is CUDA where there is one, else the CPU.
        dtype: of weights and latents; also by name ("float16").
        model_cpu_offload: keep on the GPU only the model that works at the moment.
        attention_slicing: compute the U-Net's attention in slices.
        vae_slicing, vae_tiling: decode one picture at a time, and large ones tile by tile.
        options: passed on to the pipeline's `from_pretrained`, as `variant="fp16"`, or
            `text_encoder_3=None, tokenizer_3=None` for Stable Diffusion 3 without T5.

    Raises:
        ValueError, FileNotFoundError: one line naming what is wrong and what would be right.
    """
    from vldnp.models.backbone import Backbone, as_backbone

    settings = {
        "model_cpu_offload": model_cpu_offload,
        "attention_slicing": attention_slicing,
        "vae_slicing": vae_slicing,
        "vae_tiling": vae_tiling,
        **options,
    }
    if isinstance(model, str | Path):
        settings |= {"device": device, "dtype": _dtype(dtype)}
        source = find("model", model, revision)
        backbone = _opened(source, "model_index.json", Backbone.from_pretrained, settings)
        if said := _said({k: v for k, v in options.items() if k not in FETCHING}):
            backbone.revision += f" with {said}"  # other weights than the commit alone says
    else:
        if asked := [name for name, value in settings.items() if value]:
            raise ValueError(
                f"{asked[0]} is for models opened by name; set it on the pipeline itself"
            )
        backbone = as_backbone(model)
        if backbone.revision is None:
            backbone.revision = weights_fingerprint(backbone.pipe)
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
        options: of `TransformersVLM`: `max_new_tokens`, `max_edge`, `demonstrations`,
            `batch_size`, `quantization`, `answers="constrained"` or `"read"`; or of `RemoteVLM`.
    """
    if not isinstance(vlm, str | Path):
        if not callable(vlm):
            raise TypeError(f"a VLM is a name or a callable (images, question), not {vlm!r}")
        return vlm
    from vldnp.models.vlm import TransformersVLM

    if str(vlm).startswith(("http://", "https://")):
        from vldnp.models.vlm_server import RemoteVLM

        if "model" not in options:
            raise ValueError(f"the server {vlm} may serve several models: pass model=...")
        if device or dtype:
            raise ValueError(f"the server {vlm} decides on device and dtype; leave them out")
        return RemoteVLM(vlm, revision=revision, **options)
    source = find("vlm", vlm, revision)
    options = {**source.options, **options, "device": device, "dtype": _dtype(dtype)}
    return _opened(source, "config.json", TransformersVLM.from_pretrained, options)


def _opened(source: Source, file: str, opener: Callable, options: dict):
    """What `opener` makes of a folder with that `file`, or of the hub; one line says what fails."""
    require(source, file)
    with opening(source):
        model = opener(source.location, source.hub_revision, name=source.name, **options)
    model.revision = source.revision
    return model


@_with_own_options
def load_preview(preview, revision: str | None = None, *, device=None, dtype=torch.float32):
    """Open a tiny VAE for the pictures that the VLM is shown, the option `preview` of methods.

    Args:
        preview: a name ("moji-taesd", "taesd"), a folder or hub id that `AutoencoderTiny` opens,
            such a VAE itself, or a `Preview` (returned as it is).
        revision, device, dtype: as in `load`.

    Raises:
        ValueError, FileNotFoundError, TypeError: one line.
    """
    from diffusers import AutoencoderTiny
    from diffusers.utils import logging

    from vldnp.models.preview import Preview

    if isinstance(preview, Preview):
        return preview
    if isinstance(preview, AutoencoderTiny):
        digest = hashlib.sha256()
        _digest(digest, "vae", preview)
        return Preview(preview, type(preview).__name__, digest.hexdigest()[:12])
    if not isinstance(preview, str | Path):
        raise TypeError(
            "a preview is a name such as 'taesd', a folder, a hub id or an AutoencoderTiny, not "
            f"{preview!r}"
        )
    source = find("preview", preview, revision)
    require(source, "config.json")
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # it remarks on a key that every config of the class has
    try:
        with opening(source):
            vae = AutoencoderTiny.from_pretrained(
                source.location,
                revision=source.hub_revision,
                dtype=_dtype(dtype),
                use_safetensors=True,
            )
    finally:
        logging.set_verbosity(loud)
    vae = vae.to(device or default_device())
    return Preview(vae, source.name, source.revision)


@_with_own_options
def load_clip(clip, revision: str | None = None, *, device=None) -> CLIPScore:
    """Open a CLIP in open_clip's format: a name, a folder, a hub id, or a `CLIPScore` as it is."""
    if not isinstance(clip, str | Path):
        return clip
    source = find("clip", clip, revision)
    with opening(source):
        folder = source.location
        if source.hub_revision:
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                folder,
                revision=source.hub_revision,
                allow_patterns=["*.json", "*.txt", "open_clip_model.safetensors"],
            )
        return CLIPScore.from_pretrained(
            folder, device or default_device(), source.name, source.revision
        )


@_with_own_options
def load_judge(judge, revision: str | None = None, *, device=None, **options) -> Judge:
    """Open a judge.

    Args:
        judge: "moji-judge" or the folder of a `CNNJudge`; "nudenet", the v3 detector;
            "nudenet-v2", the paper's judge, or the path of its `.onnx` file; "sd-safety-checker",
            or the folder or hub id of a Stable Diffusion pipeline or the folder of its safety
            checker; or a judge as it is.
        revision, device: as in `load`.
        options: of `NudeNetJudge` (`exposed`, `batch_size`) or `NudeNetClassifier`.
    """
    if not isinstance(judge, str | Path):
        return judge
    if judge == "nudenet":
        return NudeNetJudge(**options)
    if judge == "nudenet-v2":
        judge = nudenet_v2()
    if Path(judge).suffix == ".onnx":
        return NudeNetClassifier(judge, **options)
    source = find("judge", judge, revision)
    with opening(source):
        folder = Path(source.location)
        if (source.hub_revision is None) and not _is_checker(folder):
            return CNNJudge.from_pretrained(folder, device or default_device(), source.name)
        checker = SafetyChecker.from_pretrained(
            source.location,
            source.hub_revision,
            name=source.name,
            device=device or default_device(),
        )
        checker.revision = source.revision
        return checker


def _is_checker(folder: Path) -> bool:
    if (folder / "safety_checker").is_dir():
        return True
    config = folder / "config.json"
    return config.is_file() and "StableDiffusionSafetyChecker" in config.read_text("utf-8")


def weights_fingerprint(pipeline) -> str:
    """Twelve hex digits of the SHA-256 of a pipeline's weights, wherever they come from."""
    digest = hashlib.sha256()
    parts = ["unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    for part in parts:
        if (model := getattr(pipeline, part, None)) is not None:
            _digest(digest, part, model)
    return digest.hexdigest()[:12]


def _digest(digest, part: str, model: torch.nn.Module) -> None:
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{part}.{key}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().reshape(-1).contiguous()
        digest.update(flat.view(torch.uint8).numpy().data)


def _said(options: dict) -> str:
    """Options in a record's words."""
    plain = {
        k: v if isinstance(v, str | int | float | None) else type(v).__name__
        for k, v in sorted(options.items())
    }
    return ", ".join(f"{name}={value}" for name, value in plain.items())
