"""The model registry: names → loaded models, shipped, from a folder or from the hub.

The names are data, `data/models.yaml`. Weights are safetensors, never pickles, and whole; no model
brings code of its own; hub models are pinned to a revision.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce, wraps
from importlib import import_module
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from huggingface_hub import constants, errors, snapshot_download, try_to_load_from_cache

from vldnp import _files
from vldnp._yaml import read_yaml
from vldnp.models.weights import default_device, open_whole, weights_fingerprint

FETCHING = {"cache_dir", "force_download", "local_files_only", "proxies", "token"}
"""Options of `load` that say how weights are fetched, not which."""


@dataclass(frozen=True)
class ModelSpec:
    """A model as a profile has it: a name, folder or hub id, and the options it is opened with.

    `vldnp.load`, `load_vlm`, `load_judge` and the like take it in place of a name.
    """

    name: str
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder, a file, or the hub at `hub_revision`; `entry` of the table."""

    name: str
    location: str | None  # None where an opener needs no files
    revision: str | None = None
    hub_revision: str | None = None
    entry: dict = field(default_factory=dict, hash=False)


_read = cache(read_yaml)
_open: WeakValueDictionary = WeakValueDictionary()


def table() -> dict[str, dict]:
    """`data/models.yaml`: kind ("model", "vlm", "clip", "judge", "preview") → name → entry."""
    return _read(_files.data_folder() / "models.yaml", "table of models")


def names(kind: str, shipped: bool | None = None) -> list[str]:
    """The names of a kind, or only those of the models that are shipped, or are not."""
    known = table()[kind].items()
    return [name for name, entry in known if shipped in (None, "folder" in entry)]


def find(kind: str, name: str | Path, revision: str | None = None) -> Source:
    """Where the model of this name, folder, file or hub id lies; nothing is fetched.

    Raises:
        ValueError, FileNotFoundError: one line; no such name, or a shipped folder is missing.
    """
    text, known = str(name), table()[kind]
    entry = next((e for n, e in known.items() if text in (n, e.get("repository"))), {})
    if kind == "judge" and text.endswith(".onnx"):
        entry = {**known["nudenet-v2"], "file": Path(text).absolute()}
    if "folder" in entry:
        folder = _files.data_folder() / "models" / entry["folder"]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the {kind} {text!r} is not in {folder.parent}; get the whole clone, or make it "
                f"with: {entry['train']}"
            )
        return _folder(text, folder)
    if "repository" in entry:
        pinned = revision or entry["revision"]
        return Source(text, entry["repository"], pinned, pinned, entry)
    if entry:
        file = entry.get("file")
        return Source(text, file and str(_files.user_cache() / "models" / file), entry=entry)
    if Path(text).is_dir():
        return _folder(Path(text).resolve().name, Path(text))
    is_hub_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/"))
    if not (is_hub_id and all(text.split("/"))):
        raise _files.unknown(kind, text, known)
    if revision is None:
        raise ValueError(
            f"{kind} {text!r} is no folder here, and as a hub id it needs a commit: "
            "pass revision=..., so that the same weights are used again"
        )
    return Source(text, text, revision, revision)


def _folder(name: str, folder: Path) -> Source:
    _files.check_safetensors(folder)
    return Source(name, str(folder), _files.fingerprint(folder))


def whereabouts(kind: str, name: str | Path | ModelSpec) -> tuple[str, bool]:
    """Where a model comes from, and whether it is here; nothing is fetched. Errors as of `find`."""
    if str(name).startswith(("http://", "https://")):
        return str(name), True
    source = find(kind, str(name), getattr(name, "options", {}).get("revision"))
    place, revision = source.location or source.entry["opener"], source.hub_revision
    if revision is None:
        return place, source.location is None or Path(place).exists()
    configs = "model_index.json", "config.json", "open_clip_config.json"
    cached = (try_to_load_from_cache(place, file, revision=revision) for file in configs)
    return f"{place} at {revision[:8]}", any(isinstance(file, str) for file in cached)


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
        model: a name ("moji-sd", "sd-1.4", "sdxl"), a folder in diffusers' format, a hub id, a
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
        how = {**options, "device": device, "dtype": _dtype(dtype)}
        source = find("model", model, revision)
        backbone = _opened(source, "model_index.json", Backbone.from_pretrained, how)
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
    own = source.entry.get("options", {})
    options = {**own, **options, "device": device, "dtype": _dtype(dtype)}
    return _opened(source, "config.json", TransformersVLM.from_pretrained, options)


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

    def opened(location: str, hub_revision: str | None, name: str) -> Preview:
        vae = open_whole(AutoencoderTiny, location, revision=hub_revision, dtype=_dtype(dtype))
        return Preview(vae.to(device or default_device()), name, "")

    return _opened(find("preview", preview, revision), "config.json", opened)


