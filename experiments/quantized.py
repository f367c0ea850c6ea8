"""``python -m experiments.quantized``: a frozen language model in fewer bits, as the loss of an adapter before it.

``losses``: captions' losses beside float32's, their rounding, estimates by likelihood ratios at the study's sigma on
the gradient of the model in float32, time and memory. ``sees``: what an adapter learns through it, as in
:mod:`experiments.alignment`.
"""

import argparse
import io
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.alignment import RATES, STEPS, seconds_of, trained
from experiments.alignment_problem import RELATIVE_SIGMA, TOKENS, Problem
from experiments.caption_costs import FOUR, slopes
from experiments.rows import resumed
from experiments.tables import markdown
from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss, load_language_model
from flops_lightning.language.loss_noise import loss_noise
from flops_lightning.suffix_loss import PaddedTargets

CAPTIONS, ROUNDS, NOISE_ROWS, SIZE = 64, 5, 16, 0.28
"""Captions of a seed, repetitions of a time, rows of a measured noise, root mean square of the vectors."""
NARROW = 0.03
"""Width at which rounding is measured, in units of ``SIZE``: where curvature does not count."""


def torchao(form: str) -> dict[str, Any]:
    written = {"quant_method": "torchao", "quant_type": {"default": {"_type": form, "_version": 2, "_data": {}}}}
    return {"quantization_config": written}


TORCH = "weights and activations in int8, torch"
"""``torch.ao.quantization.quantize_dynamic``: one scale for all rows of a chunk."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "weights in int8": torchao("Int8WeightOnlyConfig"),
    "weights and activations in int8": torchao("Int8DynamicActivationInt8WeightConfig"),
    TORCH: {},
}


def loaded(llm: str, precision: str) -> tuple[Any, Any]:
    """The model in a precision, and its tokenizer."""
    model, tokenizer = load_language_model(llm, **{"dtype": "float32", **PRECISIONS[precision]})
    if precision == TORCH:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants torchao in its place
            frozen = deepcopy(model).requires_grad_(False)
            model = torch.ao.quantization.quantize_dynamic(frozen, {nn.Linear}, dtype=torch.qint8)
    return model, tokenizer


def saved_mib(model: nn.Module) -> float:
    """Size of the weights in a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 2**20


def seconds_beside(run: Callable[[], object], beside: Callable[[], object]) -> float:
    """Processor time over that of another, run in turns: the median."""
    return statistics.median(seconds_of(run) / seconds_of(beside) for _ in range(ROUNDS))


def autograd_cosine(exact: CaptionLoss, own: CaptionLoss, z: Tensor, captions: PaddedTargets) -> float:
    """Of two models' gradients at the vectors, mean over captions; 0 where autograd has none."""
    at = z.clone().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that one of them is not to be trusted
        sums = (loss(at, captions).sum() for loss in (exact, own))
        right, seen = (torch.autograd.grad(each, at, allow_unused=True)[0] for each in sums)
    return 0.0 if seen is None else float(torch.cosine_similarity(right, seen, dim=1).mean())


@dataclass
class Losses:
    """What the table ``losses`` measures; ``draws`` estimates are behind a slope."""

    llm: str
    captions: Path
    number: int = CAPTIONS
    draws: int = 30
    sigma: float = RELATIVE_SIGMA

    @cached_property
    def reference(self) -> tuple[Any, Any]:
        return loaded(self.llm, "float32")

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.reference[1](list(texts), add_special_tokens=False)["input_ids"]
        return found

    def batch(self, seed: int) -> tuple[Tensor, PaddedTargets]:
        entries = json.loads(self.captions.read_text())
        texts = [text for entry in entries for text in entry.get("captions", [entry["conversations"][-1]["value"]])]
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(texts), generator=generator)[: self.number].tolist()
        captions = PaddedTargets.of(
            [torch.tensor(each) for each in sorted(self.ids([texts[i] for i in some]), key=len)]
        )
        width = self.reference[0].get_input_embeddings().weight.shape[1]
        return SIZE * torch.randn(len(captions), TOKENS * width, generator=generator), captions

    def row(self, name: str, seed: int) -> dict[str, Any]:
        model = loaded(self.llm, name)[0]
        whole, loss = (CaptionLoss(each, visual_tokens=TOKENS) for each in (self.reference[0], model))
        z, captions = self.batch(seed)
        with torch.no_grad():
            exact, own = whole(z, captions), loss(z, captions)
            few = torch.arange(min(NOISE_ROWS, len(z)))
            one = torch.cat([loss(z[i : i + 1], captions.take(i[None])) for i in few])
            ratio = seconds_beside(lambda: loss(z, captions), lambda: whole(z, captions))
        noise = loss_noise(loss, z[few], captions.take(few), NARROW * SIZE)
        found = {
            "loss": float(own.mean()),
            "mean difference": float((own - exact).mean()),
            "rms difference": float((own - exact).square().mean().sqrt()),
            "alone, rms difference": float((one - own[few]).square().mean().sqrt()),
            "rounding": noise.rounding,
            "signal": noise.signal,
            "autograd's cosine": autograd_cosine(whole, loss, z[few], captions.take(few)),
            "backprop": float(loss.differentiable),
            "time": ratio,
            "MiB": saved_mib(model),
        }
        try:
            ids, beside = self.ids(FOUR), self.reference[0]
            found |= slopes(model, ids, draws=self.draws, seed=seed, sigma=self.sigma, beside=beside)
        except SettingError as refusal:
            print(name, refusal)
        return {"found": found}


@dataclass
class Sight(Problem):
    """The study's problem before a model in a precision."""

    precision: str = "float32"

    @cached_property
    def language_model(self) -> tuple[Any, Any]:
        return loaded(self.llm, self.precision)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.quantized", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", choices=("losses", "sees"))
    parser.add_argument("--llm", required=True, help="a language model, by name or folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--captions", type=Path, help="losses: a file in LLaVA's format")
    parser.add_argument("--number", type=int, default=CAPTIONS, help="losses: captions of a seed")
    parser.add_argument("--draws", type=int, default=30, help="losses: estimates behind a slope")
    parser.add_argument("--sigma", type=float, default=RELATIVE_SIGMA, help="of the noise, in the vectors' size")
    parser.add_argument("--encoder", help="sees: weights of the small ViT")
    parser.add_argument("--root", help="sees: class folders of CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="precisions")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.table == "losses":
        make = Losses(options.llm, options.captions, options.number, options.draws, options.sigma).row
    else:

        def make(name: str, seed: int) -> dict[str, Any]:
            problem = Sight(options.llm, options.encoder, options.root, options.output / "features", seed)
            problem.precision, problem.relative_sigma = name, options.sigma
            found, losses = trained(problem, problem.adapter(), "lr 60", rates=RATES, steps=STEPS)
            return {"found": found, "losses": losses}

    lines = resumed(options.output / f"{options.table}.jsonl", options.names, options.seeds, make)
    columns = dict.fromkeys(column for line in lines for column in line["found"])
    cells = []
    for name in dict.fromkeys(line["name"] for line in lines):
        rows = [line["found"] for line in lines if line["name"] == name]
        values = ([row[column] for row in rows if column in row] for column in columns)
        cells.append([name, str(len(rows)), *map(cell, values)])
    print(markdown(["", "seeds", *columns], cells))


def cell(values: Sequence[float]) -> str:
    """The mean, and the least and the most in brackets."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.3g} ({min(values):.3g} - {max(values):.3g})"


if __name__ == "__main__":
    main()
