import copy
import pickle

import pytest
import torch
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.prompts import ClassTexts, IntrinsicPrompt, PromptSpec, class_features, image_start, stage_clip
from flops_lightning.prompts import text_start as start_text
from tests.reference.clip import NAMES, open_clip, prompted, tiny_clip


def text_passes(network) -> list[int]:
    """Numbers of prompts in each pass through the text tower, from now on."""
    seen: list[int] = []
    network.module.texts.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    return seen


@torch.no_grad()
def test_a_text_prompt_at_the_templates_words_leaves_clip_as_it_is():
    clip, images = tiny_clip(), torch.randn(3, 3, 8, 8)
    ids = open_clip.tokenize([f"a photo of a {name}." for name in NAMES], context_length=32)
    expected = clip.get_logits(images, ids)[0]
    texts = ClassTexts(clip, NAMES)
    network = stage_clip(clip, texts, text_prompt=start_text(texts, PromptSpec(tokens=4, dim=5)))
    torch.testing.assert_close(network.run(images), expected, atol=1e-5, rtol=1e-5)
    assert [stage.name for stage in network.stages] == ["features", "scores"]


@torch.no_grad()
def test_image_tokens_stand_after_the_patches_behind_the_first_norm():
    network, images, _ = prompted(text=False)
    visual, prompt = network.module.visual, network.module.image_prompt
    calls = []
    handle = visual.ln_pre.register_forward_hook(
        lambda _, args, output: torch.cat([output, visual.ln_pre.forward(prompt()).expand(3, -1, -1)], 1)
    )
    features = nn.functional.normalize(visual(images), dim=-1)  # open_clip's own pass, with tokens added on the way
    handle.remove()
    expected = network.module.logit_scale.exp() * features @ network.module.text_features.T
    visual.transformer.register_forward_pre_hook(lambda _, args: calls.append(args))
    torch.testing.assert_close(network.run(images), expected)
    torch.testing.assert_close(network.module(images), expected)
    names = [stage.name for stage in network.stages]
    assert names == ["patches", "image_prompt", "blocks.0", "blocks.1", "pool", "scores"]


def test_text_and_image_prompts_of_one_seed_have_a_w_of_their_own():
    clip, spec = tiny_clip(), PromptSpec(tokens=2, dim=5)
    of_text = start_text(ClassTexts(clip, NAMES), spec).directions
    of_image = image_start(clip, torch.randn(3, 3, 8, 8), spec).directions
    assert of_text.shape == of_image.shape
    assert abs(float(torch.corrcoef(torch.stack([of_text.flatten(), of_image.flatten()]))[0, 1])) < 0.3


@torch.no_grad()
def test_the_pool_reads_the_class_token_alone():
    network, images, _ = prompted()
    tokens = network.run(images, stop=4)
    assert network.stages[4].reads == slice(0, 1)
    torch.testing.assert_close(network.run(tokens[:, :1], 4), network.run(tokens, 4))


def test_prompts_alone_are_trained_and_each_belongs_to_its_stage():
    network, _, _ = prompted()
    assert list(network.parameters_of(1, 1)) == ["image_prompt.z"]
    assert list(network.parameters_of(5, 5)) == ["text_prompt.z"]
    assert sorted(network.trainable()) == ["image_prompt.z", "text_prompt.z"]


def test_text_features_are_kept_for_as_long_as_the_text_prompt_is_the_same():
    network, images, _ = prompted()
    seen = text_passes(network)
    with torch.no_grad():
        first = network.run(images)
        assert torch.equal(network.run(images), first)
        assert seen == [1]
        network.module.image_prompt.z.add_(1.0)
        network.run(images)
        assert seen == [1]
        network.module.text_prompt.z.add_(1.0)
        moved = network.run(images)
        assert seen == [1, 1]
        module = network.module
        fresh = module.texts.encode(module.text_prompt()[None])[0]
        features = network.run(images, stop=5)
        torch.testing.assert_close(moved, module.logit_scale.exp() * features @ fresh.T)
        before = copy.deepcopy(network.module.state_dict())
        before["text_prompt.directions"] *= 2
        network.module.load_state_dict(before)
        assert not torch.allclose(network.run(images), moved)


@torch.no_grad()
def test_a_copy_follows_its_own_prompts():
    network, images, _ = prompted()
    expected = network.run(images)
    for copied in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        network.module.text_prompt.z.add_(1.0)
        assert torch.equal(copied.run(images), expected)
        copied.module.text_prompt.z.add_(1.0)
        assert not torch.equal(copied.run(images), expected)


