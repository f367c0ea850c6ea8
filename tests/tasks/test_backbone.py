from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from flops_lightning.errors import SettingError
from flops_lightning.tasks import ForwardImageClassifier
from tests.digits import MODEL

KWARGS = MODEL["model_kwargs"]


def vit(**kwargs: Any) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{"num_classes": 10, **KWARGS, **kwargs})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_export_and_load_give_the_same_network(tmp_path, suffix):
    task = ForwardImageClassifier(**MODEL)
    path = tmp_path / f"weights{suffix}"
    task.export_weights(str(path))
    plain = vit()
    plain.load_state_dict(load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True))
    again = ForwardImageClassifier(**MODEL, checkpoint=str(path))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.eval()(x), task.eval()(x))
    assert torch.equal(plain.eval()(x), task.eval()(x))


def test_a_checkpoint_of_this_project_is_read(tmp_path):
    task = ForwardImageClassifier(**MODEL)
    torch.save({"state_dict": task.state_dict(), "epoch": 3}, tmp_path / "run.ckpt")
    again = ForwardImageClassifier(**MODEL, checkpoint=str(tmp_path / "run.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), task.parameters(), strict=True))


def test_a_head_of_other_classes_starts_fresh(tmp_path):
    source = vit(num_classes=7)
    save_file(source.state_dict(), tmp_path / "seven.safetensors")
    task = ForwardImageClassifier(**MODEL, checkpoint=str(tmp_path / "seven.safetensors"))
    assert torch.equal(task.backbone.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert task.backbone.head.weight.shape == (10, 16)


def test_bad_checkpoints_name_the_remedy(tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(SettingError, match=message):
            ForwardImageClassifier(**MODEL, checkpoint=str(path))

    refused(tmp_path / "absent.ckpt", "is not a file. Give the path")
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x00" * 100)
    refused(corrupt, "cannot be read .*Give an intact safetensors file")
    truncated = tmp_path / "truncated.pt"
    torch.save(vit().state_dict(), truncated)
    truncated.write_bytes(truncated.read_bytes()[:5000])
    refused(truncated, "cannot be read")
    code = tmp_path / "code.pt"
    torch.save({"model": vit()}, code)  # pickled code, not tensors
    refused(code, "cannot be read .*holds tensors only")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, foreign)
    refused(foreign, "is of another model: missing .*Give the `model_name`")
    larger = tmp_path / "larger.safetensors"
    save_file(vit(img_size=16).state_dict(), larger)
    refused(larger, r"tensors of another shape: pos_embed .*model_kwargs")
    empty = tmp_path / "empty.pt"
    torch.save({}, empty)
    refused(empty, "does not hold a state_dict of tensors")


def test_weights_that_cannot_be_fetched_name_the_remedy(monkeypatch):
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SettingError, match=r"pretrained = True: .*could not be fetched \(OSError\).*`checkpoint`"):
        ForwardImageClassifier(**{**MODEL, "pretrained": True})


def test_a_model_without_published_weights_says_so():
    with pytest.raises(SettingError, match="pretrained = True: timm has no weights for 'vit_base_patch16_18x2_224'"):
        ForwardImageClassifier(model_name="vit_base_patch16_18x2_224", num_classes=10, pretrained=True)
