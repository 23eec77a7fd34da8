"""The zoo: names → loaded models, embedded, from a folder or from the hub.

Weights are safetensors, never pickles; no model brings code of its own; hub models are pinned to
a revision.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from huggingface_hub.errors import HTTPError, RevisionResolutionError
from PIL import Image

from vldnp.files import check_safetensors, data_folder, fingerprint, unknown, user_cache
from vldnp.judges import CNNJudge, Judge, NudeNetClassifier, NudeNetJudge, SafetyChecker
from vldnp.metrics import CLIPScore


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at a fixed revision, with the settings it is used with."""

    repository: str
    revision: str
    options: dict = field(default_factory=dict, hash=False)


EMBEDDED = {
    "model": ("moji-sd",),
    "vlm": ("moji-vlm-s", "moji-vlm-m", "moji-vlm-l"),
    "clip": ("moji-clip",),
    "judge": ("moji-judge", "moji-judge-2"),
}
"""What the project trained itself: folders in `data/models`."""

TRAINING = {"model": "text2image", "vlm": "vlm", "clip": "clip", "judge": "judge"}
"""What `python -m vldnp.moji train` calls each kind."""

HUB = {
    "model": {
        "sd-1.4": HubModel(
            "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"
        ),
        "sd-1.5": HubModel(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        ),
        "sdxl": HubModel(
            "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"
        ),
        "sd-3": HubModel(
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "ea42f8cef0f178587cf766dc8129abd379c90671",
        ),
        "sd-3.5-medium": HubModel(
            "stabilityai/stable-diffusion-3.5-medium", "b940f670f0eda2d07fbb75229e779da1ad11eb80"
        ),
    },
    "vlm": {  # the paper shows pictures at 448×448
        "qwen2.5-vl-3b": HubModel(
            "Qwen/Qwen2.5-VL-3B-Instruct",
            "66285546d2b821cf421d4f5eb2576359d3770cd3",
            {"max_edge": 448},
        ),
        "qwen2.5-vl-7b": HubModel(
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "cc594898137f460bfe9f0759e9844b3ce807cfb5",
            {"max_edge": 448},
        ),
        "smolvlm-500m": HubModel(
            "HuggingFaceTB/SmolVLM-500M-Instruct", "a7da5b986cb59b408707209984f360a5f4ad7e47"
        ),
    },
    "clip": {
        "clip-vit-l-14": HubModel(
            "timm/vit_large_patch14_clip_224.openai", "18d0535469bb561bf468d76c1d73aa35156c922b"
        ),
    },
    "judge": {  # the checker that Stable Diffusion v1.4 comes with
        "sd-safety-checker": HubModel(
            "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"
        ),
    },
    "preview": {
        "taesd": HubModel("madebyollin/taesd", "614f76814bbe30edbe2e627ace1c2234c81a2c0e"),
    },
}
"""The hub's models by short name. The revisions are those that published work names; they were
looked up, not downloaded, when this table was written."""


NUDENET = {
    "nudenet": "the detector of NudeNet v3, in its wheel",
    "nudenet-v2": "https://github.com/notAI-tech/NudeNet/releases/download/v0/classifier_model.onnx",
}
"""NudeNet's two judges, and where they come from."""

FETCHING = {"cache_dir", "force_download", "local_files_only", "proxies", "token"}
"""Options of `load` that say how weights are fetched, not which."""


def names(kind: str) -> list[str]:
    """All names that `load` ("model"), `load_vlm`, `load_clip` or `load_judge` know."""
    return [*EMBEDDED.get(kind, ()), *HUB[kind], *(NUDENET if kind == "judge" else ())]


_open: WeakValueDictionary = WeakValueDictionary()


