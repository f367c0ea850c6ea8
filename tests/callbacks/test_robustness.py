"""The callback that tests under noise and attack: its files, what its results depend on, and what it refuses."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from flops_lightning.callbacks import Robustness
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.robustness import AttackSettings, GaussianNoise, PixelModel
from flops_lightning.tasks import ForwardImageClassifier
from tests.digits import quiet_trainer

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "corruptions": {"gaussian": [0.1, 0.3], "poisson": [20]},
    "attacks": [AttackSettings("fgsm", eps=0.05), AttackSettings("mi_fgsm", eps=0.05, steps=2)],
}
NAMES = ["clean", "gaussian_0.1", "gaussian_0.3", "poisson_20", "fgsm_12.8", "mi_fgsm_12.8"]


class Data(DigitsDataModule):
    """Some of the test images, in a given order."""

    def __init__(self, *, order: Any = range(37), **settings: Any) -> None:
        super().__init__(**settings)
        self.order = order

    def test_dataloader(self, *, raw: bool = False) -> Any:
        dataset = super().test_dataloader(raw=raw).dataset
        if self.order is None:
            return DataLoader(dataset, batch_size=self.batch_size, shuffle=True)
        return DataLoader(Subset(dataset, range(37)), batch_size=self.batch_size, sampler=self.order)


def classifier(**settings: Any) -> ForwardImageClassifier:
    """Reads upright digits: 96.9 % of the test images."""
    network = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4}
    return ForwardImageClassifier(
        model_name="vit_tiny_patch16_224", num_classes=10, model_kwargs={**network, "mlp_ratio": 2.0},
        checkpoint=str(ROOT / "data/assets/vit_tiny_digits_upright.safetensors"), **settings,
    )  # fmt: skip


def table_of(folder: Path, *, batch_size: int = 12, order: Any = range(37), **settings: Any) -> str:
    callback = pickle.loads(pickle.dumps(Robustness(**{**SMALL, "rows": 8, **settings})))  # as ddp_spawn sends it
    trainer = quiet_trainer(callback, default_root_dir=folder)
    trainer.test(classifier(), Data(batch_size=batch_size, order=order), verbose=False)
    return (folder / "robustness.csv").read_text()


def test_a_line_for_each_image_and_strength_as_by_hand_and_the_accuracies_of_these_lines(tmp_path) -> None:
    task = classifier().eval()
    trainer = quiet_trainer(Robustness(**SMALL), default_root_dir=tmp_path)
    data = Data(batch_size=16)
    (logged,) = trainer.test(task, data, verbose=False)
    with (tmp_path / "robustness.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image"] for row in rows] == [str(i) for i in range(37) for _ in NAMES]
    assert [(row["corruption"], row["severity"]) for row in rows[:6]] == [
        ("clean", ""), ("gaussian", "0.1"), ("gaussian", "0.3"), ("poisson", "20"), ("fgsm", "0.05"),
        ("mi_fgsm", "0.05"),
    ]  # fmt: skip
    pixels, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(raw=True), strict=True))
    model = PixelModel(task, mean=data.mean, std=data.std)
    noisy = GaussianNoise(0.3)(pixels, range(37))
    moved = AttackSettings("fgsm", eps=0.05).run(model, pixels, labels)
    for name, images in (("clean", pixels), ("gaussian_0.3", noisy), ("fgsm_12.8", moved)):
        found = [int(row["prediction"]) for row in rows[NAMES.index(name) :: 6]]
        assert found == model(images).argmax(dim=1).tolist()
        right = [row["label"] == row["prediction"] for row in rows[NAMES.index(name) :: 6]]
        clean = [row["label"] == row["prediction"] for row in rows[::6]]
        kept = sum(a and b for a, b in zip(right, clean, strict=True)) / sum(clean)
        assert logged[f"robust/{name}/accuracy"] == pytest.approx(sum(right) / 37)
        assert logged[f"robust/{name}/kept"] == pytest.approx(kept)
    written = json.loads((tmp_path / "robustness.json").read_text())
    assert (list(written["results"]), written["images"]) == (NAMES, 37)
    assert written["results"]["fgsm_12.8"]["kept"] == pytest.approx(logged["robust/fgsm_12.8/kept"])
    assert logged["test/accuracy"] == pytest.approx(logged["robust/clean/accuracy"])
    assert 0 < logged["robust/fgsm_12.8/kept"] < logged["robust/gaussian_0.1/kept"]
    assert all(parameter.grad is None for parameter in task.parameters())


def test_the_table_is_the_same_for_any_batch_size_and_order_and_another_for_another_seed(tmp_path) -> None:
    expected = table_of(tmp_path)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(5)).tolist()
    for batch_size, given in ((5, range(37)), (37, range(37)), (12, order)):
        assert table_of(tmp_path, batch_size=batch_size, order=given) == expected
    assert table_of(tmp_path, seed=1) != expected


def test_by_default_the_severities_of_imagenet_c_and_the_papers_attacks() -> None:
    names = Robustness().names
    assert len(names) == 1 + 3 * 5 + 3
    assert names[1::5] == ["gaussian_0.08", "uniform_0.08", "poisson_60", "fgsm_8"]
    assert names[-2:] == ["i_fgsm_8", "mi_fgsm_8"]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(1, 8, 8), 0)])


class Several(Data):
    def test_dataloader(self, **settings: Any) -> Any:
        return [super().test_dataloader(**settings)] * 2


class Unknown(pl.LightningDataModule):
    def test_dataloader(self) -> Any:
        return DataLoader(Stream())


def test_data_of_an_unknown_normalisation_or_order_and_half_precision_are_refused(tmp_path) -> None:
    trainer = quiet_trainer(Robustness(**SMALL), default_root_dir=tmp_path)
    with pytest.raises(SettingError, match=r"^data = 'Unknown': does not say how it normalises images"):
        trainer.test(classifier(), Unknown(), verbose=False)
    with pytest.raises(SettingError, match=r"^test_dataloader = 'DataLoader': does not keep the order of the images"):
        trainer.test(classifier(), Data(order=None), verbose=False)
    with pytest.raises(SettingError, match=r"^test_dataloader = 2: are several loaders"):
        trainer.test(classifier(), Several(), verbose=False)
    half = quiet_trainer(Robustness(**SMALL), default_root_dir=tmp_path, precision="bf16-true")
    with pytest.raises(SettingError, match=r"^trainer.precision = 'bf16-true': the weights are torch.bfloat16"):
        half.test(classifier(), Data(), verbose=False)


def test_a_network_that_keeps_tensors_of_its_first_pass_is_told_to_leave_inference_mode(tmp_path) -> None:
    class Caching(nn.Module):
        kept: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.kept is None:
                self.kept = torch.ones(())
            return x * self.kept

    for inference_mode in (True, False):
        task = classifier()
        task.backbone.patch_embed = nn.Sequential(Caching(), task.backbone.patch_embed)
        trainer = quiet_trainer(Robustness(**SMALL), default_root_dir=tmp_path, inference_mode=inference_mode)
        if not inference_mode:
            trainer.test(task, Data(), verbose=False)
            continue
        with pytest.raises(SettingError, match=r"^trainer.inference_mode = True: .* Write false"):
            trainer.test(task, Data(), verbose=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruptions": {"fog": [1]}}, "corruptions = 'fog': is not one of the choices"),
        ({"corruptions": {"poisson": [60, 0]}}, r"corruptions.poisson\[1\] = 0: must be a number above 0"),
        ({"corruptions": {"uniform": [0.1, 0.1]}}, r"corruptions.uniform\[1\] = 'uniform_0.1': is there twice"),
        ({"corruptions": {}, "attacks": []}, "corruptions = {}: there is neither noise nor attack"),
        ({"attacks": [{"name": "fgsm", "eps": 8}]}, r"attacks\[0\].eps = 8: is read as .* Write 0.0314 \(8/255\)"),
        ({"attacks": [{"name": "fgsm", "alpha": 1}]}, r"attacks\[0\] = .*has no setting 'alpha'"),
        ({"rows": 0}, "rows = 0: must be a whole number, 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        Robustness(**settings)


def test_a_loss_without_a_derivative_is_replaced_for_the_attacks_and_that_is_said_once(tmp_path, caplog) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    trainer = quiet_trainer(Robustness(**SMALL), default_root_dir=tmp_path)
    loss = "flops_lightning.objectives.zero_one_error"
    (logged,) = trainer.test(classifier(loss=loss), Data(), verbose=False)
    (plain,) = quiet_trainer(Robustness(**SMALL), default_root_dir=tmp_path / "plain").test(
        classifier(), Data(), verbose=False
    )
    assert {key: logged[key] for key in plain if key.startswith("robust")} == {
        key: plain[key] for key in plain if key.startswith("robust")
    }
    said = [r.message for r in caplog.records if "attacks use" in r.message]
    assert said == [f"attacks use the derivative of cross-entropy, not of the run's loss, {loss}."]
