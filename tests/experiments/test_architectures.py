from pathlib import Path

import pytest

from experiments import architectures
from experiments.tables import read_csv


def test_a_step_is_trained_or_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(architectures.__file__).parents[1])
    monkeypatch.setattr(architectures, "smallest", {"convnext": "test_convnext", "resnet": "resnet0"}.__getitem__)
    architectures.main(["--output", str(tmp_path), "--families", "convnext", "resnet"])
    trained, refused = read_csv(tmp_path / "architectures.csv")
    assert (trained["result"], trained["stages"]) == ("trained", "15")
    assert refused["result"].startswith("refused: model_name = 'resnet0': is not a timm model.")
    assert (tmp_path / "architectures.md").read_text().startswith("1 of 2 families of timm")


def test_the_smallest_model_is_chosen_by_name() -> None:
    assert architectures.smallest("convnext") == "test_convnext"
