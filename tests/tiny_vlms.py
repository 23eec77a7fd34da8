"""Tiny random VLMs of the families that people use, in the layout of their repositories."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

SIZES = [(32, 32), (60, 32), (28, 56), (64, 64)]
WORDS = "user assistant model : ? , . what can be seen none a cat knife skull dagger blood and feet"
END = "<|im_end|>"
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
QWEN_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAVA_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
GEMMA_TEMPLATE = (
    "{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<start_of_turn>model {% endif %}"
)


def tokenizer(*special: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """A word is a token; `named` are special tokens that the processor asks for by name."""
    words = ["<pad>", "<s>", END, "<unk>", *special, *named.values(), *WORDS.split()]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(list(special))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token=END,
        unk_token="<unk>", extra_special_tokens=named,
    )  # fmt: skip


def qwen2_5_vl(vision=None, most=16, **text):
    """With at most so many tokens an image; `vision` and `text` are sizes of the real ones."""
    kinds = hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLProcessor
    vision = vision or {"depth": 1, "fullatt_block_indexes": [0]}
    return _qwen(*kinds, hf.Qwen2VLVideoProcessor, 14, vision, most=most, **text)


def qwen3_vl():
    kinds = hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, hf.Qwen3VLProcessor
    vision = {"depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    rope = {"mrope_interleaved": True}
    return _qwen(*kinds, hf.Qwen3VLVideoProcessor, 16, vision, rope, head_dim=8)


def _qwen(model, config, processor, video_processor, patch, vision, rope=None, most=16, **text):
    tok = tokenizer("<|im_start|>", *QWEN_MARKS)
    size = {"shortest_edge": 4 * patch**2, "longest_edge": most * 4 * patch**2}
    parts = {
        "image_processor": hf.Qwen2VLImageProcessor(size=size, patch_size=patch),
        "video_processor": video_processor(size=size, patch_size=patch),
    }
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], **(rope or {})}
    own = {**TEXT, **HEADS, "vocab_size": len(tok), "rope_parameters": rope}
    text = own | text | IDS
    names = "vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"
    ids = dict(zip(names, tok.convert_tokens_to_ids(QWEN_MARKS), strict=True))
    built = config(text_config=text, vision_config={**QWEN_VISION, **vision}, **ids)
    return model(built), processor(**parts, tokenizer=tok, chat_template=QWEN_TEMPLATE)


def idefics3():
    kinds = hf.Idefics3ForConditionalGeneration, hf.Idefics3Config, hf.Idefics3Processor
    return _idefics(*kinds, hf.Idefics3ImageProcessor)


def smolvlm():
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    kinds = hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig, hf.SmolVLMProcessor
    return _idefics(
        *kinds, hf.SmolVLMImageProcessor, video_processor=hf.SmolVLMVideoProcessor(**size)
    )


def _idefics(model, config, processor, image_processor, **parts):
    """A picture is cut into 16×16 tiles of 4×4 patches, 4 tokens each."""
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    marks = "<|im_start|> <fake_token_around_image> <image> <end_of_utterance> <global-img>".split()
    tok = tokenizer(*marks, *rows)
    pictures = image_processor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    parts |= {"image_processor": pictures, "tokenizer": tok, "image_seq_len": 4}
    text = {"model_type": "llama", **TEXT, **HEADS, **IDS, "vocab_size": len(tok)}
    vision = {**VISION, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    both = {"text_config": text, "vision_config": vision, "scale_factor": 2, "pad_token_id": 0}
    built = config(**both, image_token_id=tok.convert_tokens_to_ids("<image>"))
    return model(built), processor(**parts, chat_template=IDEFICS_TEMPLATE)


def llava_onevision():
    tok = tokenizer("<|im_start|>", "<image>", "<video>")
    grid, square = [[16, 16], [16, 32], [32, 16]], {"height": 16, "width": 16}
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grid),
        tokenizer=tok, video_processor=hf.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16, vision_feature_select_strategy="full", chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip
    vision = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, **HEADS, **IDS, "vocab_size": len(tok)},
        vision_config=vision, image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"), image_grid_pinpoints=grid,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def gemma3():
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tok = tokenizer("<start_of_turn>", **named, image_token="<image_soft_token>")
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size={"height": 16, "width": 16}), tokenizer=tok,
        image_seq_length=4, chat_template=GEMMA_TEMPLATE,
    )  # fmt: skip
    text = {**TEXT, **HEADS, **IDS, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = hf.Gemma3Config(
        text_config=text | {"vocab_size": len(tok)},
        vision_config={**VISION, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
        tie_word_embeddings=False,  # tied random weights say the last token again and again
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable] = {
    "qwen2.5-vl": qwen2_5_vl, "qwen3-vl": qwen3_vl, "idefics3": idefics3, "smolvlm": smolvlm,
    "llava-onevision": llava_onevision, "gemma3": gemma3,
}  # fmt: skip


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """Build one and write it to `folder`, as `save_pretrained` lays it out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = FAMILIES[family]()
        with torch.no_grad():  # make the answer depend on the picture
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(sizes=SIZES, seed=0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype="uint8")) for w, h in sizes]