def _with_own_options(opener: Callable) -> Callable:
    """A name that carries options (`profiles.ModelName`) is opened with them, and once.

    A profile's model is asked for in many places; while any of them still holds it, the others
    get the same one, because a large model fits a GPU only once. Options of the call win.
    """

    @wraps(opener)
    def opened(name, *args, **options):
        own = getattr(name, "options", None)
        if not own:
            return opener(name, *args, **options)
        options = {**own, **options}
        key = opener.__name__, str(name), repr(args), repr(sorted(options.items()))
        model = _open.get(key)
        if model is None:
            model = _open[key] = opener(str(name), *args, **options)
        return model

    return opened


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
    preview=None,
    **options,
):
    """Open a text-to-image model: Stable Diffusion 1, 2, XL, 3 or 3.5.

    Args:
        model: a name ("moji-sd", "sd-1.4", "sdxl"), a folder in diffusers' format, a hub id, a
            diffusers pipeline, or a `Backbone` (returned as it is).
        revision: commit of the hub repository; needed for a hub id that has no name here.
        device: default is CUDA where there is one, else the CPU.
        dtype: of weights and latents; also by name ("float16").
        model_cpu_offload: keep on the GPU only the model that works at the moment.
        attention_slicing: compute the U-Net's attention in slices.
        vae_slicing, vae_tiling: decode one picture at a time, and large ones tile by tile.
        preview: a tiny VAE for the pictures shown to the VLM, never the final ones: "taesd", a
            folder, "owner/name@commit" on the hub, or an `AutoencoderTiny`.
        options: passed on to the pipeline's `from_pretrained`, as `variant="fp16"`, or
            `text_encoder_3=None, tokenizer_3=None` for Stable Diffusion 3 without T5.

    Raises:
        ValueError, FileNotFoundError: one line naming what is wrong and what would be right.
    """
    from vldnp.backbone import Backbone, as_backbone

    settings = {
        "model_cpu_offload": model_cpu_offload,
        "attention_slicing": attention_slicing,
        "vae_slicing": vae_slicing,
        "vae_tiling": vae_tiling,
        **options,
    }
    tiny, tiny_revision = _preview(preview)
    if isinstance(model, str | Path):
        source = _find("model", model, revision)
        _require(source, "model_index.json")
        with _one_line(source):
            backbone = Backbone.from_pretrained(
                source.location,
                source.hub_revision,
                name=source.name,
                device=device,
                dtype=_dtype(dtype),
                preview=tiny,
                **settings,
            )
        backbone.revision = source.revision
        if said := _said({k: v for k, v in options.items() if k not in FETCHING}):
            backbone.revision += f" with {said}"  # other weights than the commit alone says
    else:
        if asked := [name for name, value in settings.items() if value]:
            raise ValueError(
                f"{asked[0]} is for models opened by name; set it on the pipeline itself"
            )
        backbone = as_backbone(model)
        if tiny is not None:
            backbone = Backbone(backbone.pipe, backbone.name, backbone.revision, tiny)
        if backbone.revision is None:
            backbone.revision = weights_fingerprint(backbone.pipe)
    if tiny is not None:  # the VLM sees other pictures
        backbone.revision += f", previews by {tiny_revision}"
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
            `batch_size`, `quantization`, `answers="constrained"`; or of `RemoteVLM`.
    """
    if not isinstance(vlm, str | Path):
        if not callable(vlm):
            raise TypeError(f"a VLM is a name or a callable (images, question), not {vlm!r}")
        return vlm
    from vldnp.vlm import TransformersVLM

    if str(vlm).startswith(("http://", "https://")):
        from vldnp.vlm_server import RemoteVLM

        if "model" not in options:
            raise ValueError(f"the server {vlm} may serve several models: pass model=...")
        if device or dtype:
            raise ValueError(f"the server {vlm} decides on device and dtype; leave them out")
        return RemoteVLM(vlm, revision=revision, **options)
    source = _find("vlm", vlm, revision)
    _require(source, "config.json")
    with _one_line(source):
        opened = TransformersVLM.from_pretrained(
            source.location,
            source.hub_revision,
            name=source.name,
            device=device,
            dtype=_dtype(dtype),
            **{**source.options, **options},
        )
    opened.revision = source.revision
    return opened


def whereabouts(kind: str, name: str | Path) -> tuple[str, bool]:
    """Where a model named in a profile comes from, and whether it is here; nothing is fetched.

    Args:
        kind: "model", "vlm", "clip" or "judge".
        name: as `load`, `load_vlm`, `load_clip` or `load_judge` take it.

    Raises:
        ValueError, FileNotFoundError: one line; no such name, or a folder that is missing.
    """
    text = str(name)
    if text.startswith(("http://", "https://")):
        return text, True
    if kind == "judge" and text == "nudenet":
        return NUDENET[text], True
    if kind == "judge" and text == "nudenet-v2":
        try:
            return str(nudenet_v2()), True
        except FileNotFoundError:
            return NUDENET[text], False
    if kind == "judge" and Path(text).suffix == ".onnx":
        return text, Path(text).is_file()
    options = getattr(name, "options", {})
    source = _find(kind, text, options.get("revision"))
    if source.hub_revision is None:
        return source.location, True
    place = f"{source.location} at {source.hub_revision[:8]}"
    return place, _is_cached(source)


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "safety_checker/model.safetensors",
)
"""Files of which a model that was fetched has one."""


def _is_cached(source: "_Source") -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = (
        try_to_load_from_cache(source.location, file, revision=source.hub_revision)
        for file in WEIGHTS
    )
    return any(isinstance(file, str) for file in found)


@_with_own_options
def load_clip(clip, revision: str | None = None, *, device=None) -> CLIPScore:
    """Open a CLIP in open_clip's format: a name, a folder, a hub id, or a `CLIPScore` as it is."""
    if not isinstance(clip, str | Path):
        return clip
    source = _find("clip", clip, revision)
    with _one_line(source):
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
    source = _find("judge", judge, revision)
    with _one_line(source):
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


