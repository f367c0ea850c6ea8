from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import allocator_in_your_module as example
from flops_lightning.allocators.threads import one_thread


def test_foreign_module_learns_with_allocated_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seen: list[Tensor] = []
    take = example.TinyClassifier.set_query_counts

    def record(self: example.TinyClassifier, counts: Tensor) -> None:
        seen.append(counts)
        take(self, counts)

    monkeypatch.setattr(example.TinyClassifier, "set_query_counts", record)
    with one_thread():
        result = example.main(epochs=3)

    counts = torch.cat(seen)
    assert counts.shape == (3 * 30, 50)
    assert counts.sum(dim=1).unique().tolist() == [20 * 50]
    assert counts.min() >= 1
    # Untrained, the samples are alike; the more of them are learned, the more the others get.
    assert all(len(row.unique()) > 5 for row in counts[-30:])
    # Over seeds 0 to 4 the accuracy after three epochs was 0.90 to 0.92.
    assert result["start_accuracy"] < 0.2
    assert result["test_accuracy"] > 0.8


def test_lines_to_add_are_few() -> None:
    lines = Path(example.__file__).read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if "from here" in line)
    last = next(i for i, line in enumerate(lines) if "to here" in line)
    assert 0 < sum(bool(line.strip()) for line in lines[first + 1 : last]) <= 15
