"""LightningModules that learn from forward passes."""

from flops_lightning.language.targets import LanguageTarget
from flops_lightning.optim.optimizers import ClipSettings, OptimizerSettings
from flops_lightning.tasks.alignment import AdapterAlignment
from flops_lightning.tasks.causal_lm import ForwardCausalLM
from flops_lightning.tasks.clip_prompts import ClipPromptTuner
from flops_lightning.tasks.forward_module import ForwardModule
from flops_lightning.tasks.image_classification import ForwardImageClassifier
from flops_lightning.tasks.parameter_efficient import TargetSettings
from flops_lightning.tasks.prompt_settings import ImagePrompt, TextPrompt
from flops_lightning.tasks.spending import SpendSettings

__all__ = [
    "AdapterAlignment", "ClipPromptTuner", "ClipSettings", "ForwardCausalLM", "ForwardImageClassifier",
    "ForwardModule", "ImagePrompt", "LanguageTarget", "OptimizerSettings", "SpendSettings", "TargetSettings",
    "TextPrompt",
]  # fmt: skip
