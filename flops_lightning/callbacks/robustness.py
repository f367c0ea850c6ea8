"""Accuracy under noise and under attack, at the end of a test."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import IterableDataset

from flops_lightning.callbacks.tables import run_folder, write_table
from flops_lightning.distributed import gather_plain, present_communicator
from flops_lightning.errors import SettingError, check_choice, check_whole
from flops_lightning.robustness.attacks import ATTACKS, AttackSettings, loss_slope
from flops_lightning.robustness.corruptions import CORRUPTIONS, Corruption
from flops_lightning.robustness.pixels import PixelModel
from flops_lightning.settings import read_settings
from flops_lightning.tasks.evaluation import first_seen

TABLE_NAME, FILE_NAME = "robustness.csv", "robustness.json"
COLUMNS = ("image", "corruption", "severity", "label", "prediction")
CLEAN = "clean"
Perturbation = Corruption | AttackSettings


class Robustness(Callback):
    """Test a classifier under noise and attacks, and write ``robustness.csv`` and ``robustness.json``.

    Every test image is classified unchanged (``clean``) and once for each strength of each noise and attack, in pixel
    space: the data module's ``mean`` and ``std`` become part of the network. Logged, and written to
    ``robustness.json``, are ``robust/<name>/accuracy`` and ``robust/<name>/kept``, the share of the images classified
    correctly without noise that still are (NaN if there are none), with names like ``gaussian_0.08``, ``poisson_25``
    and ``mi_fgsm_8`` (eps in 255ths). ``robustness.csv`` has a line for each image and strength: ``image``, its index
    in the data set, ``corruption``, ``severity`` (std, photons or eps), ``label`` and ``prediction``.

    The noise depends only on the seed and the image's index, and the network runs on chunks with a fixed number of
    rows, the last one padded. On one kind of machine the results are therefore bit for bit the same for any batch size,
    order and number of processes. Attacks backpropagate the cross-entropy through the network, however it was trained.

    The module's ``forward`` returns logits ``(b, k)`` for images; its batches are ``(images, labels)``.

    Args:
        corruptions: Strengths of each noise: ``gaussian`` and ``uniform`` by ``std``, ``poisson`` by ``photons``; None:
            the severities of ImageNet-C, as ``{"gaussian": [0.08, 0.12, 0.18, 0.26, 0.38], ...}``; {} for none.
        attacks: The attacks; None: the paper's three at 8/255; [] for none.
        seed: Chooses the noise.
        rows: Images per forward pass. Batches are padded to a multiple of this, so make ``data.batch_size`` one.

    Example:
        >>> from flops_lightning.callbacks import Robustness
        >>> from flops_lightning.robustness import AttackSettings
        >>> Robustness(corruptions={"poisson": [60]}, attacks=[AttackSettings("fgsm", eps=2 / 255)]).names
        ['clean', 'poisson_60', 'fgsm_2']
    """

    def __init__(
        self, *, corruptions: dict[str, list[float]] | None = None, attacks: list[AttackSettings] | None = None,
        seed: int = 0, rows: int = 32,
    ) -> None:  # fmt: skip
        check_whole("seed", seed, 0, "Write for example 0.")
        check_whole("rows", rows, 1, "Write for example 32.")
        if corruptions is None:
            corruptions = {name: list(kind.severities[-5:]) for name, kind in CORRUPTIONS.items()}
        if attacks is None:
            attacks = [AttackSettings(name) for name in ATTACKS]
        self._seed, self._rows_at_once = seed, rows
        self._perturbations: dict[tuple[str, float], Perturbation] = {}
        for name, levels in corruptions.items():
            check_choice("corruptions", name, list(CORRUPTIONS))
            for i, level in enumerate(levels):
                setting = f"corruptions.{name}[{i}]"
                with _entry(setting, is_one_number=True):
                    noise = CORRUPTIONS[name](level)
                self._add(setting, name, level, noise)
        for i, given in enumerate(attacks):
            with _entry(f"attacks[{i}]"):
                attack = read_settings(AttackSettings, given, f"attacks[{i}]")
            self._add(f"attacks[{i}]", attack.name, attack.eps, attack)
        if not self._perturbations:
            raise SettingError("corruptions", corruptions, "there is neither noise nor attack.", "Give one of them.")
        self._attacked = bool(attacks)

    def _add(self, setting: str, name: str, severity: float, perturbation: Perturbation) -> None:
        if _name(name, severity) in self.names:
            problem = "is there twice, but results are told apart by name and strength."
            raise SettingError(setting, _name(name, severity), problem, "Remove one of the two.")
        self._perturbations[name, severity] = perturbation

    def _perturbed(
        self, change: Perturbation, pixels: Tensor, labels: Tensor, index: Sequence[int], slope: Tensor | None
    ) -> Tensor:
        """Images ``(b, c, h, w)`` under one noise or attack; ``slope``: derivative of their loss."""
        if isinstance(change, AttackSettings):
            return change.run(self._model, pixels, labels, slope=slope)
        return change(pixels, index, seed=self._seed)

    @property
    def names(self) -> list[str]:
        """Names of the results, ``clean`` first."""
        return [CLEAN, *(_name(*key) for key in self._perturbations)]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module or data that cannot be tested like this, before an image is read."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        if mean is None or std is None:
            remedy = "Give it the attributes `mean` and `std`, one number a channel (0 and 1 where nothing is done)."
            problem = "does not say how it normalises images."
            raise SettingError("data", type(data).__name__, problem, remedy)
        narrow = {str(p.dtype) for p in pl_module.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
        if narrow and self._attacked:
            problem = f"the weights are {' and '.join(sorted(narrow))}; attacks need the gradient in float32."
            raise SettingError("trainer.precision", trainer.precision, problem, "Write 32-true.")
        loss: Any = getattr(pl_module, "loss_path", "")
        if self._attacked and loss:
            rank_zero_info(f"attacks use the derivative of cross-entropy, not of the run's loss, {loss}.")
        with torch.inference_mode(False):  # an attack needs gradients
            # The bound method, or the module would become a part of the model.
            self._model = PixelModel(pl_module.__call__, mean=mean, std=std).to(pl_module.device)
        self._order = _order(trainer.test_dataloaders)
        self._read: list[list[int]] = []  # index, label, predictions in the order of the names
        self._place = 0

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Read the images of the batch that no other process has, under all noise and attacks."""
        images, labels = batch[0], batch[1]
        own, index = first_seen(trainer.test_dataloaders, batch_idx, len(images)), self._order[self._place :]
        self._place += len(images)
        with torch.inference_mode(False):
            for start in range(0, own, self._rows_at_once):
                part = slice(start, min(start + self._rows_at_once, own))
                # A clone is not of inference mode.
                try:
                    predictions = self._predictions(images[part].clone(), labels[part].clone(), index[part])
                except RuntimeError as error:
                    if "Inference tensors" not in str(error):
                        raise
                    problem = "the network keeps tensors of its first pass, and attacks need their derivative."
                    raise SettingError("trainer.inference_mode", True, problem, "Write false.") from error
                lines = torch.stack([labels[part].long(), *predictions], dim=1).tolist()
                self._read += [[i, *line] for i, line in zip(index[part], lines, strict=True)]

    def _predictions(self, images: Tensor, labels: Tensor, index: Sequence[int]) -> list[Tensor]:
        """Predicted classes ``(n,)`` of ``n`` images, clean and perturbed, from chunks of ``rows``."""
        n = len(images)
        filled = [min(i, n - 1) for i in range(self._rows_at_once)]
        pixels, labels, index = self._model.pixels(images[filled]), labels[filled].long(), [index[i] for i in filled]
        slope = loss_slope(self._model, pixels, labels) if self._attacked else None  # where every attack begins
        changes = self._perturbations.values()
        found = [pixels, *(self._perturbed(change, pixels, labels, index, slope) for change in changes)]
        with torch.no_grad():
            return [self._model(each).argmax(dim=1)[:n] for each in found]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies, write both files and say where they are."""
        shares = gather_plain(present_communicator(), self._read, device=pl_module.device)
        read = sorted(line for share in shares for line in share)
        keys = [(CLEAN, ""), *((name, f"{severity:.6g}") for name, severity in self._perturbations)]
        rows = ((i, *key, label, p) for i, label, *found in read for key, p in zip(keys, found, strict=True))
        write_table(trainer, TABLE_NAME, COLUMNS, rows, content=f"predictions of {len(read)} images under noise")
        results = dict(zip(self.names, _results(torch.tensor(read)), strict=True)) if read else {}
        for name, result in results.items():
            for measure, value in result.items():
                pl_module.log(f"robust/{name}/{measure}", value)
        folder = run_folder(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            written = {"images": len(read), "seed": self._seed, "results": results}
            (folder / FILE_NAME).write_text(json.dumps(written, indent=2) + "\n")


@contextmanager
def _entry(setting: str, *, is_one_number: bool = False) -> Iterator[None]:
    """Let a refusal name the entry of the list that it is about."""
    try:
        yield
    except SettingError as error:
        if error.setting == setting:
            raise
        name = setting if is_one_number else f"{setting}.{error.setting}"
        raise SettingError(name, error.value, error.problem, error.remedy) from error


def _name(name: str, severity: float) -> str:
    return f"{name}_{255 * severity:.3g}" if name in ATTACKS else f"{name}_{severity:g}"


def _results(read: Tensor) -> list[Mapping[str, float]]:
    """Accuracy and share kept of each perturbation, from lines ``(n, 2 + perturbations)``."""
    right = read[:, 2:] == read[:, 1:2]
    kept = right[right[:, 0]].double().mean(dim=0)  # NaN where nothing is right
    return [{"accuracy": float(a), "kept": float(k)} for a, k in zip(right.double().mean(dim=0), kept, strict=True)]


def _order(loaders: Any) -> list[int]:
    """Indices of the images that this process reads, in order."""
    if isinstance(loaders, (list, tuple)) and len(loaders) > 1:
        problem = "are several loaders, but robustness is tested on one."
        raise SettingError("test_dataloader", len(loaders), problem, "Return a single DataLoader.")
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    batches = getattr(loader, "batch_sampler", None)
    known = batches is not None and not isinstance(loader.dataset, IterableDataset)
    orders = [[i for batch in batches for i in batch] for _ in range(2)] if known and batches is not None else [[], [0]]
    if orders[0] != orders[1] or not all(isinstance(i, int) for i in orders[0]):
        problem = "does not keep the order of the images, by which noise is drawn."
        raise SettingError("test_dataloader", type(loader).__name__, problem, "Return a DataLoader without shuffling.")
    return orders[0]
