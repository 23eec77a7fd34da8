"""Names of models, where they come from, and the revisions that are pinned."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from vldnp._files import check_safetensors, data_folder, fingerprint, unknown, user_cache


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at a fixed revision, with the settings it is used with."""

    repository: str
    revision: str
    options: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ModelSpec:
    """A model as a profile has it: a name, folder or hub id, and the options it is opened with.

    `vldnp.load`, `load_vlm`, `load_judge` and `load_clip` take it in place of a name.
    """

    name: str
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


EMBEDDED = {
    "model": ("moji-sd",),
    "vlm": ("moji-vlm-s", "moji-vlm-m", "moji-vlm-l"),
    "clip": ("moji-clip",),
    "judge": ("moji-judge", "moji-judge-2"),
    "preview": ("moji-taesd",),
}
"""What the project trained itself: folders in `data/models`."""

TRAINING = {
    "model": "text2image",
    "vlm": "vlm",
    "clip": "clip",
    "judge": "judge",
    "preview": "preview",
}
"""What `python -m moji train` calls each kind."""

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
    """All names that `load` ("model"), `load_vlm` and its like know."""
    return [*EMBEDDED.get(kind, ()), *HUB[kind], *(NUDENET if kind == "judge" else ())]


def whereabouts(kind: str, name: str | Path | ModelSpec) -> tuple[str, bool]:
    """Where a model named in a profile comes from, and whether it is here; nothing is fetched.

    Args:
        kind: "model", "vlm", "clip", "judge" or "preview".
        name: as `load`, `load_vlm` and its like take it.

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
    revision = name.options.get("revision") if isinstance(name, ModelSpec) else None
    source = find(kind, text, revision)
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
    "diffusion_pytorch_model.safetensors",
    "safety_checker/model.safetensors",
)
"""Files of which a model that was fetched has one."""


def _is_cached(source: "Source") -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = (
        try_to_load_from_cache(source.location, file, revision=source.hub_revision)
        for file in WEIGHTS
    )
    return any(isinstance(file, str) for file in found)


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


@dataclass(frozen=True)
class Source:
    """Where a model lies. `hub_revision` is None for a folder."""

    name: str
    location: str
    revision: str
    hub_revision: str | None = None
    options: dict = field(default_factory=dict, hash=False)


def find(kind: str, name: str | Path, revision: str | None) -> Source:
    text = str(name)
    if text in EMBEDDED.get(kind, ()):
        folder = data_folder() / "models" / text
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the Moji {kind} {text!r} is not in {folder.parent}; get the whole clone, or "
                f"train it with: python -m moji train {TRAINING[kind]}"
            )
        return _folder(text, folder)
    for short, hub in HUB[kind].items():
        if text in (short, hub.repository):
            pinned = revision or hub.revision
            return Source(text, hub.repository, pinned, pinned, hub.options)
    if Path(text).is_dir():
        return _folder(Path(text).resolve().name, Path(text))
    is_hub_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/"))
    if is_hub_id and all(text.split("/")):
        if revision is None:
            raise ValueError(
                f"{kind} {text!r} is no folder here, and as a hub id it needs a commit: "
                "pass revision=..., so that the same weights are used again"
            )
        return Source(text, text, revision, revision)
    raise unknown(kind, text, names(kind))


def _folder(name: str, folder: Path) -> Source:
    check_safetensors(folder)
    return Source(name, str(folder), fingerprint(folder))


def require(source: Source, file: str) -> None:
    if source.hub_revision is None and not (Path(source.location) / file).is_file():
        raise FileNotFoundError(f"no model to open in {source.location}: {file} is missing")


def default_device() -> str:
    """Where models are opened of which nothing else is said: CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
