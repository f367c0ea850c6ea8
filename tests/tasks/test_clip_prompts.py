"""Prompt tuning as a task: what it learns, pays, saves and predicts."""

import copy
import json
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from flops_lightning.allocators import CostAwareAllocator
from flops_lightning.callbacks import QueryAllocatorCallback, RunSummary
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.strategies import SPSA, Backprop, CandidateSearch, EvolutionStrategies
from flops_lightning.tasks import ClipPromptTuner
from tests.clip_digits import BOTH, IMAGE_PROMPT, MODEL, TEXT_PROMPT, tuner
from tests.digits import quiet_trainer

SEARCH = {"population": 4, "sigma": 1.0, "seed": 1}


def digits(**settings: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"batch_size": 32, "rotation": 30.0, **settings})


def fit(task: ClipPromptTuner, *callbacks: Any, data: DigitsDataModule | None = None, **settings: Any) -> Any:
    usual = {"max_steps": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(*callbacks, **{**usual, **settings})
    trainer.fit(task, data or digits())
    return trainer


def numbers(task: ClipPromptTuner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.network.trainable().values()])


def spent(task: ClipPromptTuner) -> dict[str, int]:
    assert task.strategy is not None
    return {name: count.queries for name, count in task.strategy.meter.sites.items() if count.queries}


@pytest.mark.parametrize("strategy", [EvolutionStrategies, SPSA])
def test_prompts_learn_and_the_frozen_model_does_not(strategy):
    text, image = ({**prompt, "queries": 4} for prompt in (TEXT_PROMPT, IMAGE_PROMPT))
    task = tuner(strategy=strategy(seed=0), text_prompt=text, image_prompt=image)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    fit(task)
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    start = {"clip.image_prompt.start", "clip.image_prompt.directions"}  # found on the training images
    assert moved == start | {"clip.text_prompt.z", "clip.image_prompt.z"}
    assert spent(task) == {"image_prompt": 2 * 32 * 4, "scores": 2 * 4}


def test_pairing_joint_moves_both_prompts_in_one_query():
    same = {"tokens": 4, "dim": 20, "queries": 3}
    task = tuner(text_prompt=same, image_prompt=same, pairing="joint")
    fit(task)
    (site,) = task.strategy.sites
    assert set(site.parameters) == {"text_prompt.z", "image_prompt.z"}
    assert spent(task) == {site.name: 2 * 32 * 3}


@pytest.mark.parametrize("strategy", [EvolutionStrategies(variant="leave_one_out", seed=0), SPSA(seed=0)])
def test_pairing_crossed_has_the_sites_of_split_and_averages_over_all_pairs(strategy):
    prompts = {name: {**prompt, "queries": 4} for name, prompt in BOTH.items()}
    fit(split := tuner(strategy=copy.deepcopy(strategy), pairing="split", **prompts))
    fit(task := tuner(strategy=strategy, pairing="crossed", **prompts))
    assert [site.name for site in task.strategy.sites] == [site.name for site in split.strategy.sites]
    assert spent(task) == {"image_prompt": 2 * 32 * 4, "scores": 2 * 4}
    pairs, alone = (each.strategy.meter.sites["scores"].forward_equivalents for each in (task, split))
    assert pairs > alone  # a product for each pair
    assert not torch.equal(numbers(task), numbers(split))


def test_the_strategys_own_sites_win():
    sites = [{"stages": ["scores"], "sigma": 0.1, "queries_per_sample": 6}]
    text = {name: TEXT_PROMPT[name] for name in ("tokens", "dim")}
    task = tuner(strategy=EvolutionStrategies(sites=sites, seed=0), text_prompt=text)
    fit(task)
    assert spent(task) == {"scores": 12}
    assert task.strategy.sites[0].sigma == 0.1


def test_an_allocator_leaves_the_text_draws_or_chooses_them():
    task = tuner()
    fit(task, QueryAllocatorCallback(allocator=CostAwareAllocator()))
    assert torch.isfinite(numbers(task)).all()
    assert spent(task).keys() == {"image_prompt", "scores"}


def test_a_generation_pays_text_and_image_passes_and_goes_to_the_mean_of_the_next():
    task = tuner(search=SEARCH)
    fit(task)
    assert isinstance(task.strategy, CandidateSearch)
    assert spent(task) == {"image_prompt": 2 * 4 * 32, "scores": 2 * 4}
    expected = torch.from_numpy(task.strategy.search.mean).float()
    torch.testing.assert_close(numbers(task), expected, rtol=1e-5, atol=1e-6)


def test_backprop_lowers_the_loss_of_turned_digits():
    task = tuner(strategy=Backprop())
    (before,) = quiet_trainer().test(task, digits(), verbose=False)
    fit(task, max_steps=15)
    (after,) = quiet_trainer().test(task, digits(), verbose=False)
    assert after["test/loss"] < 0.8 * before["test/loss"]


