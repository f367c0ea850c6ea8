"""Prompt tuning through a service: the run of one process, and what happens when the service or the money ends."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flops_lightning.callbacks import RunSummary
from flops_lightning.cli.command import main
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import LostQueriesError, SettingError, SpentQueriesError
from flops_lightning.service import ClipAnswers
from flops_lightning.strategies import SPSA, Backprop
from flops_lightning.tasks import ClipPromptTuner
from flops_lightning.tasks.clip_model import load_clip
from tests.clip_digits import BOTH, IMAGE_PROMPT, MODEL, TEXT_PROMPT
from tests.clip_digits import tuner as local_tuner
from tests.digits import quiet_trainer
from tests.reference.scoring_server import ScoringServer, storm

ROOT = Path(__file__).parents[2]
SEARCH = {"population": 4, "sigma": 1.0, "seed": 1}
SAME = {"tokens": 2, "dim": 20, "queries": 3}
AWAY = {"model_name": ""}
STEP = 8 + 1 + 8 * 4 + 3  # rows of a step with 8 images
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


@pytest.fixture(scope="module")
def answers():
    clip, tokenizer = load_clip(MODEL["model_name"], "")
    return lambda **settings: ClipAnswers(clip, tokenizer=tokenizer, model="digits", max_rows=64, **settings)


@pytest.fixture
def server(answers):
    with ScoringServer(answers()) as running:
        yield running


OPEN = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().scorer.client.close()


def tuner(server, *, client=None, **settings):
    service = {"url": server.url, "connections": 4, "timeout": 10.0, "wait": 0.001, **(client or {})}
    OPEN.append(local_tuner(**AWAY, service=service, **settings))
    return OPEN[-1]


def digits(**settings):
    return DigitsDataModule(**{"batch_size": 8, "rotation": 30.0, **settings})


def fit(task, *callbacks, data=None, ckpt_path=None, **settings):
    usual = {"max_steps": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(*callbacks, **{**usual, **settings})
    trainer.fit(task, data or digits(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def numbers(task):
    return torch.cat([p.detach().flatten() for p in task.network.trainable().values()])


SETTINGS = {
    "es": {},
    "spsa": {"strategy": SPSA(seed=0), **{n: {**p, "queries": 4} for n, p in BOTH.items()}},
    "crossed": {
        "strategy": SPSA(seed=0),
        "pairing": "crossed",
        **{n: {**p, "queries": 4} for n, p in BOTH.items()},
    },
    "cma": {"search": SEARCH},
    "joint": {"pairing": "joint", "text_prompt": SAME, "image_prompt": SAME},
    "text": {"text_prompt": TEXT_PROMPT},
    "image": {"image_prompt": IMAGE_PROMPT},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_through_a_service_is_that_of_one_process(server, name):
    task, reference = tuner(server, **copy.deepcopy(SETTINGS[name])), local_tuner(**copy.deepcopy(SETTINGS[name]))
    fit(task)
    fit(reference)
    if name == "joint":  # one site of another name, so other noise
        assert [stage.name for stage in task.network.stages] == ["images", "scores", "answer"]
    else:
        torch.testing.assert_close(numbers(task), numbers(reference), rtol=1e-2, atol=5e-3)
    assert float((numbers(task)).abs().max()) > 0.1
    spent = {name: count.queries for name, count in task.strategy.meter.sites.items() if count.queries}
    expected = {name: count.queries for name, count in reference.strategy.meter.sites.items() if count.queries}
    assert sum(spent.values()) == sum(expected.values())


def test_a_service_of_losses_trains_and_validates_without_predictions(answers, tmp_path):
    with ScoringServer(answers(answers=("losses",))) as server:
        for name, settings in (("split", {}), ("crossed", SETTINGS["crossed"])):
            refusal = rf"pairing = '{name}': needs separate features .* returns losses. Write pairing: joint"
            with pytest.raises(SettingError, match=refusal):
                tuner(server, **copy.deepcopy(settings))
        task = tuner(server, pairing="joint", text_prompt=SAME, image_prompt=SAME)
        trainer = fit(task, RunSummary(), limit_val_batches=2, val_check_interval=2, default_root_dir=tmp_path)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["start_accuracy"], summary["test_accuracy"]) == (None, None)
        assert summary["validation"] == {"loss": pytest.approx(float(trainer.callback_metrics["val/loss"]))}
        assert float(trainer.callback_metrics["val/loss"]) > 0
        assert "val/accuracy" not in trainer.callback_metrics
        assert float(numbers(task).abs().max()) > 0.1
        assert task.scorer.usage.text_passes >= 2 * 8 * 3
        with pytest.raises(SettingError, match=r"label_smoothing = 0.1: has no effect: the service returns"):
            fit(tuner(server, pairing="joint", text_prompt=SAME, image_prompt=SAME, label_smoothing=0.1))


def test_usage_is_logged_kept_and_in_the_summary(server, tmp_path):
    task = tuner(server)
    trainer = fit(task, RunSummary(), default_root_dir=tmp_path)
    usage = task.scorer.usage
    assert float(trainer.callback_metrics["service/rows"]) == 2 * STEP + 64 + 360  # where the prompt starts, and a test
    assert float(trainer.callback_metrics["service/text_passes"]) == 2 * (1 + 3)
    assert json.loads((tmp_path / "summary.json").read_text())["service"] == usage.state_dict()
    assert usage.calls == server.received - usage.failed * 0
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["service"] == usage.state_dict()
    assert saved["hyper_parameters"]["service"]["url"] == server.url
    rows = usage.rows
    again = tuner(server)
    fit(again, max_steps=3, ckpt_path=tmp_path / "run.ckpt")
    assert again.scorer.usage.rows == rows + STEP


@pytest.mark.parametrize("name", ["es", "spsa", "cma"])
def test_a_run_stopped_by_max_queries_goes_on_and_ends_as_one_that_was_not(server, name, tmp_path):
    settings = SETTINGS[name]
    whole = tuner(server, **copy.deepcopy(settings))
    fit(whole, max_steps=5)
    step = whole.step_rows(whole.strategy, 8)
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=0)
    task = tuner(server, **copy.deepcopy(settings), max_queries=64 + 3 * step - 1)
    with pytest.raises(
        SpentQueriesError, match=rf"the next step takes {step}. Saved .*last.ckpt: go on with"
    ) as stopped:
        fit(task, saver, max_steps=5, enable_checkpointing=True)
    spent = task.scorer.usage.rows
    assert spent == 64 + 2 * step <= task.max_queries < spent + step
    assert stopped.value.saved == tmp_path / "last.ckpt"
    later = tuner(server, **copy.deepcopy(settings), max_queries=64 + 5 * step)
    fit(later, max_steps=5, ckpt_path=tmp_path / "last.ckpt")  # the last step stops nothing
    assert torch.equal(numbers(later), numbers(whole))
    assert later.scorer.usage.rows == 64 + 5 * step == whole.scorer.usage.rows


def test_a_validation_that_would_ask_for_too_much_is_not_begun_and_made_up_for(server, tmp_path):
    settings = {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 1.0}
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=0)
    step = 1257 + 1 + 1257 * 4 + 3
    task = tuner(server, max_queries=64 + step + 180)
    with pytest.raises(SpentQueriesError, match=r"the next step takes 181\. Saved"):
        fit(task, saver, data=digits(batch_size=0), enable_checkpointing=True, **settings)
    later = tuner(server)
    trainer = fit(later, data=digits(batch_size=0), ckpt_path=tmp_path / "last.ckpt", **settings)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert torch.equal(numbers(later), numbers(task))


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint_that_resumes(server, tmp_path):
    whole = tuner(server)
    fit(whole, max_steps=3)
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=0)
    task = tuner(server, max_skipped_steps=1, client={"attempts": 2, "timeout": 1.0})
    steps = []
    task.register_forward_pre_hook(lambda *_: None)
    server.fault = lambda key, attempt: (503, {}, b"") if re.search(r"^0-[1-9]", key) else None
    message = r"2 steps in a row lost every query .* Saved .*last.ckpt: --ckpt_path .* goes on when the service answers"
    with pytest.raises(LostQueriesError, match=message), pytest.warns(RuntimeWarning, match="got no answer"):
        fit(task, saver, max_steps=3, enable_checkpointing=True)
    server.fault = lambda key, attempt: None
    assert not steps
    later = tuner(server)
    fit(later, max_steps=2, ckpt_path=tmp_path / "last.ckpt")
    assert later.strategy.draw == task.strategy.draw + 1  # the draws of the lost steps are not used again
    assert not torch.equal(numbers(later), numbers(task))
    usage = later.scorer.usage
    assert usage.failed > 0
    assert usage.calls >= usage.retries + usage.failed


@pytest.mark.parametrize("connections", [1, 16])
def test_a_storm_changes_no_bit(server, connections):
    calm = tuner(server, client={"max_rows": 4})
    fit(calm, max_steps=3)
    server.fault, server.received = storm(0.15), 0
    task = tuner(server, client={"max_rows": 4, "connections": connections, "attempts": 12})
    fit(task, max_steps=3)
    usage = task.scorer.usage
    assert torch.equal(numbers(task), numbers(calm))
    assert usage.rows == calm.scorer.usage.rows
    assert usage.retries > 5
    assert usage.failed == 0
    assert server.received == usage.calls == calm.scorer.usage.calls + usage.retries


def test_images_are_encoded_once_a_run_where_no_prompt_moves_them(server):
    task = tuner(server, text_prompt=TEXT_PROMPT)
    fit(task, data=digits(batch_size=0), max_steps=3, max_epochs=3)
    assert task.scorer.usage.rows == 1257 + 180 + 3 * (1 + 3)


def test_manual_is_the_model_of_the_service(server):
    OPEN.append(ClipPromptTuner(**{**MODEL, **AWAY}, service={"url": server.url}))
    (found,) = quiet_trainer().test(OPEN[-1], digits(rotation=0.0), verbose=False)
    (expected,) = quiet_trainer().test(ClipPromptTuner(**MODEL), digits(rotation=0.0), verbose=False)
    assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-4)
    assert found["test/accuracy"] == expected["test/accuracy"]


def test_checkpoints_of_another_model_are_refused_before_anything_is_asked(server, answers, tmp_path):
    task = tuner(server)
    fit(task, max_steps=1).save_checkpoint(tmp_path / "run.ckpt")
    server.answers = answers()
    server.answers.info = type(server.answers.info)(**{**vars(server.answers.info), "model": "letters"})
    other = tuner(server)
    rows = other.scorer.usage.rows
    with pytest.raises(SettingError, match=r"checkpoint = 'service lett': are not the weights"):
        fit(other, ckpt_path=tmp_path / "run.ckpt")
    assert other.scorer.usage.rows == rows
    with pytest.raises(SettingError, match=r"template = .*the checkpoint's run has"):
        fit(tuner(server, template="a {}"), ckpt_path=tmp_path / "run.ckpt")


def test_settings_that_do_not_go_together_are_refused(server, answers):
    for settings, message in (
        ({"model_name": "ViT-B-32"}, "model_name = 'ViT-B-32': has no effect: the model is at the service"),
        ({"checkpoint": "openai"}, "checkpoint = 'openai': has no effect"),
        ({"service": None}, "names no model, and there is no service"),
        ({"service": {"url": "ws://x"}}, r"service.url = 'ws://x'"),
        ({"service": {"url": server.url, "max_rows": 65}}, r"service.max_rows = 65: is more than the 64 rows"),
        ({"service": {"url": server.url, "retries": 3}}, r"has no setting 'retries'"),
        ({"service": {"url": server.url}, "text_prompt": {"tokens": 70, "dim": 4}}, r"text_prompt.tokens = 70"),
        ({"service": {"url": server.url}, "max_queries": -1}, r"max_queries = -1"),
    ):
        given = {"service": {"url": server.url}, **AWAY, **settings}
        with pytest.raises(SettingError, match=message):
            local_tuner(**given)
    with pytest.raises(SettingError, match=rf"max_queries = {STEP - 1}: is below one step, which takes {STEP}"):
        fit(tuner(server, max_queries=STEP - 1))
    with pytest.raises(SettingError, match=r"max_queries = 10: counts the rows of a service, but there is no service"):
        fit(local_tuner(max_queries=10))
    with pytest.raises(SettingError, match=r"returns only numbers"):
        fit(tuner(server, strategy=Backprop()))
    with pytest.raises(SettingError, match=r"data.image_size = .*the model takes images of 8 x 8"):
        tuner(server)(torch.zeros(2, 1, 9, 9))


def test_the_command_line_takes_a_service_and_says_where_to_go_on(server, tmp_path, capsys):
    service = ["--model.model_name", "", "--model.service.url", server.url, "--model.max_queries", "4000"]
    trainer = ["--trainer.default_root_dir", str(tmp_path), "--trainer.callbacks", "[]"]
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(ROOT / "configs" / "clip_tiny_digits.yaml"), *service, *trainer])
    assert left.value.code != 0
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(r"max_queries = 4000: \d+ are spent and the next step takes \d+\. Saved \S+last\.ckpt", shown)
    assert "Traceback" not in shown
