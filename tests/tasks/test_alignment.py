"""An adapter learns to see for a frozen language model, which no module, checkpoint or optimiser has."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flops_lightning.allocators import OptimalAllocator, TraceSettings
from flops_lightning.callbacks import QueryAllocatorCallback, RunSummary
from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss
from flops_lightning.strategies import Backprop, LikelihoodRatio, MeZO, SiteSpec
from flops_lightning.suffix_loss import PaddedTargets
from flops_lightning.tasks import AdapterAlignment
from tests.aligned import MODEL, WORDS, aligner, captions, class_folders, fitted, llm_folder, photo_folder
from tests.language.models import tiny


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return llm_folder(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


def adapter_of(task: AdapterAlignment) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.adapter.state_dict().items()}


def saved(trainer: Any, file: Path) -> dict[str, Any]:
    trainer.save_checkpoint(file)
    return torch.load(file, weights_only=True)


def held_out_loss(trainer: Any, task: Any, data: Any) -> float:
    return trainer.validate(task, data, verbose=False)[0]["val/loss"]


def test_it_learns_and_keeps_the_models_out_of_everything(llm, photos, tmp_path):
    task = aligner(llm)
    frozen = {name: value.clone() for name, value in task.loss.llm.state_dict().items()}
    before = adapter_of(task)
    assert torch.equal(before["adapter.0.weight"], torch.zeros(32, 12))
    mean = task.loss.llm.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(before["adapter.0.bias"], mean.repeat(2))
    optimal = OptimalAllocator(traces=TraceSettings(predictors=["loss"]))
    start = held_out_loss(fitted(task, captions(photos), tmp_path, max_steps=0), task, captions(photos))
    trainer = fitted(
        aligned := aligner(llm), captions(photos), tmp_path, QueryAllocatorCallback(allocator=optimal), max_epochs=4
    )
    assert held_out_loss(trainer, aligned, captions(photos)) < start - 0.3
    assert all(torch.equal(value, frozen[name]) for name, value in aligned.loss.llm.state_dict().items())
    checkpoint = saved(trainer, tmp_path / "a.ckpt")
    assert checkpoint["state_dict"].keys() == {"adapter.adapter.0.weight", "adapter.adapter.0.bias"}
    assert {id(p) for p in aligned.parameters()} == {id(p) for p in aligned.adapter.parameters()}
    assert (tmp_path / "a.ckpt").stat().st_size < 50_000
    aligned.double()
    assert next(aligned.loss.llm.parameters()).dtype == torch.float32
    aligned.export_weights(str(tmp_path / "adapter.safetensors"))
    assert load_file(tmp_path / "adapter.safetensors")["adapter.0.bias"].shape == (32,)


def test_vectors_begin_at_the_mean_of_what_the_model_reads():
    """Gemma's embedding scales the rows of its weight, in vectors of 16 by 4."""
    loss = CaptionLoss(tiny("Gemma", head_dim=8))
    task = AdapterAlignment(llm=loss, feature_width=3)
    table = loss.llm.get_input_embeddings()
    torch.testing.assert_close(task(torch.zeros(1, 3))[0], table(torch.arange(50)).mean(0))
    torch.testing.assert_close(task(torch.zeros(1, 3))[0], 4 * table.weight.mean(0))


@pytest.mark.parametrize("adapter", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("feature", ["cls_pre_norm", "pooled", "patches"])
def test_queries_estimate_the_gradient_of_every_adapter(llm, adapter, feature):
    """Mean of 40 estimates of 50 queries, at the same batch; its cosine with autograd's is near 1."""
    settings = {"adapter": adapter, "feature": feature, "visual_tokens": 1, "init": "default", "relative_sigma": 0.02}
    images, targets = torch.randn(4, 3, 8, 8), PaddedTargets.of([torch.arange(3, 3 + n) for n in (2, 5, 3, 4)])
    exact = aligner(llm, strategy=Backprop(), **{**settings, "relative_sigma": 0.0})
    task = aligner(
        llm, strategy=LikelihoodRatio(sites=[SiteSpec(["adapter"], queries_per_sample=50)], seed=0), **settings
    )
    inputs, _ = exact.split((images, targets))
    exact.loss(exact(inputs), targets).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in exact.adapter.parameters()])
    found = torch.zeros_like(expected)
    for _ in range(40):
        clean = task._clean_pass((images, targets))
        task.strategy.estimate(clean)
        task._state.batch = None
        found += torch.cat([p.grad.flatten() for p in task.adapter.parameters()]) / 40
        task.zero_grad()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.95
    assert float(found @ expected / expected.square().sum()) == pytest.approx(1.0, abs=0.1)