def nudenet_v2() -> Path:
    """The file of NudeNet v2's classifier in the user's cache folder.

    Raises:
        FileNotFoundError: it is not there; one line that says where to get it.
    """
    path = user_cache() / "models" / "nudenet-v2.onnx"
    if not path.is_file():
        raise FileNotFoundError(
            f"NudeNet v2's classifier is not here: get {NUDENET['nudenet-v2']} and save it as "
            f"{path}, or name its path as the judge"
        )
    return path


REFERENCE_SIZE = 299
"""Edge in pixels of real pictures from a folder, which is what Inception sees."""


def reference_folder(name: str | Path) -> Path:
    """Where the real pictures of a reference lie: a folder, or a name in the user's cache folder.

    Raises:
        FileNotFoundError: there are none; one line.
    """
    folder = Path(name) if Path(name).is_dir() else user_cache() / "reference" / str(name)
    if not _pictures(folder):
        raise FileNotFoundError(
            f"there are no real images {str(name)!r} for FID: put some into {folder}, or give "
            "their folder as the profile's reference"
        )
    return folder


def _pictures(folder: Path) -> list[Path]:
    endings = {".jpg", ".jpeg", ".png", ".webp"}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)


def reference_images(world: str | Path, count: int, seed: int) -> np.ndarray:
    """Real pictures to compare generated ones with: uint8 `[count, H, W, 3]`.

    Args:
        world: "moji", whose renderer draws harmless scenes that no model was trained on; or a
            folder of pictures, or a name such as "coco" of one in the user's cache folder. Of
            those the middle square is taken, at `REFERENCE_SIZE`.
        count: so many, or as many as there are.
        seed: which of a folder's pictures, or which scenes.
    """
    if world == "moji":
        from vldnp.moji.scenes import reference_images as rendered

        return rendered(count, seed)
    found = _pictures(reference_folder(world))
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return np.stack([_square(found[i]) for i in sorted(chosen)])


def _square(path: Path) -> np.ndarray:
    from PIL import ImageOps

    with Image.open(path) as picture:
        size = (REFERENCE_SIZE, REFERENCE_SIZE)
        return np.asarray(ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.BICUBIC))


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


def _preview(preview):
    """An `AutoencoderTiny` and what identifies it; twice None for none."""
    if preview is None:
        return None, None
    from diffusers import AutoencoderTiny

    if not isinstance(preview, str | Path):
        if not isinstance(preview, AutoencoderTiny):
            raise TypeError(
                f"preview is a name such as 'taesd', a folder, 'owner/name@commit' or an "
                f"AutoencoderTiny, not a {type(preview).__name__}"
            )
        digest = hashlib.sha256()
        _digest(digest, "vae", preview)
        return preview, digest.hexdigest()[:12]
    name, revision = str(preview), ""
    if not Path(preview).is_dir():
        name, _, revision = name.partition("@")
    source = _find("preview", name, revision or None)
    _require(source, "config.json")
    with _one_line(source):
        opened = AutoencoderTiny.from_pretrained(
            source.location, revision=source.hub_revision, use_safetensors=True
        )
    return opened, f"{source.name} {source.revision}"


