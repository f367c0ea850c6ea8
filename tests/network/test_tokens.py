import pytest
import torch
from torch import nn

from flops_lightning.network import stage_network
from flops_lightning.network.tokens import tokenwise_from
from tests.language.models import tiny, tiny_gpt2, transformers


def tiny_opt() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=50, word_embed_proj_dim=16, **sizes)).eval()


@pytest.mark.parametrize(
    ("model", "norm"),
    [(tiny, "model.norm"), (tiny_gpt2, "transformer.ln_f"), (tiny_opt, "model.decoder.final_layer_norm")],
)
def test_tokens_of_language_models_meet_in_attention_last(model, norm):
    inputs = {"input_ids": torch.arange(8).reshape(2, 4)}
    network = stage_network(model().requires_grad_(False), inputs)
    assert network.stages[tokenwise_from(network, inputs)].name == norm


def test_a_network_whose_last_stage_mixes_tokens_has_no_such_stage():
    network = stage_network(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(4, 4, 1)))
    assert tokenwise_from(network, torch.randn(2, 4, 3)) == len(network)


def test_a_network_without_tokens_has_no_such_stage():
    network = stage_network(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert tokenwise_from(network, torch.randn(2, 3)) == len(network)
