"""Every method, left in the middle of an epoch by an exception and gone on with, ends with the same bits."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.cli.command import build
from tests.digits import QUIET, TINY

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = [*sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml")), "../allocators/few_queries"]
QUICK = ("ops_lr", "mezo", "zo_muon", "../allocators/few_queries")
FAILS_AT = 3

SMALL = {
    "trainer": {
        **QUIET, "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0, "log_every_n_steps": 1,
    },
    "model": {
        "init_args": {
            "model_kwargs": {**TINY, "depth": 2},
            "checkpoint": "",
            "strategy": {
                "init_args": {
                    "sites": [
                        {"name": "lower", "stages": ["embed", "blocks.0"], "sigma": 0.03, "queries_per_sample": 4},
                        {"name": "upper", "stages": ["blocks.1", "head"], "sigma": 0.03, "queries_per_sample": 4},
                    ],
                    "pilots": {"sites": "upper", "queries": 0},
                }
            },
        }
    },
    "data": {"init_args": {"batch_size": 8}},
}  # fmt: skip


class Fails(pl.Callback):
    """Raises at the beginning of a step, after batch, statistics and noise have been drawn for it."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == FAILS_AT + 1:
            raise RuntimeError("stopped here")


def trained(
    folder: Path, method: str, *callbacks: pl.Callback, ckpt_path: Path | None = None, **settings: str
) -> Tensor:
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    files = [CONFIGS / "vit_tiny_digits.yaml", folder / "small.yaml", CONFIGS / "method" / f"{method}.yaml"]
    options = [f"--config={file}" for file in files] + [f"--{name}={value}" for name, value in settings.items()]
    command = build([*options, f"--trainer.default_root_dir={folder}"])
    allocators = [c for c in command.trainer.callbacks if isinstance(c, QueryAllocatorCallback)]
    command.trainer.callbacks = [*allocators, *callbacks]
    command.trainer.fit(command.model, command.datamodule, ckpt_path=ckpt_path)
    return torch.cat([p.detach().flatten() for p in command.model.parameters()])


OWN = {
    # Quick versions of what would take long: ZO-GraSP's directions, and 80 coordinates or queries a step.
    "deepzero_cge": {"strategy.init_args.coordinates": "6", "strategy.init_args.grasp_queries": "4"},
    "mezo_nspsa": {"strategy.init_args.queries": "4"},
    # Subspaces that change before and after the stop, and momentum from several of them.
    "zo_muon": {
        "strategy.init_args.rank": "3", "strategy.init_args.refresh": "3", "optimizer.momentum": "0.9",
    },
    "lr_muon": {"optimizer.momentum": "0.9"},
    "../allocators/few_queries": {"spend.queries": "2000"},  # its schedule follows what is spent
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*sigma = .* has no effect", "ignore:.*is below what the precision resolves")
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]
)
def test_it_goes_on_in_mid_epoch_as_if_it_had_not_stopped(tmp_path, method):
    own = {f"model.init_args.{name}": value for name, value in OWN.get(method, {}).items()}
    whole = trained(tmp_path, method, **own)
    saver = ModelCheckpoint(tmp_path / "saved", filename="only", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(RuntimeError, match="stopped here"):
        trained(tmp_path, method, Fails(), saver, **own)
    resumed = trained(tmp_path, method, ckpt_path=tmp_path / "saved" / "only.ckpt", **own)
    saved = torch.load(tmp_path / "saved" / "only.ckpt", weights_only=True)
    assert saved["global_step"] == FAILS_AT + 1
    assert torch.equal(resumed, whole)
    assert not torch.equal(torch.cat([tensor.flatten() for tensor in saved["state_dict"].values()]), whole)
