"""Language models that transformers quantise with torchao, which is the user's own package: as YAML writes them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss, load_language_model
from flops_lightning.strategies import Backprop, LikelihoodRatio, MeZO
from flops_lightning.suffix_loss import PaddedTargets
from flops_lightning.tasks import ForwardCausalLM
from tests.aligned import aligner, captions, fitted, llm_folder, photo_folder, transformers

quantization = pytest.importorskip("torchao.quantization", reason="torchao is the user's own")


def whole_numbers(form: str = "Int8WeightOnlyConfig") -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": form, "_version": 2, "_data": {}}}}


WEIGHTS = {"quantization_config": whole_numbers()}
ACTIVATIONS = {"quantization_config": whole_numbers("Int8DynamicActivationInt8WeightConfig")}
SIZES = {"hidden_size": 32, "intermediate_size": 64}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llm_folder(tmp_path_factory.mktemp("llm") / "tiny", **SIZES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


def test_an_adapter_learns_before_it_and_resumes(llm, photos, tmp_path):
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    written = (WEIGHTS, {"quantization_config": config}, WEIGHTS)
    whole, resumed, fresh = (aligner(llm, llm_kwargs=each) for each in written)
    assert type(whole.loss.llm.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
    fitted(whole, captions(photos), tmp_path, max_steps=4)
    assert whole.adapter.state_dict()["adapter.0.weight"].abs().sum() > 0
    fitted(resumed, captions(photos), tmp_path, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    fitted(fresh, captions(photos), tmp_path, max_steps=4, resume=tmp_path / "a.ckpt")
    for name, value in whole.adapter.state_dict().items():
        assert torch.equal(value, fresh.adapter.state_dict()[name])
    with pytest.raises(SettingError, match=r"llm_config.*was learned with"):
        fitted(aligner(llm), captions(photos), tmp_path, max_steps=4, resume=tmp_path / "a.ckpt")


def test_backprop_goes_through_weights_in_eight_bits_and_not_through_activations(llm):
    assert aligner(llm, llm_kwargs=WEIGHTS, strategy=Backprop(), relative_sigma=0.0).loss.differentiable
    with pytest.raises(SettingError, match="has no derivative, since autograd cannot differentiate its quantised"):
        aligner(llm, llm_kwargs=ACTIVATIONS, strategy=Backprop(), relative_sigma=0.0)


def test_it_is_compiled_as_one_graph(llm, monkeypatch):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    loss = CaptionLoss(load_language_model(llm, **WEIGHTS)[0])
    z, ids = torch.randn(2, 32), PaddedTargets.of([torch.tensor([3, 4, 5]), torch.tensor([6])])
    with torch.no_grad():
        torch.testing.assert_close(loss.compiled()(z, ids), loss(z, ids))
    assert len(graphs) == 1


def causal_lm(llm: str, kwargs: dict[str, Any], kind: str, strategy: Any) -> ForwardCausalLM:
    torch.manual_seed(0)
    return ForwardCausalLM(model_name=llm, model_kwargs=kwargs, target={"kind": kind}, strategy=strategy)


@pytest.mark.parametrize(("kind", "strategy"), [("lora", LikelihoodRatio), ("norm", Backprop), ("prompt", MeZO)])
def test_what_is_not_quantised_learns_and_is_restored(llm, tmp_path, kind, strategy):
    ids = torch.arange(24).view(4, 6) % 15
    data = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    first = causal_lm(llm, WEIGHTS, kind, strategy())
    before = {n: p.detach().clone() for n, p in first.named_parameters() if p.requires_grad}
    trainer = Trainer(max_epochs=2, **quiet)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    learned = {n: p.detach().clone() for n, p in first.named_parameters() if p.requires_grad}
    assert any(not torch.equal(p, before[n]) for n, p in learned.items())
    again = causal_lm(llm, WEIGHTS, kind, strategy())
    Trainer(max_epochs=2, **quiet).fit(again, data, ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(dict(again.named_parameters())[n], p) for n, p in learned.items())
    with pytest.raises(SettingError, match="belongs to other weights"):
        Trainer(max_epochs=2, **quiet).fit(causal_lm(llm, {}, kind, strategy()), data, ckpt_path=tmp_path / "a.ckpt")


def test_what_cannot_learn_is_refused(llm):
    with pytest.raises(SettingError, match=r"quantised .* Train lora, prompt, prefix, norm or bias there"):
        causal_lm(llm, WEIGHTS, "full", MeZO())
    message = r"model\.strategy = 'LikelihoodRatio': cannot compute the derivatives.*Take MeZO.*Int8WeightOnlyConfig"
    with pytest.raises(SettingError, match=message):
        causal_lm(llm, ACTIVATIONS, "lora", LikelihoodRatio())
    for kind, strategy in (("prompt", LikelihoodRatio()), ("lora", MeZO())):  # nothing in the model is differentiated
        assert causal_lm(llm, ACTIVATIONS, kind, strategy).target_settings.kind == kind


@pytest.mark.parametrize("written", ["int8_weight_only", {"default": {"_type": "Int9Config", "_data": {}}}])
def test_another_form_of_the_setting_is_refused(llm, written):
    with pytest.raises(SettingError, match="cannot be loaded: "):
        load_language_model(llm, quantization_config={"quant_method": "torchao", "quant_type": written})
