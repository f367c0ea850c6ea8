"""``python -m experiments.architectures``: one step of forward-only training in a model of every family of timm.

Of each family (a file of ``timm.models``) the model with the smallest-sounding name trains one step: weights are
random, the sites are the default layout with two queries each, batch normalisation is frozen.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from experiments.command_line import StudyParser
from experiments.tables import markdown, write_csv, write_report
from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.site_specs import default_specs
from flops_lightning.tasks import ForwardImageClassifier
from flops_lightning.tasks.backbone import example_images

SMALL = (
    "test", "atto", "femto", "pico", "nano", "zepto", "micro", "xxs", "xxt", "tiny", "xs", "_t_", "_s", "small", "mini",
    "050", "a0", "b0", "34", "68", "121", "10", "14", "18", "26", "s12", "base",
)  # fmt: skip
COLUMNS = ("family", "model", "stages", "seconds", "result")
CLASSES = 5
# The smallest of these families take minutes as they are.
SETTINGS = {
    "deepseek_vit_412m": {"depth": 4, "embed_dim": 64, "num_heads": 2},
    "samvit_base_patch16": {"img_size": 256, "depth": 4, "embed_dim": 64, "num_heads": 2},
}


def smallest(family: str) -> str:
    """The model of a family that sounds smallest."""
    from timm import list_models

    def size(name: str) -> tuple[int, int, str]:
        return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name), name

    return min(list_models(module=family), key=size)


def train_one_step(name: str) -> tuple[int, str]:
    """Number of stages, and ``trained`` or the one line with which the model is refused."""
    try:
        task = ForwardImageClassifier(
            model_name=name, model_kwargs=SETTINGS.get(name), num_classes=CLASSES, batch_norm="frozen"
        )
        sites = [replace(spec, queries_per_sample=2) for spec in default_specs(task.network)]
        strategy = LikelihoodRatio(sites=sites, seed=0)
        strategy.bind(task.network, task.loss)
        images = example_images(task.backbone, task.in_chans, CLASSES)
        strategy.estimate(strategy.clean_pass(images, torch.arange(len(images))))
    except SettingError as error:
        return 0, f"refused: {error}"
    return len(task.network), "trained"


def study(options: argparse.Namespace) -> None:
    import timm  # slow to import

    options.output.mkdir(parents=True, exist_ok=True)
    families = options.families or [family for family in timm.list_modules() if timm.list_models(module=family)]
    rows = []
    for family in families:
        name, start = smallest(family), time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's of deprecated names
            stages, result = train_one_step(name)
        rows.append((family, name, str(stages), f"{time.monotonic() - start:.1f}", result))
        print(*rows[-1], flush=True)
    write_csv(options.output / "architectures.csv", COLUMNS, rows)
    refused = [row for row in rows if row[-1] != "trained"]
    text = f"{len(rows) - len(refused)} of {len(rows)} families of timm {timm.__version__} trained a step.\n"
    write_report(options.output / "architectures.md", text + (markdown(COLUMNS, refused) if refused else ""))


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(__doc__, runs=False)
    parser.add_argument("--families", nargs="+", help="files of timm.models (default: all)")
    parser.run(study, args)


if __name__ == "__main__":
    main()
