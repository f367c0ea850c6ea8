"""From normalised images to pixels and back."""

import pytest
import torch

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.robustness import PixelModel


def test_a_model_of_pixels_gives_the_logits_of_the_normalised_images(digits, make_task) -> None:
    digits.setup("test")
    task = make_task().eval()
    model = PixelModel(task, mean=digits.mean, std=digits.std)
    images, labels = next(iter(digits.test_dataloader()))
    pixels, same = next(iter(digits.test_dataloader(raw=True)))
    assert torch.equal(labels, same)
    assert torch.equal(model.pixels(images), pixels)
    # Grey values are sixteenths.
    assert float((pixels * 16 - (pixels * 16).round()).abs().max()) < 1e-5
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    assert torch.allclose(model(pixels), task(images), atol=1e-5)


def test_images_of_another_normalisation_are_refused() -> None:
    data = DigitsDataModule(batch_size=4)
    data.setup("test")
    model = PixelModel(torch.nn.Flatten(), mean=(0.5,), std=(0.5,))
    with pytest.raises(SettingError, match=r"pixels must lie in \[0, 1\]"):
        model.pixels(next(iter(data.test_dataloader()))[0] * 3)


def test_a_mean_and_a_standard_deviation_for_each_channel() -> None:
    for mean, std in (((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))):
        with pytest.raises(SettingError, match="does not fit the mean"):
            PixelModel(torch.nn.Flatten(), mean=mean, std=std)
