"""The zoo: names → loaded models, embedded, from a folder or from the hub.

Weights are safetensors, never pickles; no model brings code of its own; hub models are pinned to
a revision.
"""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vldnp.files import check_safetensors, data_folder, fingerprint, unknown
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
    "judge": ("moji-judge",),
}
"""What the project trained itself: folders in `data/models`."""

TRAINING = {"model": "text2image", "vlm": "vlm", "clip": "clip", "judge": "judge"}
"""What `python -m vldnp.moji train` calls each kind."""

HUB = {
    "model": {
        "sd-1.4": HubModel(
            "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"
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
}
"""The hub's models by short name. The revisions are those that published work names; they were
looked up, not downloaded, when this table was written."""


def names(kind: str) -> list[str]:
    """All names that `load` ("model"), `load_vlm`, `load_clip` or `load_judge` know."""
    return [*EMBEDDED[kind], *HUB[kind], *(["nudenet"] if kind == "judge" else [])]


def load(model, revision: str | None = None, *, device=None, dtype=torch.float32):
    """Open a text-to-image model.

    Args:
        model: a name ("moji-sd", "sd-1.4"), a folder in diffusers' format, a hub id, a diffusers
            pipeline, or a `Backbone` (returned as it is).
        revision: commit of the hub repository; needed for a hub id that has no name here.
        device: default is CUDA where there is one, else the CPU.
        dtype: of weights and latents.

    Raises:
        ValueError, FileNotFoundError: one line naming what is wrong and what would be right.
    """
    from vldnp.backbone import Backbone, as_backbone

    if not isinstance(model, str | Path):
        backbone = as_backbone(model)
        if backbone.revision is None:
            backbone.revision = weights_fingerprint(backbone.pipe)
        return backbone
    source = _find("model", model, revision)
    _require(source, "model_index.json")
    with _one_line(source):
        backbone = Backbone.from_pretrained(
            source.location, source.hub_revision, name=source.name, device=device, dtype=dtype
        )
    backbone.revision = source.revision
    return backbone


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
            `batch_size`, `quantization`; or of `RemoteVLM`.
    """
    if not isinstance(vlm, str | Path):
        if not callable(vlm):
            raise TypeError(f"a VLM is a name or a callable (images, question), not {vlm!r}")
        return vlm
    from vldnp.vlm import RemoteVLM, TransformersVLM

    if str(vlm).startswith(("http://", "https://")):
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
            dtype=dtype,
            **{**source.options, **options},
        )
    opened.revision = source.revision
    return opened


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
        return CLIPScore.from_pretrained(folder, device or _device(), source.name, source.revision)


def load_judge(judge, revision: str | None = None, *, device=None, **options) -> Judge:
    """Open a judge.

    Args:
        judge: "moji-judge" or the folder of a `CNNJudge`; "nudenet", the v3 detector; the path of
            NudeNet v2's classifier, an `.onnx` file; "sd-safety-checker", or the folder or hub id
            of a Stable Diffusion pipeline or the folder of its safety checker; or a judge as it is.
        revision, device: as in `load`.
        options: of `NudeNetJudge` (`exposed`, `batch_size`) or `NudeNetClassifier`.
    """
    if not isinstance(judge, str | Path):
        return judge
    if judge == "nudenet":
        return NudeNetJudge(**options)
    if Path(judge).suffix == ".onnx":
        return NudeNetClassifier(judge, **options)
    source = _find("judge", judge, revision)
    with _one_line(source):
        folder = Path(source.location)
        if (source.hub_revision is None) and not _is_checker(folder):
            return CNNJudge.from_pretrained(folder, device or _device(), source.name)
        checker = SafetyChecker.from_pretrained(
            source.location, source.hub_revision, name=source.name, device=device or _device()
        )
        checker.revision = source.revision
        return checker


def _is_checker(folder: Path) -> bool:
    if (folder / "safety_checker").is_dir():
        return True
    config = folder / "config.json"
    return config.is_file() and "StableDiffusionSafetyChecker" in config.read_text("utf-8")


def reference_images(world: str, count: int, seed: int) -> np.ndarray:
    """Real pictures to compare generated ones with: uint8 `[count, H, W, 3]`.

    Args:
        world: "moji", whose renderer draws harmless scenes that no model was trained on.
    """
    if world != "moji":
        raise unknown("set of reference images", world, ["moji"])
    from vldnp.moji.scenes import reference_images as rendered

    return rendered(count, seed)


def weights_fingerprint(pipeline) -> str:
    """Twelve hex digits of the SHA-256 of a pipeline's weights, wherever they come from."""
    digest = hashlib.sha256()
    for part in ("unet", "vae", "text_encoder"):
        for key, tensor in sorted(getattr(pipeline, part).state_dict().items()):
            digest.update(f"{part}.{key}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().reshape(-1).contiguous()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


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
    if text in EMBEDDED[kind]:
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
            raise ValueError(
                f"{kind} {text!r} is no folder here, and as a hub id it needs a commit: "
                f"pass revision=..., so that the same weights are used again"
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

    Shapes that do not fit are RuntimeErrors in torch; what is missing on disk or on the hub is an
    OSError in transformers, diffusers and huggingface_hub; a package that a model needs and that
    is not installed is an ImportError.
    """
    try:
        yield
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "unknown reason")
        if "\n" not in str(error) and isinstance(error, FileNotFoundError | ValueError):
            raise
        where = f"{source.location} at revision {source.revision}"
        raise ValueError(f"{source.name!r} cannot be opened from {where}: {reason}") from error


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
