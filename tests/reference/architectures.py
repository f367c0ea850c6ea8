"""Small float64 networks of four libraries, with inputs of four samples, none of which the package knows by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from flops_lightning.network.staging import StagedNetwork
from tests.reference.networks import call, cross_entropy, normal, shaken


class Problem(NamedTuple):
    """A network, inputs of a batch as it takes them, targets, and a loss of each row."""

    module: nn.Module
    inputs: Any
    targets: Any
    loss: Callable[[Tensor, Any], Tensor] = cross_entropy


LABELS = torch.tensor([0, 1, 2, 3])
WORDS = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(WORDS).index_fill(1, torch.tensor([5]), 0)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(make(), scale=0.05).eval()


def images(size: int) -> Tensor:
    return normal(4, 3, size, size)


def classifier(name: str, size: int, **settings: Any) -> Problem:
    return Problem(build(lambda: timm.create_model(name, num_classes=5, **settings)), images(size), LABELS)


def next_word_loss(output: Tensor, targets: Any) -> Tensor:
    losses = torch.nn.functional.cross_entropy(output[:, :-1].mT, targets["labels"][:, 1:], reduction="none")
    return losses.mean(1)


def language_model(make: Callable[[Any], nn.Module]) -> Problem:
    transformers = pytest.importorskip("transformers", reason="the network is one of transformers")
    words = {"input_ids": WORDS, "attention_mask": MASK}
    return Problem(build(lambda: make(transformers)), words, {"labels": WORDS}, next_word_loss)


def text_classifier(make: Callable[[Any], nn.Module]) -> Problem:
    transformers = pytest.importorskip("transformers", reason="the network is one of transformers")
    return Problem(build(lambda: make(transformers)), {"input_ids": WORDS, "attention_mask": MASK}, LABELS)


def tower(which: str) -> Problem:
    open_clip = pytest.importorskip("open_clip", reason="the network is one of open_clip")
    if which == "image":
        vision = open_clip.transformer.VisionTransformer
        return Problem(build(lambda: vision(16, 8, 16, 3, 2, 2.0, output_dim=5)), images(16), LABELS)
    text = open_clip.transformer.TextTransformer
    return Problem(build(lambda: text(6, 50, 16, 2, 3, output_dim=5)), WORDS, LABELS)


def group_norm(channels: int, **_: Any) -> nn.Module:
    return nn.GroupNorm(2, channels)


SIZES = {"vocab_size": 50, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
ARCHITECTURES: dict[str, Callable[[], Problem]] = {
    "ConvNeXt": lambda: classifier(
        "convnext_atto", 32, depths=(1, 1, 2, 1), dims=(4, 8, 8, 8),
        ls_init_value=0.5,  # with the usual 1e-6 a block's noise hides its gradient
    ),
    "Swin": lambda: classifier(
        "swin_tiny_patch4_window7_224", 32, img_size=32, window_size=2, depths=(1, 1, 2, 1), embed_dim=8,
        num_heads=(1, 1, 2, 2),
    ),
    "EVA-02": lambda: classifier("eva02_tiny_patch14_224", 28, img_size=28, depth=3, embed_dim=16, num_heads=2),
    "MLP-Mixer": lambda: Problem(
        build(lambda: timm.models.mlp_mixer.MlpMixer(5, 16, 3, 4, num_blocks=3, embed_dim=16)), images(16), LABELS
    ),
    "distilled DeiT": lambda: classifier(
        "deit_tiny_distilled_patch16_224", 16, img_size=16, patch_size=8, depth=3, embed_dim=16, num_heads=2
    ),
    "ResNet": lambda: classifier("resnet18", 32, block_args={}, channels=(4, 4, 8, 8), norm_layer=group_norm),
    "PoolFormer": lambda: Problem(
        build(lambda: timm.models.metaformer.MetaFormer(num_classes=5, depths=(1, 1, 2, 1), dims=(4, 8, 8, 8))),
        images(32), LABELS,
    ),
    "torchvision's ViT": lambda: Problem(
        build(lambda: torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 16, num_classes=5)), images(16), LABELS
    ),
    "torchvision's Swin": lambda: Problem(
        build(lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1, 2], [1, 1, 2], [2, 2], num_classes=5)),
        images(32), LABELS,
    ),
    "Llama": lambda: language_model(lambda hf: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))),
    "GPT-2": lambda: frozen_words(language_model(lambda hf: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)))),
    "BERT": lambda: text_classifier(
        lambda hf: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=5))
    ),
    "CLIP's image tower": lambda: tower("image"),
    "CLIP's text tower": lambda: tower("text"),
}  # fmt: skip


def frozen_words(problem: Problem) -> Problem:
    """The same with its embedding of words, which is its head as well, frozen."""
    problem.module.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    return problem


def exact_gradient(problem: Problem, network: StagedNetwork) -> dict[str, Tensor]:
    """By backpropagation through the module as it is, without replay."""
    losses = problem.loss(call(problem.module, problem.inputs), problem.targets)
    named = network.trainable()
    found = torch.autograd.grad(losses.mean(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
