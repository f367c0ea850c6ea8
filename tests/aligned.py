"""A tiny language model with a tokenizer in a folder, captioned photos, and the task that aligns a tiny ViT with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from flops_lightning.datamodules import CaptionDataModule
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.tasks import AdapterAlignment
from tests.datamodules.photo_folders import photo, write
from tests.digits import quiet_trainer

transformers = pytest.importorskip("transformers", reason="language models need the extra llm")

WORDS = ["<unk>", "<s>", "</s>", "a", "red", "green", "photo", "of", "ship", "truck", "big", ".", "what", "is", "it"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
MODEL: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224", "encoder_kwargs": VIT, "visual_tokens": 2, "relative_sigma": 0.1,
}  # fmt: skip


def llm_folder(folder: Path, words: Sequence[str] = WORDS, **sizes: Any) -> str:
    """A random Llama of two layers, one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    usual = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "initializer_range": 0.3, **SIZES}
    config = transformers.LlamaConfig(bos_token_id=1, eos_token_id=2, **{**usual, **sizes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    split = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=split, **special).save_pretrained(folder)
    return str(folder)


def photo_folder(root: Path, photos: int = 24) -> Path:
    """Photos with captions of 4 to 6 words, in LLaVA's form."""
    entries = []
    for n in range(photos):
        write(root / f"p{n}.jpg", photo(n % 10, n % 9))
        caption = f"a photo of {('a big', 'a', '')[n % 3]} {('ship', 'truck')[n % 2]}"
        said = [{"from": "human", "value": "<image> what is it"}, {"from": "gpt", "value": " ".join(caption.split())}]
        entries.append({"id": n, "image": f"p{n}.jpg", "conversations": said})
    (root / "captions.json").write_text(json.dumps(entries))
    return root


def class_folders(root: Path, photos: int = 10) -> Path:
    for label, name in enumerate(("big_ship", "truck")):
        for n in range(photos):
            write(root / name / f"{n}.jpg", photo(label, n % 9))
    return root


def captions(root: Path, **settings: Any) -> CaptionDataModule:
    usual = {"captions": str(root / "captions.json"), "val_share": 0.25, "test_share": 0.25, "batch_size": 6}
    return CaptionDataModule(root=str(root), **{**usual, **settings})


def aligner(llm: Any, **settings: Any) -> AdapterAlignment:
    """The same whenever it is made."""
    pl.seed_everything(0, verbose=False)
    learns = {"strategy": LikelihoodRatio(seed=0), "optimizer": {"lr": 0.05, "bias_lr_factor": 3.0}}
    return AdapterAlignment(llm=llm, **{**MODEL, **learns, **settings})


def fitted(task: AdapterAlignment, data: CaptionDataModule, folder: Path, *callbacks: Any, **trainer: Any) -> Any:
    resumed = trainer.pop("resume", None)
    usual = {"max_epochs": 2, "default_root_dir": folder, "logger": False, "num_sanity_val_steps": 0}
    made = quiet_trainer(*callbacks, **{**usual, **trainer})
    made.fit(task, data, ckpt_path=resumed)
    return made
