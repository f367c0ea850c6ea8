"""``python -m benchmarks.prompts``: class texts as a tree, beside one padded or trimmed sequence for each class.

The text tower has the sizes of CLIP's ViT-B/32 and random weights; the names are the first of ImageNet's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Record, alternate, command, finish, table
from flops_lightning.prompts import ClassTexts

TOWER = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}  # not run
TEMPLATE = "a photo of a {}."
TOKENS = 12


@torch.no_grad()
def measure(classes: int, *, rounds: int) -> Record:
    import open_clip

    torch.manual_seed(0)
    clip: Any = open_clip.CLIP(embed_dim=512, vision_cfg=VISION, text_cfg=TOWER).eval()
    names = list(dict.fromkeys(map(str.lower, open_clip.IMAGENET_CLASSNAMES)))[:classes]
    texts = ClassTexts(clip, names, TEMPLATE)
    prompt = texts.words(TOKENS)
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
    timed = alternate(runs, rounds=rounds)
    return {
        "classes": len(names), "longest": longest, "padded": timed.ratio("padded", "tree"),
        "trimmed": timed.ratio("trimmed", "tree"), "difference": float((found - expected).abs().max()),
    }  # fmt: skip


COLUMNS = {
    "classes": "{classes}", "padded to 77 / tree": "{padded:.1f}", "trimmed to the longest / tree": "{trimmed:.1f}",
    "longest": "{longest}", "largest difference": "{difference:.1e}",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = command("benchmarks.prompts", __doc__, rounds=3)
    parser.add_argument("--classes", type=int, default=1000, help="number of names (default 1000)")
    options = parser.parse_args(argv)
    records = [measure(options.classes, rounds=options.rounds)]
    print(table(COLUMNS, records))
    finish(options, records)


if __name__ == "__main__":
    main()
