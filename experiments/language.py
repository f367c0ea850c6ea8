"""``python -m experiments.language TABLE --model DIR --captions FILE --output DIR``: a language model learns captions.

``ForwardCausalLM`` learns the captions of photos: 240 photos to learn from, 60 held out. 60 steps of 16 captions.

- ``targets``: held-out loss and what a step costs, by target and method.
- ``cosines``: of estimates with the exact gradient, at the start.
- ``rates``: held-out losses by learning rate, of 40 of the 240 photos after two thirds of the steps. A row is
  ``target: method, rate``, and ``--names`` makes more of them where the best lies at an edge.

Likelihood ratios take 20 queries at two groups of layers, the top layer and the head (LoRA: at the three groups of
layers; a prompt: at the prompt). Each seed draws batches and noise. A result is a line of ``TABLE.jsonl``; those that
are there are not made again. Prints the table.
"""

import argparse
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from experiments.rows import study_options, table
from flops_lightning.datamodules.caption_files import read_entries
from flops_lightning.language import encode, pack
from flops_lightning.strategies import SPSA, Backprop, LikelihoodRatio, MeZO
from flops_lightning.tasks import ForwardCausalLM

STEPS, SIZE, POOL, HELD_OUT, CHOSEN_ON, BATCHES = 60, 16, 128, 60, 40, 4
TARGETS: dict[str, dict[str, Any]] = {
    "full": {"target": {"untie": True}, "freeze": ["model.embed_tokens.*"]},
    "lora": {"target": {"kind": "lora", "rank": 8, "alpha": 16.0, "modules": ["q_proj", "v_proj", "up_proj"]}},
    "prompt": {"target": {"kind": "prompt", "tokens": 8}},
}
SITES = {
    "full": [["model.embed_tokens", "model.layers.1"], ["model.layers.2", "model.layers.3"], ["model.layers.4"],
             ["model.norm", "lm_head"]],
    "lora": [["model.layers.0", "model.layers.1"], ["model.layers.2", "model.layers.3"], ["model.layers.4"]],
    "prompt": [["prompt"]],
}  # fmt: skip
RATES = {
    "full": {"backprop": 1e-3, "lr": 3e-4, "spsa": 1e-3, "mezo": 1e-3, "mezo_equal": 3e-4},
    "lora": {"backprop": 1e-2, "lr": 3e-3, "mezo_equal": 9e-4},
    "prompt": {"backprop": 0.3, "lr": 0.1, "mezo_equal": 0.09},
}
"""Of Adam, chosen by the table ``rates``."""
COSINES = ("full: lr", "full: spsa", "full: spsa_sites", "full: mezo", "full: mezo_20", "lora: lr", "prompt: lr")
GRID = (0.3, 1.0, 3.0)


