"""Labels that a classifier can learn from; others are refused before they reach a device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from flops_lightning.datamodules.loading import KeyedBatches
from flops_lightning.errors import SettingError


def checked_labels(labels: Any, images: int, classes: int, *, look: bool) -> Tensor:
    """Labels ``(b,)`` as int64, or probabilities ``(b, c)``, of ``b`` images and ``c`` classes.

    Raises a :class:`SettingError` for other types and shapes, and for labels that no class has: always on a CPU, on an
    accelerator only with ``look``, since it makes the step wait.
    """
    if isinstance(labels, Tensor) and len(labels.shape) and len(labels) == images:
        if labels.dim() == 1 and not (labels.is_floating_point() or labels.is_complex()):
            if look or labels.device.type == "cpu":
                check_range(labels, classes)
            return labels.long()
        if labels.is_floating_point() and labels.shape[1:] == (classes,):
            return labels
    given = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    takes = f"a classifier of {classes} classes takes integers ({images},) or probabilities ({images}, {classes})"
    remedy = "Return such targets from the data set or collate_fn."
    raise SettingError("data", f"targets of {given}", f"for {images} images {takes}.", remedy)


def check_range(labels: Tensor, classes: int) -> None:
    """Raise a :class:`SettingError` unless all labels ``(n,)`` are from 0 to ``classes - 1``."""
    if not len(labels) or (int(labels.min()) >= 0 and int(labels.max()) < classes):
        return
    low, high = int(labels.min()), int(labels.max())
    remedy = "Give labels from 0 on, or a larger num_classes."
    if low > 0 and high == classes:
        remedy = "Subtract 1 if they begin with 1."
    raise SettingError(
        "data", f"labels from {low} to {high}", f"the model has {classes} classes, 0 to {classes - 1}.", remedy
    )


def check_known_labels(loader: Any, classes: int) -> None:
    """The same of all labels of a loader's data set, where it tells them without reading an image."""
    dataset = getattr(loader, "dataset", None)
    dataset = dataset.images if isinstance(dataset, KeyedBatches) else dataset
    known = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else None
    for name in ("labels", "targets"):
        known = getattr(dataset, name, None) if known is None else known
    try:
        labels = torch.as_tensor(known)
    except (TypeError, ValueError, RuntimeError):  # of any type, or none
        return
    if labels.dim() == 1 and not (labels.is_floating_point() or labels.is_complex()):
        check_range(labels, classes)
