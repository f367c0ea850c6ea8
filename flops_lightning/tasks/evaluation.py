"""Metrics of classifiers and language models; torchmetrics combines them across processes."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


def mean_loss() -> MeanMetric:
    """A mean that keeps a NaN visible."""
    # By default it drops losses that are NaN. "disable" drops weights instead (torchmetrics#3434): update without any.
    return MeanMetric(nan_strategy="disable")


def metrics_of_validation(num_classes: int) -> MetricCollection:
    """``val/loss`` and ``val/accuracy``, see :func:`metrics_of_test`."""
    accuracy = MulticlassAccuracy(num_classes, average="micro")
    return MetricCollection({"loss": mean_loss(), "accuracy": accuracy}, prefix="val/", compute_groups=False)


def metrics_of_test(num_classes: int) -> MetricCollection:
    """``test/loss``, ``accuracy``, ``accuracy_top5``, ``accuracy_class_mean`` and ``calibration_error``.

    They are updated with logits ``preds`` ``(b, c)``, labels ``target`` ``(b,)`` and losses ``value`` ``(b,)``.
    ``accuracy_top5``: share whose label is among the five largest logits (of fewer classes: among all).
    """
    return MetricCollection(
        {
            "loss": mean_loss(),
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
            "accuracy_class_mean": ClassMeanAccuracy(num_classes),
            "calibration_error": CalibrationError(num_classes),
        },
        prefix="test/",
        compute_groups=False,  # Lightning computes and resets every metric by itself
    )


class ClassMeanAccuracy(Metric):
    """Mean accuracy of the classes that have images; NaN where none has.

    torchmetrics' ``macro`` counts a class without images as 0 once it is predicted.

    Of each class, this process counts its ``images`` and those it gets ``right``, ``(c,)`` int64.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for name in ("right", "images"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count images with logits ``(b, c)`` and labels ``(b,)``."""
        classes = len(self.images)
        self.images += torch.bincount(target, minlength=classes)
        self.right += torch.bincount(target[preds.argmax(dim=1) == target], minlength=classes)

    def compute(self) -> Tensor:
        """The mean, a number."""
        present = self.images > 0
        return (self.right[present] / self.images[present]).mean()


class Perplexity(Metric):
    """``exp`` of the mean negative log-likelihood of a token, over the tokens of all texts; NaN where a text's is.

    (A weighted ``MeanMetric`` either drops what is NaN or, with ``nan_strategy="disable"``, its weights.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add texts with negative log-likelihoods ``(b,)`` and numbers of tokens ``(b,)``."""
        self.nll += nll.sum()
        self.tokens += tokens.sum()

    def compute(self) -> Tensor:
        """The perplexity, a number."""
        return (self.nll / self.tokens).exp()


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits: mean over images of ``|accuracy - confidence|`` of their bin.

    The confidence is the probability of the predicted class; 15 bins of one width split 0 to 1. Source: Guo et al., On
    Calibration of Modern Neural Networks (ICML 2017), eq. 3.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, n_bins=15, norm="l1")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add images with logits ``(b, c)`` and labels ``(b,)``."""
        # torchmetrics takes logits between 0 and 1 for probabilities, and gives a confidence of exactly 1 a 16th bin.
        probability = preds.float().softmax(dim=1).clamp(max=1 - 2**-24)
        super().update(probability, target)


def first_seen(loaders: Any, batch_idx: int, size: int) -> int:
    """Number of images at the beginning of this process's batch that no process has had before.

    A ``DistributedSampler`` gives every process as many images, and to that end repeats the first ones at the end.
    ``loaders`` is the loader that the Trainer reads, or a list with it alone.
    """
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return size
    total = len(cast("Any", sampler.dataset))
    own = len(range(sampler.rank, total, sampler.num_replicas))
    return max(0, min(size, own - batch_idx * loader.batch_size))
