"""Where an image prompt of a task begins: at patches of training images, before anything else is computed."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flops_lightning.datamodules import ImageDataModule
from flops_lightning.errors import SettingError
from flops_lightning.prompts.stages import PromptedCLIP, image_start
from flops_lightning.service import service_image_start
from flops_lightning.tasks.clip_model import coloured
from flops_lightning.tasks.kept_features import some_images
from flops_lightning.tasks.prompt_settings import ImagePrompt
from flops_lightning.tasks.served import ServedClassifier

START_IMAGES = 64
"""Training images from whose patches an image prompt starts."""


class StartsAtImages(ServedClassifier):
    """A task whose image prompt, if it has one, begins with the first thing it is used for."""

    clip: PromptedCLIP
    image_settings: ImagePrompt | None

    def on_fit_start(self) -> None:
        """Start the image prompt."""
        self._start_image_prompt(fit=True)
        super().on_fit_start()

    def on_validation_start(self) -> None:
        """Let an image prompt that was never trained begin where training would."""
        super().on_validation_start()
        self._start_image_prompt()

    def on_test_start(self) -> None:
        """The same."""
        super().on_test_start()
        self._start_image_prompt()

    def on_predict_start(self) -> None:
        """The same."""
        self._start_image_prompt()

    @torch.no_grad()
    def start_image_prompt(self, images: Tensor) -> None:
        """Begin at the mean patch of images (or at zero), with a ``W`` as wide as their patches are.

        Training does this with images of its data module.
        """
        settings, prompt = self.image_settings, self.clip.image_prompt
        if prompt is None or settings is None:
            raise SettingError("image_prompt", None, "the task has no image prompt.", "Give the task one.")
        self.check_inputs(images)
        pixels = coloured(images.to(self.device))
        if self.scorer is not None:
            begun = service_image_start(self.scorer, pixels, settings.spec)
        else:
            begun = image_start(self.clip, pixels, settings.spec)
        prompt.start.copy_(begun.start)
        prompt.directions.copy_(begun.directions)

    def _start_image_prompt(self, *, fit: bool = False) -> None:
        prompt = self.clip.image_prompt
        if prompt is None or bool(prompt.z.any()) or bool(prompt.start.any()):
            return  # none, or it is on its way
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        images: Any = getattr(data, "train_set", None)
        if isinstance(data, ImageDataModule) and images is not None and len(images):
            self.start_image_prompt(some_images(images, START_IMAGES))
        elif fit:
            problem = "starts at patches of training images, but the data module is not one of this package."
            remedy = "Call task.start_image_prompt(images) with a few of them first."
            raise SettingError("image_prompt", asdict(self.image_settings or ImagePrompt()), problem, remedy)
