"""Where in its epochs a resumed run continues, corrected before Lightning reads it from the checkpoint.

Lightning 2.6 resumes correctly within an epoch. After an epoch's last batch it counts one epoch start too few, so that
a second interruption repeats the next epoch; with ``max_steps`` it counts the finished epoch twice, so that shuffling
skips one. It also skips a validation that was pending or running when the checkpoint was
made.
"""

from typing import Any


def settle_progress(checkpoint: dict[str, Any]) -> None:
    """Rewrite, in place, the progress of training as one of three kinds from which Lightning resumes correctly.

    These are: within an epoch; after its last batch, where the epoch then ends with its hooks; and before the first
    batch of an epoch. In the first two a validation that was due or under way runs from its beginning. Call this in an
    ``on_load_checkpoint`` while fitting: loops are restored after that hook. Settled progress stays as it is.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if not loop:
        return
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    validation = loop["epoch_loop.val_loop.batch_progress"]
    # A batch is known to be the last as soon as it is loaded; a step that was cut off lacks the later counts.
    cut_off = batch["current"]["processed"] != batch["current"]["ready"]
    over = batch["is_last_batch"] and not cut_off
    between = batch["current"]["ready"] == 0
    ended = (over or between) and epoch["current"]["processed"] == epoch["current"]["started"]
    # The last count of a batch follows the hooks of its end, and those precede its validation.
    validated = batch["total"]["completed"] == batch["total"]["processed"] and _finished(validation)
    _settle_validation(validation, due=not (validated or between or ended))
    for which in ("current", "total"):
        begun, done = epoch[which]["started"], batch[which]["processed"]
        epoch[which] |= _counts(begun, begun if ended else begun - 1)
        if over or cut_off:
            batch[which] |= _counts(0, 0) if ended and which == "current" else _counts(done, done)
    batch["is_last_batch"] = over and not ended


def _counts(begun: int, done: int) -> dict[str, int]:
    return {"ready": begun, "started": begun, "processed": done, "completed": done}


def _finished(validation: dict[str, Any]) -> bool:
    current = validation["current"]
    return bool(validation["is_last_batch"] and current["completed"] == current["ready"])


def _settle_validation(validation: dict[str, Any], *, due: bool) -> None:
    # Lightning runs a validation, if it is due after the batch at hand, where the counts are those of one cut off.
    done = 0 if due else validation["total"]["ready"]
    validation["total"] |= {"ready": done + due, "started": done + due, "processed": done, "completed": done}
    if due:
        validation["current"] |= _counts(0, 0)
        validation["is_last_batch"] = False