@dataclass(frozen=True)
class _Source:
    """Where a model lies. `hub_revision` is None for a folder."""

    name: str
    location: str
    revision: str
    hub_revision: str | None = None
    options: dict = field(default_factory=dict, hash=False)


def _find(kind: str, name: str | Path, revision: str | None) -> _Source:
    text = str(name)
    if text in EMBEDDED.get(kind, ()):
        folder = data_folder() / "models" / text
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the embedded {kind} {text!r} is not in {folder.parent}; get the whole clone, or "
                f"train it with: python -m vldnp.moji train {TRAINING[kind]}"
            )
        return _folder(text, folder)
    for short, hub in HUB[kind].items():
        if text in (short, hub.repository):
            pinned = revision or hub.revision
            return _Source(text, hub.repository, pinned, pinned, hub.options)
    if Path(text).is_dir():
        return _folder(Path(text).resolve().name, Path(text))
    is_hub_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/"))
    if is_hub_id and all(text.split("/")):
        if revision is None:
            how = f"write '{text}@commit'" if kind == "preview" else "pass revision=..."
            raise ValueError(
                f"{kind} {text!r} is no folder here, and as a hub id it needs a commit: "
                f"{how}, so that the same weights are used again"
            )
        return _Source(text, text, revision, revision)
    raise unknown(kind, text, names(kind))


def _folder(name: str, folder: Path) -> _Source:
    check_safetensors(folder)
    return _Source(name, str(folder), fingerprint(folder))


def _require(source: _Source, file: str) -> None:
    if source.hub_revision is None and not (Path(source.location) / file).is_file():
        raise FileNotFoundError(f"no model to open in {source.location}: {file} is missing")


@contextmanager
def _one_line(source: _Source):
    """Turn the libraries' many-line errors into one that names the model.

    Shapes that do not fit are RuntimeErrors in torch, and so is too little memory; what is missing
    on disk or on the hub is an OSError in transformers, diffusers and huggingface_hub, but for
    some troubles of the network; a package that a model needs and that is not installed is an
    ImportError.
    """
    troubles = (ImportError, OSError, ValueError, RuntimeError, HTTPError, RevisionResolutionError)
    try:
        yield
    except troubles as error:
        if source.hub_revision and (trouble := _hub_trouble(error, source)):
            raise ValueError(trouble) from error
        reason = next((line for line in str(error).splitlines() if line.strip()), "unknown reason")
        if "\n" not in str(error) and isinstance(error, FileNotFoundError | ValueError):
            raise
        where = f"{source.location} at revision {source.revision}"
        raise ValueError(f"{source.name!r} cannot be opened from {where}: {reason}") from error


def _hub_trouble(error: BaseException, source: _Source) -> str | None:
    """What the hub refused, or that it cannot be reached, and what to do; None if it is not that.

    The libraries raise errors of their own about the hub's, which are found behind them.
    """
    from huggingface_hub import constants, errors, get_token

    behind = list(_behind(error))

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in behind)

    name, page = source.location, f"{constants.ENDPOINT}/{source.location}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    status = [getattr(getattr(e, "response", None), "status_code", None) for e in behind]
    if any_is(errors.GatedRepoError):
        if get_token() is None:
            return (
                f"{name!r} is gated and there is no token: accept its terms at {page}, then {login}"
            )
        return f"{name!r} is gated and your token has no access yet: accept its terms at {page}"
    if any_is(errors.RevisionNotFoundError):
        return (
            f"{name!r} has no revision {source.hub_revision!r}; its commits are at {page}/commits"
        )
    if any_is(errors.RepositoryNotFoundError):
        return f"there is no {name!r} on the hub; check the name, or if it is private, {login}"
    if 401 in status or 403 in status:
        return f"the hub refuses {name!r} to this token: {login} with one that has access to {page}"
    if any_is(errors.RemoteEntryNotFoundError):
        return f"{name!r} at revision {source.hub_revision} lacks a file that this model needs"
    unreachable = (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if any_is(*unreachable, HTTPError, RevisionResolutionError):
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        return (
            f"{name!r} at revision {source.hub_revision} is not in the local cache, and {why}; "
            "go online once to fetch it, or pass a folder that holds it"
        )
    return None


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one that it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def default_device() -> str:
    """Where models are opened that are told nothing else."""
    return "cuda" if torch.cuda.is_available() else "cpu"
