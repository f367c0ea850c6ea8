"""``python -m benchmarks.loading``: does reading photos keep up with the training steps?

Images per second of the training loader, from JPEG files to normalised batches on the CPU, by number of workers, and
how many workers a GPU needs whose step takes so many seconds. The files are in the system's cache after the first,
untimed round: the disk is not in it.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Subset

import flops_lightning as fl
from benchmarks.harness import Spread, alternate, at_least, command, finish, positive, table

WIDTH, HEIGHT, QUALITY = 500, 375, 90  # of photos as ImageNet has them, most of them 500 x 375
FADING = 0.2  # by which fine noise is weaker than coarse: a file has 110 kB, as those of ImageNet have on average
LOADED_AT_ONCE = 32  # small enough for several batches a worker; the time an image takes does not depend on it
CLASSES, FOLDERS = 8, 1000  # of the photos written, and of the files that are only looked at

Clock = Callable[[], float]
read = partial(deque[object], maxlen=0)


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


def photos(root: Path, **settings: Any) -> fl.ImageNetDataModule:
    """The photos under ``root/train``, all for training."""
    settings |= {"batch_size": LOADED_AT_ONCE, "val_images": 0, "normalization": "imagenet"}
    return fl.ImageNetDataModule(root=str(root), **settings)


def rates(
    root: Path, workers: Sequence[int], *, images: int, rounds: int, clock: Clock = time.perf_counter, **settings: Any
) -> dict[int, list[float]]:
    """Images per second in each round, by number of workers (0 loads in this process); the numbers take turns.

    The ``images`` of a round are spread over ``root/train/<class>/*``; where there are fewer, all are loaded.
    """
    loaders = {}
    for number in workers:
        data = photos(root, num_workers=number, **settings)
        data.setup("fit")
        whole = len(cast("Sized", data.train_set))
        count = min(images, whole)
        data.train_set = Subset(data.train_set, [i * whole // count for i in range(count)])
        loaders[number] = data.train_dataloader()
    times = alternate({str(n): partial(read, loader) for n, loader in loaders.items()}, rounds=rounds, clock=clock)
    return {number: [count / seconds for seconds in times.seconds[str(number)]] for number in loaders}


def rate_table(found: Mapping[int, Sequence[float]]) -> str:
    """Images per second, median and range, by number of workers."""
    rates, one = {n: Spread.of(found[n], tails=0) for n in sorted(found)}, statistics.median(found[1])
    own = "0 (in the training process)"
    records = [{"n": n or own, "rate": rate, "gain": rate.median / one} for n, rate in rates.items()]
    columns = {"workers": "{n}", "images/s, median (min - max)": "{rate:.0f}", "over one worker": "{gain:.2f}"}
    return table(columns, records) + "\n"


def need_table(one_worker: float, batch: int, step_seconds: Sequence[float]) -> str:
    """Images per second that a GPU takes, and how many workers that is, by seconds of its step of a batch."""
    records = [{"step": s, "need": batch / s, "workers": batch / s / one_worker} for s in step_seconds]
    columns = {f"seconds per step, batch {batch}": "{step:g}", "images/s needed": "{need:.0f}"}
    return table(columns | {"workers needed per GPU": "{workers:.1f}"}, records) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser, count = command("benchmarks.loading", __doc__, rounds=5), at_least(1)
    parser.add_argument("--root", type=Path, help="folder with train/CLASS/*, instead of photos made up for it")
    parser.add_argument("--images", type=count, default=256, help="images of a round (default 256)")
    parser.add_argument("--image_size", type=count, default=224, help="pixels (default 224)")
    parser.add_argument("--augment", action="store_true", help="crop at random and mirror, instead of resizing")
    workers: dict[str, Any] = {"type": at_least(0), "nargs": "+", "default": [0, 1, 2]}
    parser.add_argument("--workers", **workers, help="default 0 1 2; 1 is always in")
    parser.add_argument("--batch", type=count, default=128, help="images of a step on one GPU (default 128)")
    parser.add_argument("--step_seconds", type=positive, nargs="+", default=[0.5, 1, 2, 5], help="of a step on a GPU")
    parser.add_argument("--check_files", type=count, metavar="N", help="time the check before training on N files")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in a worker
    with TemporaryDirectory(prefix="photos_") as folder:
        root = options.root or Path(folder)
        if options.root is None:
            write_photos(root, options.images)
        settings = {name: getattr(options, name) for name in ("images", "image_size", "augment", "rounds")}
        found = rates(root, sorted({1, *options.workers}), **settings)
        (of_a_core,) = rates(root, [0], **settings, clock=time.process_time).values()
    print(rate_table(found))
    print(f"In a CPU second: {statistics.median(of_a_core):.0f} images.\n")
    print(need_table(statistics.median(found[1]), options.batch, options.step_seconds))
    if options.check_files:
        with TemporaryDirectory(prefix="files_") as folder:
            link_files(Path(folder), options.check_files)
            check = photos(Path(folder), num_workers=0).check
            seconds = statistics.median(alternate({"check": check}, rounds=options.rounds).seconds["check"])
        rate = options.check_files / seconds
        print(f"Check of {options.check_files:,} files: {seconds:.1f} s, {rate:,.0f} files/s.")
    finish(options, [{"workers": n, "images_per_second": values, **settings} for n, values in found.items()])


if __name__ == "__main__":
    main()
