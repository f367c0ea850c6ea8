"""Tiny random language models, and texts for them."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="language models need the extra llm")

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(family: str = "Llama", attention: str = "sdpa", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    return getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation=attention).eval()


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval()