def test_the_width_of_the_noise_is_that_of_the_first_batch_and_stays(llm, photos, tmp_path):
    task = aligner(llm)
    trainer = fitted(task, captions(photos), tmp_path, max_steps=3)
    root = task.loss.llm.get_input_embeddings().weight.mean(0).square().mean().sqrt()  # as the vectors begin
    assert task.sigma == pytest.approx(0.1 * float(root), rel=1e-5)
    assert [site.sigma for site in task.strategy.sites] == [task.sigma]
    saved(trainer, tmp_path / "a.ckpt")
    again = aligner(llm)
    fitted(again, captions(photos), tmp_path, max_steps=4, resume=tmp_path / "a.ckpt")
    assert again.sigma == task.sigma
    wider = aligner(llm, relative_sigma=0.3)  # a resumed run has the width that it asks for
    fitted(wider, captions(photos), tmp_path, max_steps=4, resume=tmp_path / "a.ckpt")
    assert wider.sigma == pytest.approx(3 * task.sigma, rel=1e-6)
    assert [site.sigma for site in wider.strategy.sites] == [wider.sigma]
    with pytest.raises(SettingError, match="the sites have a sigma"):
        aligner(llm, strategy=LikelihoodRatio(sites=[SiteSpec(["adapter"], sigma=0.5)]))
    with pytest.raises(SettingError, match="the strategy has no sites"):
        aligner(llm, strategy=MeZO())


def test_an_interrupted_run_with_cached_features_ends_with_the_same_bits(llm, photos, tmp_path):
    whole = aligner(llm)
    fitted(whole, captions(photos, cache_dir=str(tmp_path / "cache")), tmp_path, max_steps=6)
    first = aligner(llm)
    saved(fitted(first, captions(photos), tmp_path, max_steps=3), tmp_path / "a.ckpt")
    second = aligner(llm)

    def never(images):
        raise AssertionError

    second.features_of = never
    data = captions(photos, cache_dir=str(tmp_path / "cache"))
    fitted(second, data, tmp_path, max_steps=6, resume=tmp_path / "a.ckpt")
    assert all(torch.equal(value, adapter_of(whole)[name]) for name, value in adapter_of(second).items())
    assert not torch.equal(adapter_of(first)["adapter.0.bias"], adapter_of(whole)["adapter.0.bias"])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_captions_go_through_every_precision(llm, photos, tmp_path, precision):
    """The same gradients; noise in double precision would be other numbers."""
    usual, task = (aligner(llm, strategy=Backprop(), relative_sigma=0.0, optimizer={"name": "sgd"}) for _ in range(2))
    fitted(usual, captions(photos), tmp_path, max_steps=2)
    fitted(task, captions(photos), tmp_path, max_steps=2, precision=precision)
    bias, expected = (adapter_of(each)["adapter.0.bias"] for each in (task, usual))
    start = adapter_of(aligner(llm))["adapter.0.bias"]
    assert (
        float((bias - expected).norm() / (expected - start).norm()) < {"64-true": 1e-4, "bf16-mixed": 0.05}[precision]
    )


def test_features_serve_without_an_encoder(llm, photos, tmp_path):
    task, cache = aligner(llm), str(tmp_path / "cache")
    fitted(task, captions(photos, cache_dir=cache), tmp_path)
    blind = aligner(llm, encoder="", encoder_kwargs=None, feature_width=12)
    fitted(blind, captions(photos, cache_dir=cache), tmp_path)
    assert all(torch.equal(value, adapter_of(task)[name]) for name, value in adapter_of(blind).items())
    assert blind.identity == task.identity
    for each, file in ((task, "a.ckpt"), (blind, "b.ckpt")):  # either goes on from the other
        saved(fitted(each, captions(photos, cache_dir=cache), tmp_path), tmp_path / file)
    fitted(aligner(llm), captions(photos), tmp_path, max_epochs=3, resume=tmp_path / "b.ckpt")
    kwargs = {**MODEL["encoder_kwargs"], "depth": 2}
    fitted(aligner(llm, encoder_kwargs=kwargs), captions(photos, cache_dir=cache + "2"), tmp_path)
    for file in ("a.ckpt", "b.ckpt"):
        other = aligner(llm, encoder="", encoder_kwargs=None, feature_width=12)
        with pytest.raises(SettingError, match=r"encoder = .*the checkpoint's adapter was learned with"):
            fitted(other, captions(photos, cache_dir=cache + "2"), tmp_path, resume=tmp_path / file)
    with pytest.raises(SettingError, match=r"data = \(7,\): the adapter takes features \(12,\)"):
        blind.split((torch.zeros(2, 7), None))
    with pytest.raises(SettingError, match="is needed to compute features of images"):
        blind.split((torch.zeros(2, 3, 8, 8), None))


