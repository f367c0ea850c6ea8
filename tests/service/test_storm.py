"""A service in bad weather, and a trainer that is killed: the run ends with the bits of one that had none of it."""

import os
import threading
import time

import pytest
import torch

from flops_lightning.service import ClipAnswers
from flops_lightning.strategies import EvolutionStrategies
from flops_lightning.tasks.clip_model import load_clip
from tests.clip_digits import BOTH, MODEL, tuner
from tests.digits import quiet_trainer
from tests.forks import python
from tests.reference.scoring_server import ScoringServer, storm
from tests.service.kill_and_resume import METHODS, digits, numbers, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")]


def served() -> ScoringServer:
    clip, tokenizer = load_clip(MODEL["model_name"], "")
    return ScoringServer(ClipAnswers(clip, tokenizer=tokenizer, model="digits", max_rows=64))


def trained(server, **settings):
    service = {"url": server.url, "max_rows": 4, "timeout": 2.0, "attempts": 20, "wait": 0.01, **settings}
    task = tuner(model_name="", service=service, strategy=EvolutionStrategies(seed=0), **BOTH)
    quiet_trainer(max_steps=20, limit_val_batches=0, num_sanity_val_steps=0).fit(task, digits())
    task.scorer.client.close()
    return task


def test_twenty_steps_through_503s_stalls_and_a_restart_have_the_bits_of_calm_ones():
    with served() as server:
        calm = trained(server, connections=4)
        for connections in (1, 16):
            server.fault, server.received = storm(0.15, stalled=0.003, silent=2.5), 0
            killer = threading.Timer(3.0, restart, [server])
            killer.start()
            task = trained(server, connections=connections)
            killer.join()
            usage = task.scorer.usage
            assert torch.equal(numbers(task), numbers(calm))
            assert usage.rows == calm.scorer.usage.rows
            assert usage.text_passes == calm.scorer.usage.text_passes
            assert usage.failed == 0
            # What was in the server when it was killed, and what found nobody there, is asked again.
            assert usage.retries > 0.1 * calm.scorer.usage.calls
            assert usage.calls >= calm.scorer.usage.calls + usage.retries
            assert server.received <= usage.calls


def restart(server: ScoringServer) -> None:
    """Kill the server in the middle of the run; the one that follows knows no images and no classes."""
    server.stop()
    time.sleep(0.5)
    server.answers = served().answers
    server.start()


@pytest.mark.parametrize("method", METHODS)
def test_killed_trainers_resume_with_the_same_bits(method, tmp_path):
    kills = int(os.environ.get("TRAINER_KILLS", "2"))
    with served() as server:
        whole = run(method, server.url, tmp_path / "whole")
        arguments = [method, server.url, str(tmp_path / "killed"), str(kills)]
        process = python(["-m", "tests.service.kill_and_resume", *arguments], tmp_path / "told")
        process.join()
        told = (tmp_path / "told").read_text()
        assert told.splitlines()[-1:] == [f"killed {kills}"], told
        found = torch.load(tmp_path / "killed" / "numbers.pt", weights_only=True)
    assert torch.equal(found, whole)