def test_manual_is_the_model_without_prompts_and_an_ensemble_averages_templates():
    manual, ensemble = (
        ClipPromptTuner(**MODEL),
        ClipPromptTuner(**{**MODEL, "template": [MODEL["template"], "a photo of a {}."], "ensemble": True}),
    )
    (upright,) = quiet_trainer().test(manual, digits(rotation=0.0), verbose=False)
    assert upright["test/accuracy"] > 0.95
    (both,) = quiet_trainer().test(ensemble, digits(rotation=0.0), verbose=False)
    assert both["test/accuracy"] > 0.95
    assert both["test/loss"] != upright["test/loss"]


def test_a_text_prompt_at_the_words_of_the_template_starts_as_manual():
    words = len(tuner(text_prompt=TEXT_PROMPT).clip.texts.prefix)
    manual, tuned = ClipPromptTuner(**MODEL), ClipPromptTuner(**MODEL, text_prompt={"tokens": words, "dim": 4})
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(tuned(images), manual(images), rtol=1e-4, atol=1e-4)


def test_images_are_encoded_once_a_run_where_no_prompt_moves_them():
    task, data = tuner(text_prompt=TEXT_PROMPT), digits(batch_size=0)
    seen: list[int] = []
    task.clip.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    trainer = fit(task, data=data, max_steps=3, max_epochs=3, limit_val_batches=1.0)
    assert sum(seen) == 1257 + 180
    assert trainer.num_training_batches == 1
    assert task.strategy.meter.total().clean_passes == 3 * 1257
    kept = trainer.callback_metrics["val/loss"]
    images = digits(batch_size=0)  # validated from images, not from features
    (again,) = quiet_trainer().validate(task, images, verbose=False)
    assert again["val/loss"] == pytest.approx(float(kept), rel=1e-4)


def test_augmented_images_are_not_kept():
    task = tuner(text_prompt=TEXT_PROMPT)
    data = digits(mixup_alpha=0.2)
    fit(task, data=data, max_steps=1)
    assert data.train_set.tensors[0].dim() == 4


def test_an_image_prompt_starts_at_the_mean_patch_of_training_images_whatever_else_was_drawn():
    starts = []
    for drawn in range(2):
        task, data = tuner(), digits()
        torch.rand(drawn)
        quiet_trainer().test(task, data, verbose=False)  # without training too
        starts.append(task.clip.image_prompt.start.clone())
    assert torch.equal(*starts)
    images = data.train_set.tensors[0]
    some = images[torch.linspace(0, len(images) - 1, 64).round().long()].expand(-1, 3, -1, -1)
    tokens = task.clip.visual.conv1(some).flatten(2).transpose(1, 2) + task.clip.visual.positional_embedding[1:]
    torch.testing.assert_close(starts[0], tokens.mean((0, 1)).detach().expand(2, -1))


def resumed(tmp_path: Any, **settings: Any) -> tuple[Tensor, Tensor, dict[str, int], dict[str, int]]:
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = tuner(**settings)
    fit(whole, saver, max_steps=4, enable_checkpointing=True)
    later = tuner(**settings)
    trainer = quiet_trainer(max_steps=4, limit_val_batches=0)
    trainer.fit(later, digits(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    return numbers(whole), numbers(later), spent(whole), spent(later)


@pytest.mark.parametrize("settings", [{}, {"search": SEARCH}, {"text_prompt": TEXT_PROMPT}], ids=["es", "cma", "text"])
def test_a_resumed_run_ends_with_the_same_bits(settings, tmp_path):
    whole, later, paid, paid_later = resumed(tmp_path, **settings)
    assert torch.equal(whole, later)
    assert paid == paid_later


def test_a_checkpoint_is_small_and_makes_the_task_again(tmp_path):
    task = tuner()
    trainer = fit(task)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert {name.rpartition(".")[0] for name in saved["state_dict"]} == {"clip.text_prompt", "clip.image_prompt"}
    again = ClipPromptTuner.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), task(images))


def test_predictions_have_labels_and_probabilities():
    (first, *_) = quiet_trainer().predict(ClipPromptTuner(**MODEL), digits(rotation=0.0))
    assert first["probability"].shape == (32, 10)
    assert torch.equal(first["label"], first["probability"].argmax(1))


def test_the_run_summary_has_the_passes_and_the_prompts_file(tmp_path):
    task = tuner(search=SEARCH)
    fit(task, RunSummary(), default_root_dir=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["queries_by_site"] == {"image_prompt": 2 * 4 * 32, "scores": 2 * 4}
    assert summary["strategy"] == "CandidateSearch"
    assert (tmp_path / "prompts.safetensors").is_file()


def test_settings_stay_in_the_checkpoint_as_plain_values():
    task = tuner(**BOTH)
    assert task.hparams["text_prompt"]["tokens"] == 4
    assert task.identity["image_prompt"] == {
        "tokens": 2, "dim": 20, "coordinates": "flat", "init": "data", "seed": 0,
    }  # fmt: skip