def test_accuracy_is_of_the_likeliest_caption_of_a_class(llm, tmp_path):
    root = class_folders(tmp_path / "photos")
    data = captions(root, captions=None, template="a {} .")
    task = aligner(llm)
    trainer = fitted(task, data, tmp_path, RunSummary(), max_epochs=1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["validation"]) == {"loss", "perplexity", "accuracy"}
    assert (summary["samples"], summary["queries_by_site"]) == (len(data.train_set), {"adapter": summary["queries"]})
    assert load_file(tmp_path / "adapter.safetensors")["adapter.0.bias"].shape == (32,)
    found = trainer.test(task, data, verbose=False)[0]
    right, losses, lengths = [], [], []
    for images, targets in data.test_dataloader():
        vectors = task(task.split((images, targets))[0])
        for row, ids in zip(vectors, (targets.take(torch.tensor([i])) for i in range(len(targets))), strict=True):
            of_class = {text: task.caption_ids([text])[0] for text in ("a big ship .", "a truck .")}
            total = {
                t: float(task.loss(row[None], PaddedTargets.of([torch.tensor(i)]))) * len(i)
                for t, i in of_class.items()
            }
            chosen = min(total, key=total.get)
            right.append(of_class[chosen] == ids.trimmed()[0].tolist())
            losses.append(float(task.loss(row[None], ids)))
            lengths.append(ids.length())
    assert found["test/accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["test/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert set(lengths) == {3, 4}
    of_token = sum(loss * length for loss, length in zip(losses, lengths, strict=True)) / sum(lengths)
    assert found["test/perplexity"] == pytest.approx(math.exp(of_token), rel=1e-5)
    assert 0 < sum(right) < len(right)


@pytest.mark.parametrize("prompt", ["plain", "instruction"])
def test_predict_writes_the_likeliest_token_each_time(llm, photos, tmp_path, prompt):
    task = aligner(llm, bos=True, eos=True, prompt=prompt, init="default")
    data = captions(photos)
    trainer = fitted(task, data, tmp_path, max_steps=1)
    with torch.no_grad():
        task.adapter.get_submodule("adapter")[0].weight.mul_(30)  # another caption for every photo
        task.loss.llm.lm_head.weight[2] = 0.0  # and not always the end
    task.loss.llm.generation_config.repetition_penalty = 9.0  # as models bring for chats
    batches = trainer.predict(task, data)
    assert task.loss.llm.generation_config.repetition_penalty == 9.0
    first = [caption for batch in batches for caption in batch["caption"]]
    data.setup("predict")
    task.setup("predict")
    images, targets = next(iter(data.predict_dataloader()))
    table, model = task.loss.llm.get_input_embeddings(), task.loss.llm
    vectors = task(task.split((images, targets))[0]).view(len(images), 2, -1)
    for row, caption in zip(vectors, first, strict=False):
        question = task.caption_ids(["what is it"])[0] if prompt == "instruction" else []
        inputs = torch.cat([table(torch.tensor([1])), row, table(torch.tensor(question, dtype=torch.long))])[None]
        words = []
        while len(words) < data.tokens.lengths.max():
            token = int(model(inputs_embeds=inputs).logits[0, -1].argmax())
            if token == 2:
                break
            words.append(WORDS[token])
            inputs = torch.cat([inputs, table(torch.tensor([[token]]))], 1)
        assert caption.split() == [word for word in words if word not in ("<s>", "<unk>")]
    assert len(set(first)) > 1


CHANGED = [
    ({"visual_tokens": 3}, "visual_tokens"), ({"bos": True}, "bos"), ({"normalize_features": False}, "normalize"),
    ({"encoder_kwargs": {**MODEL["encoder_kwargs"], "depth": 2}}, "encoder"), ({"feature": "pooled"}, "feature"),
    ({"adapter": "mlp2x_gelu"}, "adapter"), ({"init": "default"}, "init"),
]  # fmt: skip


@pytest.mark.parametrize(("other", "setting"), CHANGED)
def test_a_checkpoint_of_other_models_is_refused(llm, photos, tmp_path, other, setting):
    saved(fitted(aligner(llm), captions(photos), tmp_path, max_steps=1), tmp_path / "a.ckpt")
    with pytest.raises(SettingError, match=rf"{setting}.*the checkpoint's (adapter was learned with|run has)"):
        fitted(aligner(llm, **other), captions(photos), tmp_path, resume=tmp_path / "a.ckpt")


def test_a_checkpoint_knows_its_language_model_by_name_and_config(llm, photos, tmp_path):
    saved(fitted(aligner(llm), captions(photos), tmp_path, max_steps=1), tmp_path / "a.ckpt")
    moved = llm_folder(tmp_path / "elsewhere" / Path(llm).name)
    fitted(aligner(moved), captions(photos), tmp_path, max_steps=2, resume=tmp_path / "a.ckpt")
    other = llm_folder(tmp_path / "other" / Path(llm).name, intermediate_size=48)
    with pytest.raises(SettingError, match=r"llm_config = .*was learned with"):
        fitted(aligner(other), captions(photos), tmp_path, resume=tmp_path / "a.ckpt")
    plain = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del plain["adapter_alignment"]
    torch.save(plain, tmp_path / "b.ckpt")
    with pytest.raises(SettingError, match="does not hold an adapter of an AdapterAlignment"):
        fitted(aligner(llm), captions(photos), tmp_path, resume=tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_tokens": 0}, "visual_tokens = 0: must be a whole number, 1 or more"),
        ({"llm": "no/such/model"}, "llm = 'no/such/model': cannot be loaded"),
        ({"encoder": "vit_tinny", "encoder_kwargs": None}, r"encoder = 'vit_tinny': .*Did you mean"),
        ({"encoder": "resnet18", "encoder_kwargs": None}, "not a vision transformer with a last norm"),
        ({"encoder": "ViT-B-32"}, "encoder_kwargs.*are arguments of timm's models"),
        ({"encoder": ""}, "encoder_kwargs.*has no effect without an encoder"),
        ({"encoder": "", "encoder_kwargs": None}, "feature_width = 0: is needed"),
        ({"feature_width": 5}, "feature_width = 5: is known from the encoder"),
        ({"feature": "patches", "visual_tokens": 3}, "each of the 4 patches becomes one vector"),
        ({"encoder_kwargs": {**MODEL["encoder_kwargs"], "class_token": False, "global_pool": "avg"}}, "no class token"),
        ({"prompt": "plane"}, "prompt = 'plane'"),
        ({"adapter": "cubic"}, "adapter = 'cubic'"),
        ({"init": "zero"}, "init = 'zero'"),
        ({"relative_sigma": -1.0}, "relative_sigma = -1.0"),
        ({"bos": "yes"}, "bos = 'yes': must be true or false"),
    ],
)
def test_settings_that_do_not_work_are_refused(llm, settings, message):
    with pytest.raises(SettingError, match=message):
        aligner(**{"llm": llm, **settings})


