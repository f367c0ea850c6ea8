"""A tiny Llama in float64 with random weights, captions for it, and transformers' own loss of one caption."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.suffix_loss import PaddedTargets

WIDTH, VOCABULARY = 16, 50


def tiny_llama(**sizes: Any) -> Any:
    """Two layers, grouped heads, an untied head."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **sizes
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double()


def caption_ids(*lengths: int, padding: int = 0, seed: int = 5) -> PaddedTargets:
    """Random captions of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    return PaddedTargets.of(made, padding=padding)


def one_loss(llm: Any, z: Tensor | None, caption: Tensor, *, bos: int | None = None) -> Tensor:
    """Loss of one caption after ``(k, d)`` vectors, alone in a batch and with a mask of ones; transformers agree."""
    embed = llm.get_input_embeddings()
    before = [embed(torch.tensor([bos]))] if bos is not None else []
    before += [z.to(embed.weight.dtype)] if z is not None else []
    inputs = torch.cat([*before, embed(caption)])[None]
    labels = torch.cat([caption.new_full((inputs.shape[1] - len(caption),), -100), caption])[None]
    mask = torch.ones(inputs.shape[:2], dtype=torch.long)
    told = llm(inputs_embeds=inputs, attention_mask=mask, labels=labels)
    of_token = told.logits[0, -len(caption) - 1 : -1].log_softmax(-1).gather(1, caption[:, None])
    torch.testing.assert_close(-of_token.mean().float(), told.loss.float(), rtol=0, atol=1e-5)  # theirs is float32
    return -of_token.mean()
