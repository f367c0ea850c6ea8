"""Killed again and again, also while it writes, a run ends with the weights of the one that was left alone."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO
from tests.forks import SERVER
from tests.resume.runs import BATCHES, NAME, files, finish, outcome, same, start, wait_until, write_config


def killed_until_done(folder: Path, *, kills: int, seed: int) -> dict[str, int]:
    """Kill and resume; tells how many kills came when, as seen by what they left."""
    moments = random.Random(seed)
    seen = {"kills": 0, "while_writing": 0}
    while seen["kills"] < kills:
        before = files(folder, "*.ckpt")
        process = start(folder, "--ckpt_path", "last")
        moved = wait_until(lambda known=before: bool(files(folder, "*.ckpt") - known), process)
        if not moved:
            break  # it was done before there was anything to kill
        if seen["kills"] % 2 == 0:  # every other one while it writes, which is too rare to be left to chance
            wait_until(lambda: bool(files(folder, ".*.partial")), process)
        time.sleep(moments.uniform(0.0, 0.15 if seen["kills"] % 2 == 0 else 0.5))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        seen["kills"] += 1
        seen["while_writing"] += bool(files(folder, ".*.partial"))
        assert all(torch.load(f, weights_only=True)["state_dict"] for f in files(folder, "*.ckpt"))
    if not list(folder.glob("runs/*/*/summary.json")):
        finish(start(folder, "--ckpt_path", "last"), folder)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_random_moments_ends_where_it_would_have_without(tmp_path):
    whole, killed, kills = tmp_path / "whole", tmp_path / "killed", 10
    write_config(whole, max_epochs=8)
    write_config(killed, max_epochs=8, plugins=[{"class_path": "tests.resume.runs.SlowCheckpointIO"}])
    finish(start(whole), whole)
    seen = killed_until_done(killed, kills=kills, seed=1)
    assert seen["kills"] == kills
    assert seen["while_writing"] >= 3
    assert same(whole, killed)
    assert outcome(whole)[1]["steps"] == 8 * BATCHES


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prompts_end_with_the_same_bits_after_kills(tmp_path):  # a search: tests/service/test_storm.py
    pytest.importorskip("open_clip", reason="prompts are for its models")
    from tests.clip_digits import IMAGE_PROMPT, MODEL, TEXT_PROMPT

    model = {"model_name": MODEL["model_name"], "text_prompt": TEXT_PROMPT, "image_prompt": IMAGE_PROMPT}
    model |= {"strategy": {"class_path": "flops_lightning.strategies.EvolutionStrategies"}, "optimizer": {"lr": 0.1}}
    folders = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        write_config(folder, max_epochs=8)
        settings = yaml.safe_load((folder / f"{NAME}.yaml").read_text())
        settings["model"] = {"class_path": "flops_lightning.tasks.ClipPromptTuner", "init_args": model}
        settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][1:]  # no allocator
        (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(settings))
    finish(start(whole), whole)
    assert killed_until_done(killed, kills=4, seed=2)["kills"] >= 2
    assert same(whole, killed)
    assert outcome(whole)[1]["steps"] == 8 * BATCHES


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_with_features_on_disk_ends_with_the_same_bits_after_kills(tmp_path):
    pytest.importorskip("transformers", reason="language models need the extra llm")
    from tests.aligned import MODEL, llm_folder, photo_folder

    llm, photos = llm_folder(tmp_path / "llm"), photo_folder(tmp_path / "photos")
    data = {"root": str(photos), "captions": str(photos / "captions.json"), "val_share": 0.25, "test_share": 0.25}
    strategy = {"class_path": "flops_lightning.strategies.LikelihoodRatio"}
    model = {**MODEL, "llm": llm, "strategy": strategy, "optimizer": {"lr": 0.05, "schedule": "cosine"}}
    folders = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        write_config(folder, max_epochs=30)
        settings = yaml.safe_load((folder / f"{NAME}.yaml").read_text())
        settings["model"] = {"class_path": "flops_lightning.tasks.AdapterAlignment", "init_args": model}
        cached = {**data, "batch_size": 6, "cache_dir": str(folder / "features")}
        settings["data"] = {"class_path": "flops_lightning.datamodules.CaptionDataModule", "init_args": cached}
        kept = settings["trainer"]["callbacks"]
        settings["trainer"]["callbacks"] = kept[2:]  # the summary is of classifiers, the allocator wants pilots
        (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(settings))
    finish(start(whole), whole)
    kills = 0
    for pause in (0.0, 0.1, 0.3):
        before = files(killed, "*.ckpt")
        process = start(killed, "--ckpt_path", "last")
        assert wait_until(lambda known=before: bool(files(killed, "*.ckpt") - known), process)
        time.sleep(pause)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 2
    finish(start(killed, "--ckpt_path", "last"), killed)
    newest = [max(files(folder, "*.ckpt"), key=lambda file: file.stat().st_mtime) for folder in folders]
    ends, others = (torch.load(file, weights_only=True) for file in newest)
    assert ends["global_step"] == others["global_step"] == 60
    assert ends["state_dict"].keys() == {"adapter.adapter.0.weight", "adapter.adapter.0.bias"}
    assert all(torch.equal(value, others["state_dict"][name]) for name, value in ends["state_dict"].items())


def _killed_while_it_writes(folder: Path) -> None:
    class Killed(AtomicCheckpointIO):
        def write(self, checkpoint: dict[str, Any], partial: Path) -> None:
            partial.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    Killed().save_checkpoint({"step": 2}, folder / "last.ckpt")


@pytest.mark.slow
def test_a_kill_leaves_the_last_good_checkpoint(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    process = SERVER.Process(target=_killed_while_it_writes, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
