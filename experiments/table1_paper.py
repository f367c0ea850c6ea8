"""Table 1 of the paper as data: test accuracies in percent after fine-tuning a ViT."""

from __future__ import annotations

DATA_SETS = ("imagenet", "caltech101", "food101", "flowers102", "cifar10", "cifar100", "eurosat")
ROWS = {  # by the name of the method's file in configs/method
    "bp": "BP (upper bound)",
    "mezo": "Mezo (2 queries)",
    "mezo_nspsa": "Mezo (n-SPSA)",
    "deepzero_spsa": "DeepZero (n-SPSA)",
    "lr": "LR",
    "ops_spsa": "OPS-SPSA",
    "ops_lr": "OPS-LR",
}
PAPER: dict[str, dict[str, tuple[float, ...]]] = {  # by model and method: one figure a data set
    "vit_base": {
        "bp": (80.5, 92.2, 92.4, 93.5, 96.3, 90.7, 91.9),
        "mezo": (9.3, 42.6, 37.3, 38.2, 42.1, 37.5, 39.8),
        "mezo_nspsa": (54.8, 77.2, 76.7, 80.2, 84.4, 71.5, 78.4),
        "deepzero_spsa": (55.6, 78.4, 77.8, 78.4, 85.6, 70.2, 78.8),
        "lr": (57.3, 85.5, 87.6, 86.5, 87.7, 80.8, 82.9),
        "ops_spsa": (60.8, 87.3, 87.6, 85.6, 89.5, 82.2, 83.2),
        "ops_lr": (65.8, 88.9, 88.4, 91.6, 93.2, 88.7, 89.3),
    },
    "vit_large": {
        "bp": (81.7, 93.4, 93.3, 94.2, 98.2, 93.5, 93.4),
        "mezo": (10.7, 45.6, 38.8, 40.5, 45.9, 38.3, 41.7),
        "mezo_nspsa": (56.7, 78.8, 78.4, 78.5, 86.7, 74.3, 79.2),
        "deepzero_spsa": (56.4, 79.5, 78.9, 79.6, 86.3, 73.7, 80.1),
        "lr": (58.2, 87.2, 87.7, 86.8, 88.4, 81.4, 85.7),
        "ops_spsa": (62.2, 88.6, 88.1, 87.3, 91.3, 83.9, 87.6),
        "ops_lr": (67.6, 90.2, 89.5, 92.3, 95.5, 90.8, 90.1),
    },
}


def published(model: str, method: str, data_set: str) -> float | None:
    """The paper's figure; None where it has none."""
    row = PAPER.get(model, {}).get(method)
    return row[DATA_SETS.index(data_set)] if row and data_set in DATA_SETS else None
