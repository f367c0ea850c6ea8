"""Features of frozen encoders are the tokens that their names say."""

from copy import deepcopy

import pytest
import timm
import torch

from flops_lightning.datamodules.augmentation import backbone_size, backbone_statistics
from flops_lightning.errors import SettingError
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


def test_arguments_that_change_features_and_no_weight_change_the_name():
    """By which caches and checkpoints know an encoder."""
    made = []
    for pool in ("avg", "max", "max"):
        torch.manual_seed(0)
        made.append(VisionEncoder(NAME, "", {**VIT, "global_pool": pool}, "pooled"))
    images = torch.randn(2, 3, 8, 8)
    average, largest, again = (encoder(images) for encoder in made)
    assert not torch.allclose(average, largest)
    assert torch.equal(largest, again)
    assert made[0].name != made[1].name == made[2].name


def test_images_of_another_size_are_refused_unless_the_model_takes_any():
    with pytest.raises(SettingError, match=r"data.image_size = \(16, 16\): the encoder takes images of 8 x 8 pixels"):
        VisionEncoder(NAME, "", VIT, "pooled")(torch.zeros(1, 3, 16, 16))
    anything = VisionEncoder(NAME, "", {**VIT, "dynamic_img_size": True}, "pooled")
    assert anything(torch.zeros(1, 3, 16, 16)).shape == (1, 12)


def test_weights_that_do_not_fit_are_told_by_the_settings_of_the_encoder(tmp_path):
    save_weights(timm.create_model(NAME, num_classes=7, **VIT), str(file := tmp_path / "vit.safetensors"))
    with pytest.raises(SettingError, match=r"encoder_kwargs.checkpoint = .*pos_embed is .*`encoder_kwargs` \(img_size"):
        VisionEncoder(NAME, str(file), {**VIT, "img_size": 16}, "pooled")
    with pytest.raises(SettingError, match=r"encoder_kwargs.checkpoint = 'nowhere': is not a file"):
        VisionEncoder(NAME, "nowhere", VIT, "pooled")


def test_copies_share_what_is_frozen():
    encoder = VisionEncoder(NAME, "", VIT, "pooled")
    assert deepcopy([encoder])[0] is encoder


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
