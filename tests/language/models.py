"""Tiny random language models, and texts for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

transformers = pytest.importorskip("transformers", reason="language models need the extra llm")

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(family: str = "Llama", attention: str = "sdpa", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    return getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation=attention).eval()


def tiny_gpt2(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, **settings}
    config = transformers.GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)
    return transformers.GPT2LMHeadModel(config).eval()


def saved_opt(folder: Path) -> str:
    """An OPT with random weights and a tokenizer as OPT's: `` terrible`` and `` great`` are a token each."""
    sizes = {"vocab_size": 280, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    transformers.OPTForCausalLM(transformers.OPTConfig(num_attention_heads=2, **sizes)).save_pretrained(folder)
    merges = ["Ġ t", "e r", "Ġt er", "r i", "Ġter ri", "b l", "bl e", "Ġterri ble",
              "Ġ g", "r e", "Ġg re", "a t", "Ġgre at"]  # fmt: skip
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)
