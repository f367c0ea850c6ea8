"""Handwritten digits that come with scikit-learn: real data, nothing to download, seconds per epoch."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from flops_lightning.datamodules.base import ImageDataModule
from flops_lightning.datamodules.splits import check_split_seed
from flops_lightning.errors import SettingError

# Share of the 1797 images: 1257 to train, 180 to validate, 360 to test.
TEST_IMAGES = 360
VAL_IMAGES = 180


class DigitsDataModule(ImageDataModule):
    """The 1797 handwritten digits of scikit-learn's ``load_digits`` as images ``(1, 8, 8)`` in 10 classes.

    Grey values 0 to 16 become 0 to 1 and are then normalised with the mean and standard deviation over all pixels of
    all upright images, whatever the rotation, so that a network trained on upright digits sees rotated ones on the same
    scale. The split into 1257, 180 and 360 images is stratified by class.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test part, which is what scikit-learn ships).

    Args:
        rotation: Degrees by which every image is rotated counter-clockwise, on background. Rotation by 40 degrees makes
            the digits no harder to learn: a support vector machine trained and tested on them reaches 99.2 %, as on
            upright ones.
        split_seed: Seed of the split; independent of the seed of the run, so that runs with different seeds are tested
            on the same images. Not negative.

    Example:
        >>> data = DigitsDataModule(batch_size=100, rotation=40)
        >>> data.setup("fit")
        >>> len(data.train_set), len(data.val_set), len(data.test_set)
        (1257, 180, 360)
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> tuple(images.shape), labels[:5].tolist()
        ((100, 1, 8, 8), [7, 4, 7, 6, 0])
    """

    class_names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    display_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    template = 'a photo of the number: "{}".'
    in_chans = 1
    image_size = 8
    # Over the pixels of all 1797 upright images, scaled to 0..1.
    mean = (0.3053,)
    std = (0.3760,)

    def __init__(self, *, batch_size: int = 64, rotation: float = 0.0, split_seed: int = 0, **loading: Any) -> None:
        """Check the settings; images are read in ``setup``."""
        super().__init__(batch_size=batch_size, rand_augment=None, **loading)
        if not math.isfinite(rotation):
            raise SettingError("data.rotation", rotation, "is not an angle.", "Give degrees, for example 40.")
        check_split_seed(split_seed)
        self.rotation, self.split_seed = rotation, split_seed

    def setup(self, stage: str) -> None:
        """Read, turn, normalise and split the images; the same for every stage, and a matter of milliseconds."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        images = (turn(images, self.rotation) - torch.tensor(self.mean)) / torch.tensor(self.std)

        indices = range(len(labels))
        rest, test = train_test_split(indices, test_size=TEST_IMAGES, stratify=labels, random_state=self.split_seed)
        train, val = train_test_split(rest, test_size=VAL_IMAGES, stratify=labels[rest], random_state=self.split_seed)
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[part], labels[part]) for part in (train, val, test)
        )


def turn(images: Tensor, degrees: float) -> Tensor:
    """Turn ``images (b, c, h, w)`` counter-clockwise about their centre, bilinearly, on a background of 0."""
    if degrees == 0:
        return images
    from torchvision.transforms.v2 import InterpolationMode, functional

    return functional.rotate(images, degrees, interpolation=InterpolationMode.BILINEAR, fill=0.0)
