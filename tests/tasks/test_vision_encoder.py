"""Features of frozen encoders are the tokens that their names say."""

import pytest
import timm
import torch

from flops_lightning.datamodules.augmentation import backbone_size, backbone_statistics
from flops_lightning.tasks.backbone import save_weights
from flops_lightning.tasks.vision_encoder import VisionEncoder
from tests.aligned import VIT

NAME = "vit_tiny_patch16_224"


def test_features_of_a_timm_model(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=7, **VIT).eval()
    for parameter in model.norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    save_weights(model, str(tmp_path / "vit.safetensors"))
    images = torch.randn(2, 3, 8, 8)
    made = {
        f: VisionEncoder(NAME, str(tmp_path / "vit.safetensors"), VIT, f) for f in ("cls_pre_norm", "pooled", "patches")
    }
    with torch.no_grad():
        normed, whole = (
            model.forward_features(images),
            torch.stack(model.get_intermediate_layers(images, 1, norm=False)),
        )
    cls, pooled, patches = (encoder(images) for encoder in made.values())
    torch.testing.assert_close(patches, whole[0])
    torch.testing.assert_close(pooled, normed[:, 0])
    torch.testing.assert_close(model.norm(cls), normed[:, 0])
    assert not torch.allclose(cls, pooled)
    assert [(e.width, e.places) for e in made.values()] == [(12, 1), (12, 1), (12, 4)]
    assert made["pooled"].name == made["patches"].name != VisionEncoder(NAME, "", VIT, "pooled").name
    assert backbone_size(made["pooled"]) == 8
    assert backbone_statistics(made["pooled"])[0] == (0.5, 0.5, 0.5)
    assert not any(p.requires_grad for p in made["pooled"]._module.parameters())


def test_features_of_a_clip(tmp_path):
    pytest.importorskip("open_clip", reason="its models")
    from flops_lightning.tasks.clip_model import load_clip
    from tests.clip_digits import random_clip

    name = random_clip(tmp_path, image_size=8, patch_size=4)
    torch.manual_seed(0)
    visual = load_clip(name, "")[0].visual
    made = []
    for feature in ("cls_pre_norm", "pooled", "patches"):
        torch.manual_seed(0)  # the same weights
        made.append(VisionEncoder(name, "", {}, feature))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        tokens = visual.transformer(visual._embeds(images))
    cls, pooled, patches = (encoder(images) for encoder in made)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 1:])
    torch.testing.assert_close(pooled, visual.ln_post(tokens)[:, 0])
    torch.testing.assert_close(pooled @ visual.proj, visual(images))
    assert backbone_size(made[0]) == 8
