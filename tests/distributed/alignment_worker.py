"""One process of several: trains an adapter, started with the environment that torchrun sets.

``python -m tests.distributed.alignment_worker SIZE FOLDER`` reads ``FOLDER/llm`` and ``FOLDER/photos``, and writes
``FOLDER/RANK.pt``: the adapter, the width of the noise, and how many photos this process has encoded.
"""

import sys
from pathlib import Path

import torch

from tests.aligned import aligner, captions, fitted

STEPS = 4


def main(size: int, folder: Path) -> None:
    task, seen = aligner(str(folder / "llm")), []
    encode = task.features_of
    task.features_of = lambda images: (seen.append(len(images)), encode(images))[1]
    data = captions(folder / "photos", cache_dir=str(folder / "features"))
    trainer = fitted(task, data, folder, devices=size, max_epochs=2, max_steps=STEPS, use_distributed_sampler=False)
    found = {"adapter": task.adapter.state_dict(), "sigma": task.sigma, "encoded": sum(seen)}
    torch.save(found, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