def test_a_scorer_in_the_place_of_a_name(llm, photos, tmp_path):
    named = aligner(llm)
    scorer = CaptionLoss(named.loss.llm, visual_tokens=2)
    task = aligner(scorer, llm_kwargs={"tokenizer": llm})
    fitted(named, captions(photos), tmp_path)
    fitted(task, captions(photos), tmp_path)
    assert all(torch.equal(value, adapter_of(named)[name]) for name, value in adapter_of(task).items())
    for settings, message in (
        ({"bos": True}, "bos"),
        ({"llm_kwargs": {"dtype": "auto"}}, "llm_kwargs"),
        ({"visual_tokens": 3}, "takes 2"),
    ):
        with pytest.raises(SettingError, match=message):
            aligner(scorer, **settings)
    with pytest.raises(SettingError, match="is a scorer, which does not tokenise captions"):
        fitted(aligner(scorer), captions(photos), tmp_path)


def test_a_tokenizer_of_another_model_is_refused_before_training(photos, tmp_path):
    llm = llm_folder(tmp_path / "llm", words=[*WORDS[:8], *["other"] * 0, *(f"w{i}" for i in range(9)), *WORDS[8:]])
    with pytest.raises(SettingError, match=r"gives the id \d+, and the language model's embedding has 15"):
        fitted(aligner(llm), captions(photos), tmp_path)


def test_a_caption_that_does_not_fit_names_its_entry(llm, tmp_path):
    llm = llm_folder(tmp_path / "llm", max_position_embeddings=6)
    root = photo_folder(tmp_path / "photos")
    with pytest.raises(
        SettingError, match=r"captions.json, entry \d+ \(\d+\).*has 6 tokens, .*room for 5. Write max_tokens: 5"
    ):
        fitted(aligner(llm), captions(root), tmp_path)
    fitted(aligner(llm), captions(root, max_tokens=5), tmp_path, max_steps=1)
    with pytest.raises(SettingError, match=r"max_tokens = 4: the language model has room for 3 tokens"):
        fitted(aligner(llm, bos=True, eos=True), captions(root, max_tokens=4), tmp_path)
    fitted(aligner(llm, bos=True, eos=True), captions(root, max_tokens=3), tmp_path, max_steps=1)
