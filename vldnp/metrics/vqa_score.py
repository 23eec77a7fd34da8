"""VQAScore: how sure a VLM is that a picture shows what its prompt says.

Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", ECCV 2024,
arXiv 2404.01291. It tells who does what to whom, where CLIP sees a bag of words.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from vldnp.models.vlm import TransformersVLM

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
"""The paper's; its answer is "Yes"."""


def vqa_scores(
    vlm: TransformersVLM, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[float]:
    """P("Yes" | picture, question about its prompt) for each picture, in 0 … 1.

    Other ways to begin a yes ("yes", " Yes") count too; "No" does not enter, as in the paper.

    Args:
        vlm: one that answers questions in general; the Moji VLMs know only one question.
        images, prompts: as many of both.

    Raises:
        ValueError: there are not as many, or the VLM's tokenizer has no token for "Yes".
    """
    questions = [QUESTION.format(prompt) for prompt in prompts]
    logits = vlm.first_logits(images, questions)
    return probability(logits, yes_tokens(vlm.processor.tokenizer)).tolist()


def probability(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Σ_k softmax(logits)_k over these tokens, `[B]` from `[B, V]`."""
    return logits.float().softmax(dim=1)[:, list(tokens)].sum(dim=1)


def yes_tokens(tokenizer) -> list[int]:
    """The single tokens that are a whole "yes"."""
    written = (tokenizer(text, add_special_tokens=False).input_ids for text in _YES)
    tokens = sorted({ids[0] for ids in written if len(ids) == 1} - {tokenizer.unk_token_id})
    if not tokens:
        raise ValueError('this VLM\'s tokenizer has no token for "Yes", which VQAScore reads')
    return tokens


_YES = ("Yes", "yes", " Yes", " yes")
