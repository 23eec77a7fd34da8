"""CLIP scores by open_clip."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from vldnp._files import fingerprint
from vldnp._finite import check_finite


class CLIPScore:
    """Text–image cosine similarity of an `open_clip` model (Hessel et al. 2021, unscaled)."""

    def __init__(self, model, preprocess, tokenizer, name: str, revision: str):
        self.model, self.preprocess, self.tokenizer = model.eval(), preprocess, tokenizer
        self.name, self.revision, self.told = name, revision, False  # told: of a cut text

    @classmethod
    def from_pretrained(cls, folder, revision=None, *, name="", device="cpu") -> "CLIPScore":
        """Open a folder in open_clip's format, or, with a revision, a hub id; safetensors only."""
        import open_clip

        if revision:
            files = ["*.json", "*.txt", "open_clip_model.safetensors"]
            folder = snapshot_download(folder, revision=revision, allow_patterns=files)
        if not any(Path(folder).glob("*.safetensors")):
            raise FileNotFoundError(f"no CLIP model in {folder}: *.safetensors is missing")
        source, own = f"local-dir:{folder}", (name or Path(folder).name, fingerprint(folder))
        model, _, preprocess = open_clip.create_model_and_transforms(source, device=device)
        return cls(model.requires_grad_(False), preprocess, open_clip.get_tokenizer(source), *own)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors `[B, D]` on the CPU."""
        return self._embed(self.model.encode_image, torch.stack([*map(self.preprocess, images)]))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `[B, D]` on the CPU."""
        texts, tokens = list(texts), self.tokenizer(list(texts))
        longer = self.tokenizer(texts, context_length=tokens.shape[1] + 1)[:, :-1]
        if (cut := (tokens != longer).any(1)).any() and not self.told:
            self.told, text = True, texts[int(cut.int().argmax())]
            said = f"CLIP scores ignore the tokens of a text after the first {tokens.shape[1]}"
            warnings.warn(f"{said}, such as {text!r}", stacklevel=2)
        return self._embed(self.model.encode_text, tokens)

    @torch.inference_mode()
    def _embed(self, encode, inputs: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        return torch.cat([encode(x.to(device), normalize=True).cpu() for x in inputs.split(64)])

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """The cosine of each image with its own prompt: `[B]` in −1..1, never NaN."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        cosines = (self.embed_images(images) * self.embed_texts(prompts)).sum(1)
        check_finite({"the CLIP score": cosines})
        return cosines.numpy()
