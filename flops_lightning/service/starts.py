"""Where prompts for a service begin, from what the service tells of words and patches."""

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.prompts.intrinsic import IntrinsicPrompt, PromptSpec
from flops_lightning.prompts.stages import IMAGE_SEED
from flops_lightning.service.scorer import Scorer


def service_text_start(scorer: Scorer, spec: PromptSpec) -> IntrinsicPrompt:
    """A prompt for :func:`stage_service`, at the words before the name or at zero; see :func:`text_start`."""
    if not scorer.info.text_width or not scorer.info.text_std:
        remedy = "Leave it out; an image prompt still works."
        raise SettingError("text_prompt", scorer.info.model, "takes no text prompt at this service.", remedy)
    start = scorer.words(spec.tokens) if spec.init == "data" else torch.zeros(spec.tokens, scorer.info.text_width)
    return IntrinsicPrompt(start, spec, std=scorer.info.text_std)


def service_image_start(scorer: Scorer, images: Tensor, spec: PromptSpec) -> IntrinsicPrompt:
    """A prompt for :func:`stage_service`, at the mean patch of some images or at zero; see :func:`image_start`."""
    width = scorer.info.image_width
    if not width:
        remedy = "Leave it out; a text prompt still works."
        raise SettingError("image_prompt", scorer.info.model, "takes no image prompt at this service.", remedy)
    told = scorer.patches(scorer.keep(images))
    if not bool(torch.isfinite(told).all()):
        problem, remedy = "did not tell the patches of all images.", "Start again when the service answers."
        raise SettingError("image_prompt", scorer.info.model, problem, remedy)
    mean, square = told[:, :width].mean(0), told[:, width].mean()
    start = mean if spec.init == "data" else torch.zeros_like(mean)
    std = float((square - told[:, :width].mean().square()).sqrt())
    return IntrinsicPrompt(start.expand(spec.tokens, -1), spec, std=std, seed_offset=IMAGE_SEED)
