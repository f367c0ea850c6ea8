"""Food101 from torchvision's folder layout."""

import json
from collections.abc import Mapping
from typing import Any

from flops_lightning.datamodules.files import Listing, Part
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource
from flops_lightning.errors import SettingError

CLASSES = 101


class Food101Source(ImageSource):
    """``root/food-101/images/<class>/*.jpg`` and the lists ``root/food-101/meta/train.json`` and ``test.json``."""

    def find_class_names(self, root: str) -> tuple[str, ...]:
        """The classes of the training list, in alphabetical order."""
        return tuple(sorted(self._list(root, "train")))

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """The images of the two lists."""
        found: dict[Part, Listing] = {}
        for part in ("train", "test"):
            listed = self._list(root, part)
            if unknown := sorted(listed.keys() - {*class_names}):
                problem = f"meta/{part}.json has the class {unknown[0]!r}, train.json has not."
                raise SettingError("data.root", root, problem, self.remedy(root))
            images = self.folder(root) / "images"
            found[part] = Listing.of(
                [(f"{images}/{name}.jpg", class_names.index(key)) for key in sorted(listed) for name in listed[key]]
            )
        return found

    def _list(self, root: str, part: str) -> dict[str, list[str]]:
        file = self.folder(root) / "meta" / f"{part}.json"
        try:
            content = json.loads(file.read_text())
            return {str(name): [str(image) for image in images] for name, images in content.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            problem = f"has no {file}" if isinstance(error, OSError) else f"has a damaged {file} ({error})"
            raise SettingError("data.root", root, f"{problem}.", self.remedy(root)) from error


class Food101DataModule(PhotoDataModule):
    """Food101: 101,000 photos of dishes in 101 classes, 750 of each for training and 250 for testing.

    ``download`` fetches it through torchvision (5 GB). The split is the standard one; ``val_images`` are split off the
    training part. The template is CLIP's only one for this data set.

    Source: L. Bossard et al., Food-101 - Mining Discriminative Components with Random Forests, 2014.

    Example:
        >>> data = Food101DataModule(download=True, val_images=1010)
        >>> data.num_classes
        101
    """

    source = Food101Source("Food101", "food-101", contents="images/ and meta/ of the data set")
    template = "a photo of {}, a type of food."

    def __init__(self, *, val_images: int = 5050, **settings: Any) -> None:
        """Check the settings (:class:`PhotoDataModule`) and that the folder is there."""
        super().__init__(
            val_images=val_images, test_images=0, val_share=0.0, test_share=0.0, split_file=None, **settings
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, also before the data set is fetched."""
        return len(self.class_names) if hasattr(self, "class_names") else CLASSES
