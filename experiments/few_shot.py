"""``python -m experiments.few_shot TABLE --model DIR --sentences FILE --output DIR``: a language model tells reviews.

``ForwardCausalLM`` learns from 16 negative and 16 positive sentences of film reviews, as ``{text} It was`` with the
choices ``terrible`` and ``great``: LoRA of rank 8 at the query and value projections, 30 steps of 8, Adam.

- ``methods``: accuracy and loss on 200 other sentences, and what a step cost.
- ``cosines``: of estimates with the exact gradient at the start, in each third of the layers.
- ``rates``: losses by learning rate, of 100 sentences; these and the 32 to learn from are in no other table. A row is
  ``target: method, rate``, and ``--names`` makes more of them where the best lies at an edge.

``top``: LoRA in the top third of the layers; a likelihood ratio has one site there, at their output. ``all``: LoRA in
all layers, and a site at the output of each third. 20 queries a site; MeZO has two in all, and ``mezo x4`` takes four
times the steps. A seed draws the sentences to learn from, batches and noise. A result is a line of ``TABLE.jsonl``;
those that are there are not made again. Prints the table.

The sentences are those of Hutto and Gilbert (ICWSM 2014), ``movieReviewSnippets_GroundTruth.txt``: a line has a number,
the mean rating of some twenty readers from -4 to 4, and the sentence. Positive is above 1, negative below -1.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from experiments.rows import study_options, table
from flops_lightning.datamodules import JsonlTextDataModule
from flops_lightning.language import encode
from flops_lightning.language.models import load_tokenizer
from flops_lightning.strategies import Backprop, LikelihoodRatio, MeZO
from flops_lightning.tasks import ForwardCausalLM

FORM: dict[str, Any] = {"template": "{text} It was", "choices": [" terrible", " great"]}
SHOTS, STEPS, SIZE = 16, 30, 8
TOKENS, TESTED, JUDGED, SET_ASIDE = 20, 100, 50, 50
"""Most tokens of a sentence in the template; sentences of a class to test on, to judge rates on, and to try them on."""
RATES = {"top: backprop": 3e-3, "top: lr": 1e-3, "top: mezo": 27e-3, "top: mezo x4": 9e-3}
"""Of Adam, chosen by the table ``rates``."""
COSINES = ("top: lr", "all: lr", "all: mezo")
GRID = (0.3, 1.0, 3.0)
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def sentences(file: Path, tokenizer: Any) -> list[list[str]]:
    """The short sentences, clearly negative and clearly positive ones, each once and in a fixed random order."""
    label_of: dict[str, int] = {}
    for line in file.read_text(encoding="utf-8").split("\n"):
        _, rating, text = line.split("\t") if line.strip() else ("", "0", "")
        if abs(float(rating)) > 1:
            label_of.setdefault(text.strip(), int(float(rating) > 0))
    prompts = {text: FORM["template"].format(text=text) for text in label_of}
    short = [text for text, prompt in prompts.items() if encode(tokenizer, prompt, FORM["choices"]).tokens <= TOKENS]
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(0)).tolist()
    return [[short[i] for i in order if label_of[short[i]] == label] for label in (0, 1)]


def parts(file: Path, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Entries to ``test`` on, to judge rates on and to choose them by, and to ``learn`` from; short ones first."""
    ends = {"test": TESTED, "judge": TESTED + JUDGED, "choose": TESTED + JUDGED + SET_ASIDE, "learn": None}
    found, first = dict[str, list[dict[str, Any]]](), 0
    by_label = sentences(file, tokenizer)
    for name, end in ends.items():
        own = [{"text": text, "label": label} for label, texts in enumerate(by_label) for text in texts[first:end]]
        found[name], first = sorted(own, key=lambda entry: len(entry["text"])), end or 0
    return found


def written(options: argparse.Namespace) -> Mapping[str, str]:
    """Files with the entries of each part."""
    folder = options.output / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in parts(options.sentences, load_tokenizer(str(options.model), setting="--model")).items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return {file.stem: str(file) for file in folder.glob("*.jsonl")}


