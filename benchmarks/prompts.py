"""``python -m benchmarks.prompts``: class texts as a tree, beside one padded or trimmed sequence for each class.

The text tower has the sizes of CLIP's ViT-B/32 and random weights; the names are the first of ImageNet's. Times are
those of the processor. ``--memory`` measures memory instead, in processes of their own: what they hold at their peak
beyond the model, in the features of all classes for ``--draws`` prompts, and in a plain pass of the text tower over the
largest sequences that these are cut into.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Record, Spread, alternate, at_least, command, finish, table
from benchmarks.memory import peak_in_a_process
from flops_lightning.network.memory import held
from flops_lightning.prompts import ClassTexts
from flops_lightning.prompts.class_texts import TOKENS_AT_ONCE

TOWER = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}  # not run
TEMPLATE = "a photo of a {}."
TOKENS = 12


def model(classes: int) -> tuple[Any, ClassTexts]:
    import open_clip

    torch.manual_seed(0)
    clip: Any = open_clip.CLIP(embed_dim=512, vision_cfg=VISION, text_cfg=TOWER).eval()
    return clip, ClassTexts(clip, open_clip.IMAGENET_CLASSNAMES[:classes], TEMPLATE, doubled_names=True)


@torch.no_grad()
def measure(classes: int, *, rounds: int) -> Record:
    import open_clip

    clip, texts = model(classes)
    names, prompt = texts.names, texts.words(TOKENS)
    rows = [TEMPLATE.replace("{}", name).replace("a photo of a", "X " * (TOKENS - 1) + "X") for name in names]
    ids = open_clip.tokenize(rows)
    longest = int((ids != 0).sum(1).max())

    def of_rows(length: int) -> Tensor:
        parts = []
        for some in ids[:, :length].split(64):
            x = clip.token_embedding(some)
            x[:, 1 : 1 + TOKENS] = prompt
            x = clip.transformer(x + clip.positional_embedding[:length], attn_mask=clip.attn_mask[:length, :length])
            parts.append(clip.ln_final(x)[torch.arange(len(some)), some.argmax(1)] @ clip.text_projection)
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    found, expected = texts.encode(prompt[None])[0], of_rows(77)
    runs = {"tree": lambda: texts.encode(prompt[None]), "padded": lambda: of_rows(77),
            "trimmed": lambda: of_rows(longest)}  # fmt: skip
    timed = alternate(runs, rounds=rounds, clock=time.process_time)
    return {
        "classes": len(names), "longest": longest, "padded": timed.ratio("padded", "tree"),
        "trimmed": timed.ratio("trimmed", "tree"), "difference": float((found - expected).abs().max()),
    }  # fmt: skip


@torch.no_grad()
def peak(what: str, classes: int, draws: int) -> float:
    """MiB at the peak of ``alone`` (the model), ``chunk`` (of plain inference) or ``draw``."""
    torch.set_num_threads(1)
    clip, texts = model(classes)
    prompts = texts.words(TOKENS).expand(draws, -1, -1).clone()
    if what == "chunk":
        length = max(1 + TOKENS + tokens.stop - tokens.start for tokens, _ in texts.sequences())
        x = torch.zeros(min(draws, max(1, TOKENS_AT_ONCE // length)), length, TOWER["width"])
        clip.transformer(x, attn_mask=torch.full((length, length), -torch.inf).triu(1))
    elif what == "draw":
        texts.encode(prompts)
    return held("VmHWM") or 0.0


def memory(classes: int, draws: int, *, rounds: int) -> Record:
    shared = ("--classes", str(classes), "--draws", str(draws))
    found: dict[str, list[float]] = {what: [] for what in ("alone", "chunk", "draw")}
    for _ in range(rounds):
        for what, values in found.items():
            values.append(peak_in_a_process("benchmarks.prompts", "--one", what, *shared))
    alone, chunk, draw = (Spread.of(values, tails=0) for values in found.values())
    more = {"chunk": chunk.median - alone.median, "draw": draw.median - alone.median}
    features = draws * classes * TOWER["width"] * 4 / 2**20
    return {"classes": classes, "draws": draws, "features": features, **more, "ratio": more["draw"] / more["chunk"]}


MEMORY = {
    "classes": "{classes}", "draws": "{draws}", "inference of the largest chunk, MiB": "{chunk:.0f}",
    "all draws, MiB": "{draw:.0f}", "their features alone, MiB": "{features:.0f}", "ratio": "{ratio:.2f}",
}  # fmt: skip
COLUMNS = {
    "classes": "{classes}", "padded to 77 / tree": "{padded:.1f}", "trimmed to the longest / tree": "{trimmed:.1f}",
    "longest": "{longest}", "largest difference": "{difference:.1e}",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = command("benchmarks.prompts", __doc__, rounds=3)
    parser.add_argument("--classes", type=int, default=1000, help="number of names (default 1000)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--draws", type=at_least(1), default=1, help="prompts whose memory is measured (default 1)")
    parser.add_argument("--one", choices=("alone", "chunk", "draw"), help=argparse.SUPPRESS)  # a child process
    options = parser.parse_args(argv)
    if options.one:
        print(peak(options.one, options.classes, options.draws))
        return
    if options.memory:
        records = [memory(options.classes, options.draws, rounds=options.rounds)]
        print(table(MEMORY, records))
    else:
        torch.set_num_threads(1)
        records = [measure(options.classes, rounds=options.rounds)]
        print(table(COLUMNS, records))
    finish(options, records)


if __name__ == "__main__":
    main()
