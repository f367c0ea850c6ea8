"""What every image data module shares: checked loader settings, statistics, and the loaders."""

from collections.abc import Sequence, Sized
from typing import ClassVar, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flops_lightning.datamodules.augmentation import RandAugmentSettings, mixing
from flops_lightning.datamodules.class_names import PHOTO, in_words
from flops_lightning.datamodules.loading import KeyedLoaders, Mixing
from flops_lightning.errors import SettingError, check_at_least
from flops_lightning.robustness.pixels import denormalized

ImageDataset = Dataset[tuple[Tensor, ...]]  # an item is (image, label); the type is that of torch's TensorDataset


class ImageDataModule(KeyedLoaders):
    """Loaders over three labelled sets of images that a subclass sets in ``setup``.

    A batch is ``(images (b, in_chans, image_size, image_size) float32, labels (b,) int64)``, and the last, smaller
    batch is kept. With ``mixup_alpha`` or ``cutmix_alpha`` above 0 the labels of training batches are probabilities
    ``(b, num_classes)`` float32.

    Training batch ``i`` of an epoch is a function of the seed given to ``seed_everything`` (0 without one), the epoch
    and ``i`` alone, augmentation included, so a run resumed at any step sees what the uninterrupted run saw, whatever
    its number of workers. Several processes share the images of each batch (:class:`GlobalBatches`); only MixUp and
    CutMix differ then from one process, since each process mixes its own share.

    Attributes:
        class_names: One name per class, in the order of the labels.
        template: A caption with ``{}`` where a name of :attr:`display_names` stands, as CoOp and CLIP use it.
        in_chans: Channels of an image.
        image_size: Height and width of an image, in pixels.
        mean: Mean per channel, subtracted from values between 0 and 1.
        std: Standard deviation per channel, by which they are divided.
        train_set: Labelled images to train on.
        val_set: Labelled images to validate with.
        test_set: Labelled images to test with; ``predict`` reads them too.

    Args:
        batch_size: Images per batch, all processes together; 0: all training images in every batch.
        num_workers: Processes that load beside each training process; 0 loads inside it.
        rand_augment: RandAugment of 8-bit training images, after the other augmentation; None for none.
        mixup_alpha: MixUp of training batches, with shares from ``Beta(alpha, alpha)``, for example 0.2; 0 for none.
            Labels become probabilities.
        cutmix_alpha: The same for CutMix, for example 1.0. Where both are on, each batch draws one of the two.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> class Noise(ImageDataModule):
        ...     class_names, in_chans, image_size, mean, std = ("a", "b"), 1, 4, (0.0,), (1.0,)
        ...
        ...     def setup(self, stage):
        ...         images = TensorDataset(torch.randn(10, 1, 4, 4), torch.arange(10) % 2)
        ...         self.train_set = self.val_set = self.test_set = images
        >>> data = Noise(batch_size=4)
        >>> data.setup("fit")
        >>> [tuple(images.shape) for images, labels in data.train_dataloader()]
        [(4, 1, 4, 4), (4, 1, 4, 4), (2, 1, 4, 4)]
    """

    in_chans: ClassVar[int]
    template: str = PHOTO

    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    train_set: ImageDataset
    val_set: ImageDataset
    test_set: ImageDataset

    def __init__(
        self, *, batch_size: int = 64, num_workers: int = 0, rand_augment: RandAugmentSettings | None = None,
        mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0,
    ) -> None:  # fmt: skip
        """Check the settings that all data modules share."""
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if rand_augment is not None:
            if not isinstance(rand_augment, RandAugmentSettings):
                remedy = "Write, for example, RandAugmentSettings(num_ops=2, magnitude=9)."
                raise SettingError("data.rand_augment", rand_augment, "is not a RandAugmentSettings.", remedy)
            rand_augment.check()
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            check_at_least(f"data.{name}", alpha, 0, "Use for example 0.2 or 1.0, or 0 for none.")
        self.rand_augment = rand_augment
        self.mixup_alpha, self.cutmix_alpha = float(mixup_alpha), float(cutmix_alpha)  # torch draws with no integers

    @property
    def num_classes(self) -> int:
        """Number of classes; labels run from 0 to one less."""
        return len(self.class_names)

    @property
    def display_names(self) -> tuple[str, ...]:
        """The classes as a caption would name them, for models that read the names."""
        return in_words(self.class_names)

    @property
    def templates(self) -> tuple[str, ...]:
        """Captions whose features are averaged, as in CLIP's ensembles; :attr:`template` alone where there are none."""
        return (self.template,)

    @property
    def mixing(self) -> Mixing | None:
        """MixUp and CutMix of training batches."""
        return mixing(self.mixup_alpha, self.cutmix_alpha, self.num_classes)

    def test_dataloader(self, *, raw: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        """Test batches, in a fixed order; ``raw``: of pixels in [0, 1], before normalisation (to about 1e-7)."""
        return self._loader(RawImages(self.test_set, self.mean, self.std) if raw else self.test_set)


class RawImages(Dataset[tuple[Tensor, ...]]):
    """The images of a normalised data set as pixels in [0, 1]."""

    def __init__(self, images: ImageDataset, mean: Sequence[float], std: Sequence[float]) -> None:
        """``mean`` and ``std``: those that the images were normalised with, one a channel."""
        self._images, self._mean, self._std = images, mean, std

    def __len__(self) -> int:
        return len(cast("Sized", self._images))

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, *rest = self._images[index]
        return denormalized(image, self._mean, self._std), *rest
