"""What a classifier predicts for every image, or what a language model writes of it, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from flops_lightning.callbacks.tables import class_names, write_table
from flops_lightning.distributed import gather_plain, present_communicator
from flops_lightning.errors import SettingError

FILE_NAME = "predictions.csv"
COLUMNS = ("index", "file", "label", "class", "probability")
OF_CAPTIONS = ("index", "file", "caption")

OWN_WRITER = "or put a prediction writer of your own into trainer.callbacks"
Row = tuple[int, int, float] | tuple[int, str]  # index, label, probability; or index, caption


class PredictionWriter(BasePredictionWriter):
    """Write ``predictions.csv`` into the run's folder, one line per image in the order of the data set.

    Columns: ``index`` of the image in the data set (of an iterable one: its position in the stream); ``file``, its path
    from the data set's ``files``, a sequence of str in the order of the set (empty without one); the predicted
    ``label``; its ``class`` from the data module's ``class_names`` (without these, the label again); and the
    ``probability`` of that class. Several processes write one file together; a trial run (``fast_dev_run``) none.

    The module's ``predict_step`` returns a mapping with ``label`` ``(b,)``, integers, and ``probability`` ``(b, c)``.
    If it has ``caption`` instead, a list of ``b`` texts, the columns are ``index``, ``file`` and ``caption``.

    Example:
        >>> import tempfile
        >>> import lightning.pytorch as pl
        >>> from flops_lightning.callbacks import PredictionWriter
        >>> class Given(pl.LightningModule):
        ...     def predict_step(self, batch):
        ...         return {"label": batch.argmax(dim=1), "probability": batch}
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        >>> folder = tempfile.mkdtemp()
        >>> trainer = pl.Trainer(callbacks=[PredictionWriter()], default_root_dir=folder, **quiet)
        >>> _ = trainer.predict(Given(), torch.utils.data.DataLoader(torch.tensor([[0.75, 0.25]])))
        >>> open(f"{folder}/predictions.csv").read().split()
        ['index,file,label,class,probability', '0,,0,0,0.75']
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._rows: list[Row] = []
        self._classes = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty table; refuse several loaders, as an index would not identify an image."""
        loaders = len(trainer.num_predict_batches)
        if loaders > 1:
            problem = "PredictionWriter writes the images of a single loader."
            raise SettingError("predict_dataloader", f"{loaders} loaders", problem, f"Return one loader, {OWN_WRITER}.")
        self._rows, self._classes = [], 0

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Sequence[int] | None, *_: Any, **__: Any
    ) -> None:
        """Add the batch to the table; refuse what is neither captions nor labels and probabilities."""
        first = len(self._rows)
        captions = _captions(prediction)
        if captions is not None:
            self._rows.extend(zip(batch_indices or range(first, first + len(captions)), captions, strict=True))
            return
        label, probability = _checked(prediction)
        indices = batch_indices or range(first, first + len(label))
        predicted = probability.gather(1, label[:, None])[:, 0]
        self._rows.extend(zip(indices, label.tolist(), predicted.tolist(), strict=True))
        self._classes = probability.shape[1]

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and say where it is."""
        files = _files(trainer)
        shares = gather_plain(present_communicator(), self._rows, device=pl_module.device)
        rows: list[Any] = sorted(row for share in shares for row in share)
        columns: tuple[str, ...] = OF_CAPTIONS
        table: list[tuple[Any, ...]] = [(row[0], files[row[0]] if files else "", *row[1:]) for row in rows]
        if rows and len(rows[0]) == len(COLUMNS) - 2:
            columns, names = COLUMNS, class_names(trainer, self._classes)
            # Nine digits are what it takes to read a float32 back as it was.
            table = [(*start, label, names[label], f"{share:.9g}") for *start, label, share in table]
        write_table(trainer, FILE_NAME, columns, table, content=f"predictions of {len(rows)} samples")


def _captions(prediction: Any) -> list[str] | None:
    """The captions that ``predict_step`` returned, if it did."""
    found = prediction.get("caption") if isinstance(prediction, Mapping) else None
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else None


def _checked(prediction: Any) -> tuple[Tensor, Tensor]:
    """Labels ``(b,)`` and probabilities ``(b, c)`` of what ``predict_step`` returned."""
    parts = prediction if isinstance(prediction, Mapping) else {}
    label, probability = parts.get("label"), parts.get("probability")
    if isinstance(label, Tensor) and isinstance(probability, Tensor):
        integer = not (label.is_floating_point() or label.is_complex() or label.dtype == torch.bool)
        if integer and label.dim() == 1 and probability.dim() == 2 and len(label) == len(probability):
            return label.long(), probability
    given = {name: _describe(value) for name, value in parts.items()} or _describe(prediction)
    remedy = f'Return {{"label": (b,) integers, "probability": (b, c)}}, {OWN_WRITER}.'
    raise SettingError("predict_step", given, "PredictionWriter writes labels and probabilities, or captions.", remedy)


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _files(trainer: Trainer) -> Sequence[str]:
    """Paths of the images of the data set that is read, if it has them."""
    loaders = trainer.predict_dataloaders
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    return getattr(getattr(loader, "dataset", None), "files", None) or ()
