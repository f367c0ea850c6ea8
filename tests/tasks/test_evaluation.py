import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from flops_lightning.callbacks import RunSummary
from flops_lightning.tasks.evaluation import ClassMeanAccuracy, first_seen, metrics_of_test

MISSING = 3
FLOAT32 = {"rel": 1e-5, "abs": 1e-6}  # sums of a few hundred float32


def some_logits(images: int = 200, classes: int = 8, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often than by chance, and labels among which one class is missing."""
    generator = torch.Generator().manual_seed(images + classes)
    labels = torch.randint(classes - 1, (images,), generator=generator)
    labels[labels >= MISSING] += 1
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 0.8
    return scale * logits, labels


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Guo et al. (2017), eq. 3, image by image; the last bin holds the confidence 1."""
    probability: NDArray[np.float64] = logits.double().softmax(1).numpy()
    inside: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probability, labels.tolist(), strict=True):
        predicted = int(row.argmax())
        inside[min(bins - 1, int(row[predicted] * bins))].append((float(row[predicted]), predicted == label))
    gaps = [abs(sum(c for c, _ in one) - sum(right for _, right in one)) for one in inside]
    return sum(gaps) / len(labels)


def reference(logits: Tensor, labels: Tensor) -> dict[str, float]:
    predicted = logits.argmax(1)
    classes = logits.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn: a class was predicted that no label has
        mean = balanced_accuracy_score(labels, predicted)
    return {
        "test/loss": log_loss(labels, logits.double().softmax(1).numpy(), labels=range(classes)),
        "test/accuracy": accuracy_score(labels, predicted),
        "test/accuracy_top5": 1.0
        if classes <= 5
        else top_k_accuracy_score(labels, logits.double().numpy(), k=5, labels=range(classes)),
        "test/accuracy_class_mean": mean,
        "test/calibration_error": calibration_error(logits, labels),
    }


def in_batches(logits: Tensor, labels: Tensor, size: int = 32) -> dict[str, float]:
    metrics = metrics_of_test(logits.shape[1])
    losses = cross_entropy(logits, labels, reduction="none")
    for one, two, three in zip(logits.split(size), labels.split(size), losses.split(size), strict=True):
        metrics.update(preds=one, target=two, value=three)
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("classes", [4, 5, 8, 30])
def test_each_equals_its_reference(classes):
    logits, labels = some_logits(classes=classes)
    assert in_batches(logits, labels) == pytest.approx(reference(logits, labels), **FLOAT32)


def test_a_class_without_images_does_not_count_as_wrong():
    logits, labels = some_logits()
    assert int((logits.argmax(1) == MISSING).sum()) > 0
    of_classes = [float((logits[labels == k].argmax(1) == k).float().mean()) for k in range(8) if k != MISSING]
    found = in_batches(logits, labels)["test/accuracy_class_mean"]
    assert found == pytest.approx(np.mean(of_classes), **FLOAT32)
    macro = multiclass_accuracy(logits, labels, num_classes=8, average="macro")
    assert found == pytest.approx(float(macro) * 8 / 7, **FLOAT32)


def test_the_mean_over_no_class_is_not_a_number():
    metric = ClassMeanAccuracy(3)
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert math.isnan(metric.compute())


def test_a_loss_that_is_no_number_shows():
    logits, labels = some_logits()
    logits[7] = math.nan
    assert math.isnan(in_batches(logits, labels)["test/loss"])


def test_logits_between_0_and_1_are_not_taken_for_probabilities():
    logits, labels = some_logits()
    logits = logits.sigmoid()
    assert in_batches(logits, labels) == pytest.approx(reference(logits, labels), **FLOAT32)


def test_the_five_largest_are_told_apart_where_probabilities_underflow():
    logits = torch.tensor([[1000.0, 7, 6, 5, 4, 3, 2, 1]]).repeat(8, 1)
    assert logits.softmax(1).count_nonzero() == 8
    assert in_batches(logits, torch.arange(8))["test/accuracy_top5"] == 5 / 8


def test_certainty_falls_into_the_last_bin():
    # Two images with confidence 1, one of them wrong, and two just below it that are right: one bin, off by 1/4.
    logits = torch.tensor([[100.0, 0], [100, 0], [5, 0], [5, 0]])
    labels = torch.tensor([0, 1, 0, 0])
    assert float(logits[0].softmax(0)[0]) == 1
    assert float(logits[2].softmax(0)[0]) > 14 / 15
    confidence = (2 + 2 / (1 + math.exp(-5))) / 4
    assert in_batches(logits, labels)["test/calibration_error"] == pytest.approx(confidence - 3 / 4, **FLOAT32)


@given(images=st.integers(1, 40), processes=st.integers(1, 5), batch_size=st.integers(1, 9), shuffle=st.booleans())
def test_every_image_counts_once_whatever_the_processes(images, processes, batch_size, shuffle):
    data = TensorDataset(torch.arange(images))
    counted = []
    for rank in range(processes):
        sampler: DistributedSampler[Any] = DistributedSampler(data, processes, rank, shuffle=shuffle)
        loader = DataLoader(data, batch_size=batch_size, sampler=sampler)
        for i, (batch,) in enumerate(loader):
            counted += batch[: first_seen([loader], i, len(batch))].tolist()
    assert sorted(counted) == list(range(images))


def test_a_test_logs_them_and_a_second_one_the_same_whatever_was_tested_before(
    make_task, make_trainer, digits, tmp_path, monkeypatch
):
    task, trainer = make_task(), make_trainer(RunSummary(export_weights=False))
    trainer.fit(task, digits)
    assert task.test_metrics["accuracy"].update_count == 0  # the tests of the summary count for themselves
    with monkeypatch.context() as broken:
        broken.setattr(task, "on_test_batch_end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_trainer().test(task, digits, verbose=False)
    (first,), (second,) = (trainer.test(task, digits, verbose=False) for _ in range(2))
    assert second == first
    with torch.no_grad():
        pairs = [(task.eval()(images), labels) for images, labels in digits.test_dataloader()]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert first == pytest.approx(reference(logits, labels), **FLOAT32)
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] == pytest.approx(first["test/accuracy"])
