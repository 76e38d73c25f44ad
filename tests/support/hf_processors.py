"""Processors of transformers made by hand, without a hub: what they count and cut is theirs, their words are few."""

from __future__ import annotations

import functools
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

MARKS = (
    "<image>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
    "<|vision_end|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "\n",
)  # fmt: skip


def words() -> tf.PreTrainedTokenizerFast:
    """Return a tokenizer that knows the marks of all families, each as one token."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    made.add_tokens([*MARKS, *(f"<row_{r}_col_{c}>" for r in range(1, 13) for c in range(1, 13))], special_tokens=True)
    context = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
               "video_token": "<video>"}  # fmt: skip
    for name, token in context.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def _silent(kind: type, *parts: Any, **settings: Any) -> Any:
    """Make a processor without its video processor, which needs torchvision, and which no image asks anything."""

    class Silent(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return Silent(*parts, None, **settings)


@functools.cache
def processor(name: str) -> Any:
    """Return the processor of a stack of the planner, with the settings of its checkpoints."""
    tokens = words()
    qwen = {"min_pixels": 56 * 56, "max_pixels": 12845056}
    match name:
        case "llava-1.5":
            images: Any = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
            return tf.LlavaProcessor(
                images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
            )
        case "llava-next":
            return tf.LlavaNextProcessor(
                LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336), tokens, patch_size=14,
                vision_feature_select_strategy="default", num_additional_image_tokens=1,
            )  # fmt: skip
        case "llava-onevision":
            return _silent(tf.LlavaOnevisionProcessor, LlavaOnevisionImageProcessorPil(), tokens, num_image_tokens=729,
                vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
            )  # fmt: skip
        case "internvl":
            images = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12)
            return _silent(tf.InternVLProcessor, images, tokens)
        case "idefics3":
            return tf.Idefics3Processor(Idefics3ImageProcessorPil(), tokens, image_seq_len=169)
        case "smolvlm":
            images = SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
            return tf.Idefics3Processor(images, tokens, image_seq_len=64)  # its own wants num2words, for videos
        case "qwen2-vl":
            return _silent(tf.Qwen2VLProcessor, Qwen2VLImageProcessorPil(**qwen), tokens)
        case "qwen2.5-vl":
            return _silent(tf.Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil(**qwen), tokens)
        case "qwen3-vl":
            images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=65536, max_pixels=16777216)
            return _silent(tf.Qwen3VLProcessor, images, tokens)
    raise KeyError(name)
