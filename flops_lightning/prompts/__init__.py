"""Prompts for frozen CLIP models of open_clip, to be learned from losses alone (FLOPS, ICLR 2025, section 5.2)."""

from flops_lightning.prompts.class_texts import ClassTexts, class_features
from flops_lightning.prompts.intrinsic import IntrinsicPrompt, PromptSpec
from flops_lightning.prompts.stages import PromptedCLIP, image_start, stage_clip, text_start

__all__ = [
    "ClassTexts",
    "IntrinsicPrompt",
    "PromptSpec",
    "PromptedCLIP",
    "class_features",
    "image_start",
    "stage_clip",
    "text_start",
]
