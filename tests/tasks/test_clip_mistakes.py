"""What prompt tuning refuses, and what it says to write instead."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import EqualAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.datamodules.augmentation import backbone_statistics
from flops_lightning.errors import SettingError
from flops_lightning.strategies import SPSA, Backprop, EvolutionStrategies, LikelihoodRatio
from flops_lightning.tasks import ClipPromptTuner
from flops_lightning.tasks.clip_model import check_image_data
from tests.clip_digits import IMAGE_PROMPT, MODEL, TEXT_PROMPT, random_clip, tuner
from tests.digits import quiet_trainer

SEARCH = {"population": 4, "seed": 1}
WIDTH = 48
SITES = [{"stages": ["scores"], "sigma": 0.1, "queries_per_sample": 6}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": None}, r"class_names = \[\]: names no class"),
        ({"class_names": ["zero", "Zero"]}, "class_names = 'Zero': is the name of two classes"),
        ({"class_names": ["zero", "7"]}, "class_names = '7': is a number"),
        ({"class_names": ["zero", "n01440764"]}, "class_names = 'n01440764': is a WordNet id"),
        ({"class_names": ["zero", "aardvark"]}, "aardvark.*: has words outside the part"),
        ({"template": "a photo"}, r"template = 'a photo': does not have `\{\}` once"),
        ({"template": ["a {}.", "the {}."]}, "are several templates, but only one is used. Give one"),
        ({"text_prompt": TEXT_PROMPT, "ensemble": True}, "ensemble = True: averages .*text_prompt: null"),
        ({"text_prompt": {"tokens": 40}}, r"text_prompt.tokens = 40: the text of .*Write 28 or"),
        ({"text_prompt": {"tokens": 4, "dim": 4 * WIDTH + 1}}, "text_prompt.dim = 193: is more than the 192"),
        ({"image_prompt": {"tokens": 2, "dim": 97}}, "image_prompt.dim = 97: .*2 tokens of width 48. Write 96 or less"),
        ({"image_prompt": {"tokens": 2, "dim": 49, "coordinates": "by_token"}}, "prompt.dim.*a token of width 48"),
        ({"text_prompt": {"tokens": 0, "dim": 5}}, "text_prompt.dim = 5: has no effect.*text_prompt: null"),
        ({"image_prompt": {"tokens": 0, "dim": 5}}, "image_prompt.dim = 5: has no effect.*image_prompt: null"),
        ({"text_prompt": {"tokens": 4, "dim": 0}}, "text_prompt.dim = 0: must be a whole number, 1 or more"),
        ({"text_prompt": {**TEXT_PROMPT, "sigma": 0.0}}, "text_prompt.sigma = 0.0: must be a number above 0"),
        ({"image_prompt": {**IMAGE_PROMPT, "sigma": 0}}, "image_prompt.sigma = 0: must be a number above 0"),
        ({"text_prompt": {**TEXT_PROMPT, "queries": 0}}, "text_prompt.queries = 0: must be a whole number"),
        ({"text_prompt": {**TEXT_PROMPT, "sead": 1}}, "text_prompt = .*has no setting 'sead'"),
        ({"text_prompt": None, "image_prompt": None}, "strategy = 'EvolutionStrategies': has nothing to train"),
        ({"text_prompt": {"tokens": 0, "dim": 0}}, "strategy = 'EvolutionStrategies': has nothing to train"),
        ({"pairing": "crosswise"}, "pairing = 'crosswise': is not one of the choices"),
        ({"pairing": "joint"}, "text_prompt.queries = 3: differs from image_prompt.queries = 4"),
        ({"pairing": "joint", "text_prompt": TEXT_PROMPT}, "pairing = 'joint': has no effect: there is one prompt"),
        (
            {"pairing": "crossed"},
            r"pairing = 'crossed': .*variant: baseline does not. .* variant: leave_one_out, or SPSA, or .*split",
        ),
        ({"pairing": "crossed", "strategy": LikelihoodRatio()}, "'crossed': .*LikelihoodRatio does not support"),
        ({"pairing": "crossed", "image_prompt": IMAGE_PROMPT}, "pairing = 'crossed': has no effect: there is one"),
        ({"pairing": "crossed", "search": SEARCH}, "'crossed': has no effect: CandidateSearch has no sites"),
        (
            {"pairing": "joint", "strategy": SPSA(pairing="crossed")},
            "pairing = 'joint': is not what the strategy says, pairing: crossed. Leave out one of the two",
        ),
        ({"pairing": "split", "strategy": Backprop()}, "pairing = 'split': has no effect: Backprop has no sites"),
        (
            {"pairing": "split", "strategy": EvolutionStrategies(sites=SITES)},
            "pairing = 'split': has no effect: the strategy names its sites",
        ),
        (
            {"text_prompt": TEXT_PROMPT, "strategy": EvolutionStrategies(sites=SITES)},
            r"text_prompt.queries = 3: has no effect: the strategy names its sites. .*queries_per_sample",
        ),
        (
            {"search": SEARCH, "strategy": EvolutionStrategies(seed=0)},
            "strategy = 'EvolutionStrategies': is given together with a search.*search: null",
        ),
        ({"search": SEARCH, "optimizer": {"lr": 0.1}}, "optimizer = .*has no effect on a search"),
        ({"search": SEARCH, "clip": {"norm": 1.0}}, "clip = .*would shorten the steps of a search"),
        ({"search": {"population": 3}}, "search.population = 3: must be a whole number, 4 or more"),
        ({"search": {"seed": 0}}, "search.seed = 0: must be a whole number, 1 or more"),
        ({"model_name": "ViT-B-33"}, r"model_name = 'ViT-B-33': is not an open_clip model. Did you mean .*ViT-B-32"),
        (
            {"model_name": "ViT-B-32", "checkpoint": "openai"},
            "model_name = 'ViT-B-32': does not have the activation .* openai weights .*Write ViT-B-32-quickgelu",
        ),
        (
            {"model_name": "ViT-B-32-quickgelu", "checkpoint": "laion2b_s34b_b79k"},
            "checkpoint = 'laion2b_s34b_b79k': is neither a file nor a tag",
        ),
        ({"model_name": "ViT-B-32", "checkpoint": "mine.pt"}, "checkpoint = 'mine.pt': is neither a file nor .*laion"),
        ({"model_name": "local-dir:nowhere"}, "has no open_clip_config.json. Give a folder"),
        ({"checkpoint": "openai"}, "checkpoint = 'openai': has no effect: the folder"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    both = {"text_prompt": TEXT_PROMPT, "image_prompt": IMAGE_PROMPT}
    named = settings if settings.keys() & both.keys() else {**both, **settings}
    with pytest.raises(SettingError, match=message):
        tuner(**named)


@pytest.mark.parametrize(
    ("vision", "text", "prompt", "message"),
    [
        (
            {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, {}, "image_prompt",
            "image_prompt = 'ModifiedResNet': .*a text prompt still works",
        ),
        ({"timm_model_name": "vit_tiny_patch16_224", "timm_pool": ""}, {}, "image_prompt", "a text prompt still works"),
        ({}, {"no_causal_mask": True}, "text_prompt", "not causal.*an image prompt still works"),
        ({}, {"pool_type": "last"}, "text_prompt", "pools otherwise.*an image prompt still works"),
    ],
)  # fmt: skip
def test_towers_that_take_no_prompt_are_refused_and_take_the_other(
    vision: Any, text: Any, prompt: str, message: str, tmp_path: Any
) -> None:
    name = random_clip(tmp_path / "clip", text=text, **vision)
    with pytest.raises(SettingError, match=message):
        ClipPromptTuner(model_name=name, class_names=["dog", "cat"], **{prompt: {"tokens": 2, "dim": 4}})
    other = "image_prompt" if prompt == "text_prompt" else "text_prompt"
    assert ClipPromptTuner(model_name=name, class_names=["dog", "cat"], **{other: {"tokens": 4, "dim": 4}})


def fit(task: ClipPromptTuner, *callbacks: Any, **data: Any) -> None:
    quiet_trainer(*callbacks, max_steps=1, limit_val_batches=0).fit(task, DigitsDataModule(batch_size=8, **data))


def test_training_needs_a_strategy_or_a_search() -> None:
    with pytest.raises(SettingError, match="strategy = None: is missing"):
        fit(ClipPromptTuner(**MODEL, text_prompt=TEXT_PROMPT))


def test_a_search_takes_no_allocator_and_no_mixed_images() -> None:
    with pytest.raises(SettingError, match=r"QueryAllocatorCallback.*nothing to allocate"):
        fit(tuner(search=SEARCH), QueryAllocatorCallback(allocator=EqualAllocator()))
    with pytest.raises(SettingError, match=r"data.mixup_alpha = 0.2: would score every generation"):
        fit(tuner(search=SEARCH), mixup_alpha=0.2)


def test_another_number_of_classes_than_the_datas_is_refused_with_both() -> None:
    with pytest.raises(SettingError, match="class_names = '2 names': and the data has 10 classes"):
        fit(tuner(class_names=["zero", "one"]))


def test_an_image_prompt_needs_training_images_to_start_from() -> None:
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    loader, task = DataLoader(TensorDataset(images, labels), batch_size=4), tuner()
    with pytest.raises(SettingError, match=r"Call task.start_image_prompt\(images\)"):
        quiet_trainer(max_steps=1).fit(task, loader)
    task.start_image_prompt(images)
    quiet_trainer(max_steps=1).fit(task, loader)
    with pytest.raises(SettingError, match="image_prompt = None: the task has no image prompt"):
        tuner(text_prompt=TEXT_PROMPT).start_image_prompt(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 9, 9), r"data.image_size = \(9, 9\): the model takes images of 8 x 8. Write 8"),
        (torch.zeros(2, 2, 8, 8), "2 channels, and the model takes 3"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "images must be floats"),
        (torch.zeros(2, 32), "images must be floats"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tuner()(images)


@dataclass
class Photos:
    image_size: int = 8
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    normalization: str = "imagenet"


def test_images_of_another_size_or_normalisation_are_refused_with_both(tmp_path: Any) -> None:
    clip = ClipPromptTuner(model_name=random_clip(tmp_path), class_names=["dog", "cat"]).clip
    check_image_data(clip, Photos())
    with pytest.raises(SettingError, match=r"data.image_size = 224: the model takes images of 8 x 8. Write 8"):
        check_image_data(clip, Photos(image_size=224))
    message = (
        r"normalization = 'imagenet': has the mean \(0.485, .*\), the model's images \(0.48145.*normalization: clip"
    )
    with pytest.raises(SettingError, match=message):
        check_image_data(clip, Photos(mean=(0.485, 0.456, 0.406)))
    data, grey = DigitsDataModule(), ClipPromptTuner(**MODEL).clip
    data.std = (0.3,)
    with pytest.raises(SettingError, match=r"data.std = \(0.3,\): has the std .*Normalise the images"):
        check_image_data(grey, data)


def test_a_clip_has_no_normalisation_that_a_data_module_could_ask_for() -> None:
    with pytest.raises(SettingError, match=r"normalization = 'backbone'.*or clip, as the weights were trained"):
        backbone_statistics(tuner())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_names": [*MODEL["class_names"][::-1]]}, "class_names = 'nine': .*learned with 'zero' instead"),
        ({"template": "the number {}."}, r"template = \['the number \{\}.'\]: the checkpoint's run has"),
        ({"text_prompt": {**TEXT_PROMPT, "seed": 1}}, "text_prompt.seed = 1: the checkpoint's run has 0"),
        ({"text_prompt": {**TEXT_PROMPT, "dim": 21}}, "text_prompt.dim = 21: the checkpoint's run has 20"),
        ({"image_prompt": {**IMAGE_PROMPT, "tokens": 3}}, "image_prompt.tokens = 3: the checkpoint's run has 2"),
        ({"image_prompt": None}, "image_prompt = None: the checkpoint's run has one"),
    ],
)
def test_a_checkpoint_of_other_classes_texts_or_w_is_refused(changed: dict, message: str, tmp_path: Any) -> None:
    both = {"text_prompt": TEXT_PROMPT, "image_prompt": IMAGE_PROMPT}
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(tuner(**both), DigitsDataModule(batch_size=8))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    for run in (quiet_trainer().test, quiet_trainer(max_steps=2).fit):
        with pytest.raises(SettingError, match=message):
            run(tuner(**{**both, **changed}), DigitsDataModule(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    with torch.no_grad():
        other = tuner(**both)
        other.weights = "0" * 64
    with pytest.raises(SettingError, match="checkpoint = '000000000000': are not the weights"):
        quiet_trainer().test(other, DigitsDataModule(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)


def test_a_checkpoint_of_another_task_is_refused(make_task: Any, make_trainer: Any, digits: Any, tmp_path: Any) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_task(), digits)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(SettingError, match="does not hold prompts of a ClipPromptTuner"):
        quiet_trainer().test(tuner(), DigitsDataModule(), ckpt_path=tmp_path / "other.ckpt", weights_only=True)


@pytest.mark.parametrize(("package", "extra"), [("open_clip", "clip"), ("httpx", "service"), ("tenacity", "service")])
def test_a_package_that_is_missing_is_named_with_its_extra(package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    given = MODEL if extra == "clip" else {"class_names": ["zero", "one"], "service": {"url": "http://localhost:1"}}
    with pytest.raises(SettingError, match=rf'needs the package {package} .*-e "\.\[{extra}\]" in the checkout'):
        ClipPromptTuner(**given)
