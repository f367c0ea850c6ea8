"""Images as pixels between 0 and 1, before normalisation: where noise and attacks are measured."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError

ROUNDING = 1e-6  # by which pixels may leave [0, 1] when they have been normalised and back


class PixelModel(nn.Module):
    """A network that reads pixels in [0, 1]: it normalises them itself.

    An attack on it is measured in pixels, whatever the normalisation of the data.

    Args:
        network: Maps normalised images ``(b, c, h, w)`` to logits ``(b, k)``.
        mean: Mean of each channel, subtracted from the pixels.
        std: Standard deviation of each channel, by which they are then divided; above 0.

    Example:
        >>> import torch
        >>> from flops_lightning.robustness import PixelModel
        >>> PixelModel(torch.nn.Flatten(), mean=(0.5,), std=(0.25,))(torch.ones(1, 1, 1, 2))
        tensor([[2., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Callable[[Tensor], Tensor], *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            remedy = "Give one mean and one standard deviation above 0 for each channel."
            raise SettingError("std", list(std), f"does not fit the mean {list(mean)}.", remedy)
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``(b, k)`` of pixels ``(b, c, h, w)``."""
        return self.network((pixels - self.mean) / self.std)

    def pixels(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] of normalised images ``(..., c, h, w)``, to a rounding of about 1e-7."""
        return denormalized(images, self.mean[0], self.std[0])


def denormalized(images: Tensor, mean: Any, std: Any) -> Tensor:
    """Pixels of normalised images ``(..., c, h, w)``; ``mean`` and ``std`` ``(c, 1, 1)``, or a number a channel.

    Images of other channels or of another normalisation leave [0, 1] and are refused.
    """
    mean, std = (
        torch.as_tensor(each, dtype=torch.float32, device=images.device).view(-1, 1, 1) for each in (mean, std)
    )
    pixels = images * std + mean
    check_pixels(pixels)
    return pixels.clamp(0, 1)


def check_pixels(pixels: Tensor) -> None:
    """Raise a :class:`SettingError` unless these are floats in [0, 1], up to rounding."""
    if not pixels.is_floating_point():
        remedy = "Divide 8-bit values by 255."
        raise SettingError("pixels", str(pixels.dtype), "pixels must be floats between 0 and 1.", remedy)
    if not pixels.numel():
        return
    low, high = (float(value) for value in pixels.aminmax())
    if not -ROUNDING <= low <= high <= 1 + ROUNDING:
        problem = "pixels must lie in [0, 1]; these look normalised."
        remedy = "Give images before normalisation (raw=True), and put the normalisation into a PixelModel."
        raise SettingError("pixels", f"{low:.3g} to {high:.3g}", problem, remedy)