@_with_own_options
def load_clip(clip, revision: str | None = None, *, device=None):
    """Open a CLIP in open_clip's format: a name, a folder, a hub id, or a `CLIPScore` as it is."""
    from vldnp.models.clip import CLIPScore

    if not isinstance(clip, str | Path):
        return clip

    def opened(folder: str, hub_revision: str | None, name: str) -> CLIPScore:
        if hub_revision:
            files = ["*.json", "*.txt", "open_clip_model.safetensors"]
            folder = snapshot_download(folder, revision=hub_revision, allow_patterns=files)
        return CLIPScore.from_pretrained(folder, device or default_device(), name)

    return _opened(find("clip", clip, revision), "", opened)


@_with_own_options
def load_judge(judge, revision: str | None = None, *, device=None, **options):
    """Open a judge.

    Args:
        judge: a name ("moji-judge"; "nudenet", the v3 detector; "nudenet-v2", the paper's judge;
            "sd-safety-checker"), the path of NudeNet v2's `.onnx` file, a folder of a class in
            `data/models.yaml`, the folder or hub id of a pipeline with a safety checker, or a
            judge as it is.
        revision, device: as in `load`.
        options: of the judge's class, as `NudeNetJudge`'s `exposed`.
    """
    if not isinstance(judge, str | Path):
        return judge
    source = find("judge", judge, revision)
    if opener := source.entry.get("opener"):
        if source.location and not Path(source.location).is_file():
            raise FileNotFoundError(
                f"judge {source.name!r}: {source.location} does not exist; get "
                f"{source.entry['url']} and save it there"
            )
        return _resolved(opener)(*filter(None, [source.location]), **options)

    def opened(location: str, hub_revision: str | None, name: str):
        how = {"name": name, "device": device or default_device(), **options}
        pinned = {"revision": hub_revision} if hub_revision else {}
        return _resolved(table()["openers"][_kind_of(Path(location))])(location, **how, **pinned)

    return _opened(source, "", opened)


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


TROUBLES = ImportError, OSError, ValueError, RuntimeError
GATED = (
    "check its name, accept its terms at {page} if it has any, and log in with `hf auth login` or "
    "set HF_TOKEN"
)
HINTS = (  # what is behind a library's error, and what helps
    ((errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError), "see {page}/commits"),
    ((errors.RepositoryNotFoundError,), GATED),
    (
        (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, errors.HTTPError)
        + (errors.RevisionResolutionError,),
        "{how} once to fetch it, or pass a folder that holds it",
    ),
)


def _opened(source: Source, file: str, opener: Callable, options: dict | None = None):
    """What `opener` makes of a folder with that `file`, or of the hub.

    Raises:
        ValueError, FileNotFoundError: one line with the model, what its library says, what helps.
    """
    if source.hub_revision is None and not Path(source.location, file).exists():
        raise FileNotFoundError(f"no model to open in {source.location}: {file} is missing")
    opener = partial(opener, source.location, source.hub_revision, name=source.name)
    try:
        model = opener(**(options or {}))
    except (*TROUBLES, errors.HTTPError, errors.RevisionResolutionError) as error:
        hint = _hint(error, source)
        is_ours = isinstance(error, FileNotFoundError | ValueError) and "\n" not in str(error)
        if is_ours and not hint:
            raise
        where = f"{source.location} at revision {source.revision}"
        reason = "; ".join(filter(None, [_files.first_line(error).rstrip("."), hint]))
        raise ValueError(f"{source.name!r} cannot be opened from {where}: {reason}") from error
    model.revision = source.revision
    return model


def _hint(error: BaseException | None, source: Source) -> str:
    """What helps; the libraries raise errors of their own, and the hub's are behind them."""
    behind = []
    while error is not None:
        behind.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(e, torch.OutOfMemoryError) for e in behind):
        return (
            "it needs less with dtype='float16', with model_cpu_offload=True or, if it is a VLM, "
            "with quantization={'load_in_4bit': True}"
        )
    refused = {getattr(getattr(e, "response", None), "status_code", None) for e in behind}
    hints = [h for kinds, h in HINTS if any(isinstance(e, kinds) for e in behind)]
    if source.hub_revision is None or not (hints or refused & {401, 403}):
        return ""
    how = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "go online"
    hint = GATED if refused & {401, 403} else hints[0]
    return hint.format(page=f"{constants.ENDPOINT}/{source.location}", how=how)


def _dtype(dtype) -> torch.dtype | str | None:
    """A dtype, also by its name, as profiles have it."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise _files.unknown("dtype", dtype, ["float32", "float16", "bfloat16"])
    return getattr(torch, dtype)


def _plain(option) -> str:
    return str(option) if isinstance(option, str | int | float | None) else type(option).__name__