class Problem:
    """A model with LoRA in some layers; ``choosing``: measure on the sentences that are set aside."""

    def __init__(
        self, options: argparse.Namespace, name: str, seed: int, rate: float, *, choosing: bool = False
    ) -> None:
        seed_everything(seed, verbose=False)
        self.options, self.seed, self.rate, self.choosing = options, seed, rate, choosing
        self.target, self.method = name.split(": ")

    @cached_property
    def thirds(self) -> list[tuple[int, int]]:
        """First layer of each third that learns, and the one after its last."""
        layers = json.loads((self.options.model / "config.json").read_text())["num_hidden_layers"]
        thirds = list(pairwise([0, layers // 3, 2 * layers // 3, layers]))
        return thirds[2:] if self.target == "top" else thirds

    @cached_property
    def task(self) -> ForwardCausalLM:
        layers = range(self.thirds[0][0], self.thirds[-1][1])
        modules = [f"layers.{i}.self_attn.{name}" for i in layers for name in ("q_proj", "v_proj")]
        lora: Any = {"kind": "lora", "rank": 8, "alpha": 16.0, "modules": modules}
        return ForwardCausalLM(
            model_name=str(self.options.model), target=lora, objective="choice", strategy=self.strategy,
            optimizer={"name": "adam", "lr": self.rate},
        )  # fmt: skip

    @cached_property
    def strategy(self) -> Any:
        own: dict[str, Any] = {"seed": self.seed, "chunk_rows": 80}
        if self.method == "backprop":
            return Backprop()
        if self.method.startswith("mezo"):
            return MeZO(sigma=1e-2, **own)
        sites = [
            {"stages": [f"model.layers.{first}", f"model.layers.{end - 1}"], "sigma": 0.3, "queries_per_sample": 20}
            for first, end in self.thirds
        ]
        return LikelihoodRatio(sites=sites, **own)

    def data(self) -> JsonlTextDataModule:
        files = self.options.files
        learn, test = ("choose", "judge") if self.choosing else ("learn", "test")
        return JsonlTextDataModule(
            train_file=files[learn], test_file=files[test], shots=SHOTS, split_seed=self.seed, batch_size=SIZE,
            tokenizer=self.task.tokenizer, **FORM,
        )  # fmt: skip

    def run(self) -> dict[str, float]:
        """Train and test; ``passes`` are forward-equivalents of a sentence and step, ``seconds`` of the processor."""
        more = self.method.partition(" x")[2]
        steps = 0 if self.method == "start" else STEPS * int(more or 1)
        data, trainer = self.data(), Trainer(accelerator="cpu", max_steps=steps, **QUIET)
        start = time.process_time()
        if steps:
            trainer.fit(self.task, data)
        seconds, passes = time.process_time() - start, self.strategy.meter.total().forward_equivalents
        (tested,) = trainer.test(self.task, data, verbose=False)
        found = {"accuracy": tested["test/accuracy"], "loss": tested["test/loss"], "steps": steps}
        return {**found, "passes": passes / SIZE / steps, "seconds": seconds / steps} if steps else found

    def gradient(self, strategy: Any, batch: Any) -> dict[str, Tensor]:
        self.task.zero_grad()
        strategy.estimate(strategy.clean_pass(*batch))
        return {n: p.grad.flatten().clone() for n, p in self.task.network.trainable().items() if p.grad is not None}

    def cosine(self) -> dict[str, float]:
        """Of the first batch, by layers."""
        data = self.data()
        Trainer(accelerator="cpu", limit_test_batches=1, **QUIET).test(self.task, data, verbose=False)  # they meet
        batch, exact = next(iter(data.train_dataloader())), Backprop()
        exact.bind(self.task.network, self.task.loss)
        found, right = (self.gradient(each, batch) for each in (self.strategy, exact))
        spans = {f"layers {first} to {end - 1}": range(first, end) for first, end in self.thirds}
        spent, result = self.strategy.meter.total().forward_equivalents, dict[str, float]()
        for span, layers in {**spans, "all": range(self.thirds[-1][1])}.items():
            names = [n for n in right if int(n.partition(".layers.")[2].partition(".")[0]) in layers]
            ours, exactly = (torch.cat([gradients[n] for n in names]) for gradients in (found, right))
            result[span] = float(torch.cosine_similarity(ours, exactly, dim=0))
        return {**result, "passes": spent / SIZE}


def methods(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    return Problem(options, name, seed, RATES.get(name, 1.0)).run()


def cosines(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    return Problem(options, name, seed, 1.0).cosine()


def rates(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    run, rate = name.split(", ")
    return {"loss": Problem(options, run, seed, float(rate), choosing=True).run()["loss"]}


TABLES = {
    "methods": (methods, ["top: start", *RATES]), "cosines": (cosines, list(COSINES)), "rates": (
        rates, [f"{name}, {rate * factor:g}" for name, rate in RATES.items() for factor in GRID],
    ),
}  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    files = {"model": "folder of the language model", "sentences": "movieReviewSnippets_GroundTruth.txt"}
    options = study_options(__doc__, TABLES, files, args)
    options.files = written(options)
    print(table(options, TABLES))


if __name__ == "__main__":
    main()
