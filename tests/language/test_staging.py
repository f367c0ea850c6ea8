import pytest
import torch

from flops_lightning import LikelihoodRatio, stage_network
from flops_lightning.errors import SettingError
from flops_lightning.language import completion, stage_causal_lm, targets_of_labels
from tests.language.models import tiny, tiny_gpt2, transformers

IDS = torch.arange(2 * 23).reshape(2, 23) * 7 % 50


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "settings"), [("Mistral", {"sliding_window": 5}), ("Qwen2", {}), ("Qwen3", {"head_dim": 8})]
)
def test_the_stages_compute_what_the_model_does_at_any_length(family, settings, attention):
    model = tiny(family, attention, **settings)
    network = stage_causal_lm(model)
    assert [stage.name for stage in network.stages] == ["embed", "layers.0", "layers.1", "layers.2", "norm", "head"]
    for ids in (IDS, IDS[:, :9], IDS):
        torch.testing.assert_close(network.run(ids), model(ids).logits, rtol=1e-5, atol=0)
    middle = network.run(network.run({"input_ids": IDS}, stop=2), start=2)
    torch.testing.assert_close(middle, model(IDS).logits, rtol=1e-5, atol=0)


def test_the_stages_of_a_real_model_equal_it_bit_for_bit(shared_data):
    model = transformers.AutoModelForCausalLM.from_pretrained(shared_data("models/stories260k"))
    model.requires_grad_(False)  # its head is tied to the embedding: frozen, that is allowed
    assert torch.equal(stage_causal_lm(model).run(IDS), model(IDS).logits)
    model.requires_grad_(True)
    with pytest.raises(SettingError, match=r"tied across .*embed.*head.* Freeze or untie"):
        stage_causal_lm(model)


def test_a_length_that_validation_saw_first_can_be_differentiated():
    network = stage_causal_lm(tiny())
    with torch.inference_mode():
        network.run(IDS)
    network.run(IDS).sum().backward()
    assert all(p.grad is not None for p in network.module.parameters())


def test_a_model_of_another_layout_is_refused_by_name():
    with pytest.raises(SettingError, match=r"GPT2LMHeadModel.*there is no model\.embed_tokens.*stage_network"):
        stage_causal_lm(tiny_gpt2())


def test_a_model_that_does_more_than_its_stages_is_refused_by_name():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args, **settings):
            output = super().forward(*args, **settings)
            output.logits = output.logits * 1.001
            return output

    with pytest.raises(SettingError, match=r"Scaled.*computes other logits .*by 1\.\de-03"):
        stage_causal_lm(Scaled(tiny().config))


def test_the_same_queries_through_stages_and_through_replay_give_the_same_gradient():
    gradients = []
    for staged in (True, False):
        model = tiny()
        network = stage_causal_lm(model) if staged else stage_network(model, IDS)
        names = [stage.name for stage in network.stages]
        assert len(names) == 6
        sites = [
            {"name": "low", "stages": names[:2], "sigma": 0.01},
            {"name": "top", "stages": [names[2], names[4]], "sigma": 0.01},
            {"name": "head", "stages": names[5:], "sigma": 0.01},
        ]
        strategy = LikelihoodRatio(sites=sites, seed=0)
        strategy.bind(network, completion)
        targets = targets_of_labels(IDS)
        strategy.estimate(strategy.clean_pass({"input_ids": IDS} if staged else IDS, targets))
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