class Problem:
    """A model with a target, and captions as token ids; ``choosing``: measure on photos of the training part."""

    def __init__(self, options: argparse.Namespace, target: str, seed: int, *, choosing: bool = False) -> None:
        torch.manual_seed(seed)
        self.options, self.target, self.seed, self.choosing = options, target, seed, choosing
        self.task = ForwardCausalLM(model_name=str(options.model), **TARGETS[target])

    @cached_property
    def captions(self) -> tuple[list[Any], list[Any]]:
        entries = read_entries(self.options.captions, all_captions=True)
        order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0)).tolist()
        held, rest = order[:HELD_OUT], order[HELD_OUT:]
        if self.choosing:
            held, rest = rest[:CHOSEN_ON], rest[CHOSEN_ON:]

        def encoded(places: Sequence[int]) -> list[Any]:
            return [encode(self.task.tokenizer, "", [text]) for i in places for text in entries[i].captions]

        return encoded(rest), encoded(held)

    def batches(self, steps: int) -> Any:
        """Captions in a new order each epoch, those of a batch of about one length."""
        generator, texts, rows = torch.Generator().manual_seed(self.seed), self.captions[0], list[list[int]]()
        for _ in range(steps):
            if not rows:
                order = torch.randperm(len(texts), generator=generator).tolist()
                for first in range(0, len(order) - POOL + 1, POOL):
                    pool = sorted(order[first : first + POOL], key=lambda i: texts[i].tokens)
                    rows += [pool[i : i + SIZE] for i in range(0, POOL, SIZE)]
                rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            yield pack([texts[i] for i in rows.pop()], branching=False)

    @torch.no_grad()
    def held_out(self) -> float:
        texts = self.captions[1]
        parts = (pack(texts[i : i + 50], branching=False) for i in range(0, len(texts), 50))
        return float(torch.cat([self.task.loss(self.task(inputs), targets) for inputs, targets in parts]).mean())

    def strategy(self, method: str) -> Any:
        own: dict[str, Any] = {"seed": self.seed, "chunk_rows": 320}
        if method == "backprop":
            return Backprop()
        if method.startswith("mezo"):
            return MeZO(sigma=1e-3, queries=20 if method == "mezo_20" else 2, **own)

        def sites(sigma: float) -> list[dict[str, Any]]:
            places = [["model.embed_tokens", "lm_head"]] if method == "spsa" else SITES[self.target]
            return [{"stages": stages, "sigma": sigma, "queries_per_sample": 20} for stages in places]

        if method.startswith("spsa"):
            return SPSA(sites=sites(1e-3), layout="factored", **own)
        return LikelihoodRatio(sites=sites(0.01 if self.target == "prompt" else 0.03), **own)

    def gradient(self, strategy: Any, batch: Any) -> Tensor:
        """``(d,)`` of one batch, by ``strategy``."""
        self.task.zero_grad()
        strategy.estimate(strategy.clean_pass(*batch))
        own = self.task.network.trainable().values()
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in own])

    def cosine(self, method: str) -> dict[str, float]:
        """Mean over the first batches, at the start."""
        strategy, exact = self.strategy(method), Backprop()
        for each in (strategy, exact):
            each.bind(self.task.network, self.task.loss)
        seen = [
            torch.cosine_similarity(self.gradient(strategy, batch), self.gradient(exact, batch), dim=0)
            for batch in self.batches(BATCHES)
        ]
        passes = strategy.meter.total().forward_equivalents / SIZE / BATCHES
        return {"cosine": float(torch.stack(seen).mean()), "passes": passes}

    def run(self, method: str, rate: float) -> dict[str, float]:
        """Train; ``passes`` are forward-equivalents of a sample and step, ``seconds`` those of the processor."""
        strategy, steps = self.strategy(method), STEPS * 2 // (3 if self.choosing else 2)
        if method == "mezo_equal":
            steps = round(steps * self.cosine("lr")["passes"] / 2)
        strategy.bind(self.task.network, self.task.loss)
        optimizer = torch.optim.Adam(self.task.network.trainable().values(), lr=rate)
        start = time.process_time()
        for batch in self.batches(steps):
            self.gradient(strategy, batch)
            optimizer.step()
        seconds, passes = time.process_time() - start, strategy.meter.total().forward_equivalents / SIZE / steps
        return {"loss": self.held_out(), "steps": steps, "passes": passes, "seconds": seconds / steps}


def targets(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    target, method = name.split(": ")
    problem = Problem(options, target, seed)
    return {"loss": problem.held_out()} if method == "start" else problem.run(method, RATES[target][method])


def cosines(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    target, method = name.split(": ")
    return Problem(options, target, seed).cosine(method)


def rates(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    run, rate = name.split(", ")
    target, method = run.split(": ")
    return Problem(options, target, seed, choosing=True).run(method, float(rate))


NAMES = [f"{target}: {method}" for target, methods in RATES.items() for method in methods]
TABLES = {
    "targets": (targets, ["full: start", *NAMES, "prompt: start"]), "cosines": (cosines, list(COSINES)),
    "rates": (
        rates, [f"{t}: {m}, {r * f:g}" for t, methods in RATES.items() for m, r in methods.items() for f in GRID],
    ),
}  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    files = {"model": "folder of the language model", "captions": "JSON file of captioned photos"}
    print(table(study_options(__doc__, TABLES, files, args), TABLES))


if __name__ == "__main__":
    main()