def test_what_validation_kept_serves_training_and_a_gradient_has_a_pass_of_its_own():
    network, images, _ = prompted()
    with torch.inference_mode():
        network.run(images)
    seen, z = text_passes(network), network.module.text_prompt.z
    network.module.image_prompt.z.requires_grad_(True)
    z.requires_grad_(False)
    network.run(images).sum().backward()  # text features are constants here
    assert seen == []
    z.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda value: functional(network, images, value), (z.detach().requires_grad_(),))


def functional(network, images, z):
    return torch.func.functional_call(network.module, {"text_prompt.z": z}, (images,))


@torch.no_grad()
def test_rows_may_have_prompts_of_their_own():
    network, images, _ = prompted()
    image, text = torch.randn(2, 3, 5, dtype=torch.float64)
    rows = torch.func.functional_call(network.module, {"text_prompt.z": text, "image_prompt.z": image}, (images,))
    for row in range(3):
        of_row = {"text_prompt.z": text[row], "image_prompt.z": image[row]}
        alone = torch.func.functional_call(network.module, of_row, (images[row : row + 1],))
        torch.testing.assert_close(rows[row : row + 1], alone)


@torch.no_grad()
def test_the_module_itself_encodes_the_texts_once():
    network, images, _ = prompted()
    seen = text_passes(network)
    outputs = [network.module(images), network.module(images), network.run(images)]
    assert seen == [1]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_scores_are_products_in_float32_under_autocast_too():
    network, images, _ = prompted()
    network.module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network.run(images.float(), stop=5)
        logits, texts = network.run(features, 5), network.stages[5].context.compute()
    assert features.dtype == texts.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, network.module.logit_scale.exp() * features @ texts.T)


def test_the_start_of_an_image_prompt_is_the_mean_patch_and_its_spread_theirs():
    clip, images = tiny_clip(), torch.randn(5, 3, 8, 8)
    found = []
    clip.visual.ln_pre.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()[:, 1:]))
    clip.visual(images)
    prompt = image_start(clip, images, PromptSpec(tokens=2, dim=30))
    torch.testing.assert_close(prompt.start, found[0].mean((0, 1)).expand(2, -1))
    assert float(prompt.directions.std() * 30**0.5) == pytest.approx(float(found[0].std()), rel=0.1)
    assert not image_start(clip, images, PromptSpec(tokens=2, dim=30, init="zeros")).start.any()


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}


@pytest.mark.parametrize(("vision", "name"), [(RESNET, "ModifiedResNet"), ({"pool_type": "avg"}, "VisionTransformer")])
def test_image_towers_that_take_no_tokens_are_refused_and_still_take_a_text_prompt(vision, name):
    clip, images = tiny_clip(**vision), torch.randn(2, 3, 32, 32)
    with pytest.raises(SettingError, match=f"image_prompt = '{name}'.*a text prompt still works"):
        image_start(clip, images, PromptSpec(tokens=2, dim=5))
    clip = tiny_clip(**vision)
    texts, images = ClassTexts(clip, NAMES), images if name == "ModifiedResNet" else images[..., :8, :8]
    network = stage_clip(clip, texts, text_prompt=start_text(texts, PromptSpec(tokens=4, dim=5)))
    assert network.run(images).shape == (2, len(NAMES))


def test_what_cannot_be_put_together_is_refused():
    clip = tiny_clip()
    texts, narrow = ClassTexts(clip, NAMES), IntrinsicPrompt(torch.zeros(2, 4), PromptSpec(2, 5), std=1.0)
    long = IntrinsicPrompt(torch.zeros(25, 16), PromptSpec(25, 5), std=1.0)
    with pytest.raises(SettingError, match="nothing would be trained"):
        stage_clip(clip, texts)
    with pytest.raises(SettingError, match=r"texts = \(4, 8\).*Give ClassTexts"):
        stage_clip(clip, class_features(clip, NAMES), text_prompt=narrow)
    for name in ("text_prompt", "image_prompt"):
        with pytest.raises(SettingError, match=f"{name} = .*of another width than its tower, 16"):
            stage_clip(clip, texts, **{name: narrow})
    with pytest.raises(SettingError, match="'black-and-white colobus monkey'"):
        stage_clip(clip, texts, text_prompt=long)
