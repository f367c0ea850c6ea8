"""``python -m benchmarks.loading``: does reading photos keep up with the training steps?

Images per second of the training loader, from JPEG files to normalised batches on the CPU, by number of workers, and
how many workers a GPU needs whose step takes so many seconds. The files are in the system's cache after the first,
untimed round: the disk is not in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.arguments import a_number
from benchmarks.timing import alternate

if TYPE_CHECKING:
    from flops_lightning.datamodules import ImageNetDataModule

WIDTH, HEIGHT, QUALITY = 500, 375, 90  # of photos as ImageNet has them, most of them 500 x 375
FADING = 0.2  # by which fine noise is weaker than coarse: a file has 110 kB, as those of ImageNet have on average
LOADED_AT_ONCE = 32  # small enough for several batches a worker; the time an image takes does not depend on it
CLASSES, FOLDERS = 8, 1000  # of the photos written, and of the files that are only looked at


def photo(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """An image ``(HEIGHT, WIDTH, 3)`` of noise at every scale, the coarser the stronger, as in photos."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128, 256, 512):
        grid = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        coarse = Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        total += (np.asarray(coarse, dtype=np.float64) - 127.5) / cells**FADING
    return np.clip(127.5 + total, 0, 255).astype(np.uint8)


def write_photos(root: Path, images: int) -> None:
    """Write JPEG files ``root/train/<class>/<number>.JPEG``, the same ones at every call."""
    from PIL import Image

    for i in range(images):
        folder = root / "train" / f"n{i % min(CLASSES, images):08}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i)).save(folder / f"{i:06}.JPEG", quality=QUALITY)


def link_files(root: Path, files: int) -> None:
    """Make ``root/train/<class>/*``: in each of up to 1000 folders one JPEG and hard links to it, ``files`` in all."""
    from PIL import Image

    folders = min(FOLDERS, files)
    small = Image.new("RGB", (8, 8))
    for i in range(folders):
        folder = root / "train" / f"n{i:08}"
        folder.mkdir(parents=True)
        small.save(folder / "000000.JPEG")
        for j in range(1, len(range(i, files, folders))):
            os.link(folder / "000000.JPEG", folder / f"{j:06}.JPEG")


def rates(
    root: Path,
    workers: Sequence[int],
    *,
    images: int,
    image_size: int,
    augment: bool,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, list[float]]:
    """Images per second in each round, by number of workers; the numbers of workers take turns.

    Args:
        root: Folder with ``train/<class>/*``.
        workers: Processes that load; 0 loads in this one.
        images: Images of a round, spread over the data set; all, where there are fewer.
        image_size: Height and width that they are made to have, in pixels.
        augment: Whether they are cropped at random and mirrored, instead of resized.
        rounds: Timed rounds.
        clock: Seconds. Those of ``time.process_time``, which other jobs on the machine hardly change, are of this
            process alone, so for 0 workers.

    Raises:
        SettingError: There are no such photos, or no rounds.
    """
    from torch.utils.data import Subset

    loaders = {}
    for number in workers:
        data = _photos(root, num_workers=number, image_size=image_size, augment=augment)
        data.setup("fit")
        whole = len(data.train_set)  # type: ignore[arg-type]
        count = min(images, whole)
        data.train_set = Subset(data.train_set, [i * whole // count for i in range(count)])
        loaders[number] = data.train_dataloader()
    times = alternate({str(n): partial(_read, loader) for n, loader in loaders.items()}, rounds=rounds, clock=clock)
    return {number: [count / seconds for seconds in times.seconds[str(number)]] for number in loaders}


def check_rates(root: Path, rounds: int) -> list[float]:
    """Files per second that the check before training looks at, in each round."""
    found = []
    for _ in range(rounds):
        data, start = _photos(root), time.perf_counter()
        parts = data.check()
        found.append(sum(len(part.files) for part in parts.values()) / (time.perf_counter() - start))
    return found


def rate_table(found: Mapping[int, Sequence[float]]) -> str:
    """Markdown: images per second, median and range, by number of workers."""
    lines = ["| workers | images/s, median (min - max) | over one worker |", "|---|---|---|"]
    one = statistics.median(found[1])
    for number, values in sorted(found.items()):
        rate, name = statistics.median(values), number or "0 (in the training process)"
        lines.append(f"| {name} | {rate:.0f} ({min(values):.0f} - {max(values):.0f}) | {rate / one:.2f} |")
    return "\n".join(lines) + "\n"


def need_table(one_worker: float, batch: int, step_seconds: Sequence[float]) -> str:
    """Markdown: images per second that a GPU takes, and how many workers that is.

    Args:
        one_worker: Images per second of one worker.
        batch: Images of a training step on one GPU.
        step_seconds: Seconds of a training step.
    """
    lines = [f"| seconds a step, batch {batch} | images/s needed | workers needed per GPU |", "|---|---|---|"]
    for seconds in step_seconds:
        need = batch / seconds
        lines.append(f"| {seconds:g} | {need:.0f} | {need / one_worker:.1f} |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _parser().parse_args(args)
    torch.set_num_threads(1)  # as in a worker
    with TemporaryDirectory(prefix="photos_") as folder:
        root = options.root
        if root is None:
            root = Path(folder)
            write_photos(root, options.images)
        measure = partial(
            rates, root, images=options.images, image_size=options.image_size, augment=options.augment,
            rounds=options.rounds,
        )  # fmt: skip
        found = measure(sorted({1, *options.workers}))
        (of_a_core,) = measure([0], clock=time.process_time).values()
    print(rate_table(found))
    print(f"In a CPU second: {statistics.median(of_a_core):.0f} images.\n")
    print(need_table(statistics.median(found[1]), options.batch, options.step_seconds))
    if options.check_files:
        with TemporaryDirectory(prefix="files_") as folder:
            link_files(Path(folder), options.check_files)
            rate = statistics.median(check_rates(Path(folder), options.rounds))
        print(f"Check of {options.check_files:,} files: {options.check_files / rate:.1f} s, {rate:,.0f} files/s.")


def _photos(root: Path, *, num_workers: int = 0, image_size: int = 224, augment: bool = False) -> ImageNetDataModule:
    from flops_lightning.datamodules import ImageNetDataModule

    return ImageNetDataModule(
        root=str(root), batch_size=LOADED_AT_ONCE, num_workers=num_workers, image_size=image_size, val_images=0,
        augment=augment, normalization="imagenet",
    )  # fmt: skip


def _read(loader: Sequence[object]) -> None:
    for _ in loader:
        pass


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").partition(": ")[2].partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=summary)
    parser.add_argument("--root", type=Path, help="folder with train/CLASS/*, instead of photos made up for it")
    parser.add_argument("--images", type=a_number, default=256, help="images of a round (default 256)")
    parser.add_argument("--image_size", type=a_number, default=224, help="pixels (default 224)")
    parser.add_argument("--augment", action="store_true", help="crop at random and mirror, instead of resizing")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2; 1 always is in it")
    parser.add_argument("--rounds", type=a_number, default=5, help="timed rounds (default 5)")
    parser.add_argument("--batch", type=a_number, default=128, help="images of a step on one GPU (default 128)")
    parser.add_argument(
        "--step_seconds", type=float, nargs="+", default=[0.5, 1, 2, 5], help="of a step, for the workers it needs"
    )
    parser.add_argument("--check_files", type=a_number, metavar="N", help="time the check before training on N files")
    return parser


if __name__ == "__main__":
    main()
