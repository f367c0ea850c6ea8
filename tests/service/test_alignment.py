"""An adapter whose captions a service scores: the run of a model here, and what happens when service or money end."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flops_lightning.allocators import OptimalAllocator, TraceSettings
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import LostQueriesError, SettingError, SpentQueriesError
from flops_lightning.language import CaptionAnswers, CaptionLoss, RemoteCaptionLoss, load_language_model
from flops_lightning.strategies import Backprop, LikelihoodRatio, PilotSpec, SiteSpec
from flops_lightning.suffix_loss import PaddedTargets
from flops_lightning.tasks.caption_answers import likeliest
from tests.aligned import aligner, captions, class_folders, fitted, llm_folder
from tests.reference.scoring_server import ScoringServer

BATCH, QUERIES, CLASSES, HELD_OUT = 4, 8, 2, 5
STEP = BATCH * (1 + QUERIES)
VALIDATION = HELD_OUT * (1 + CLASSES)
OPEN = []
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return llm_folder(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def server(llm):
    loss = CaptionLoss(load_language_model(llm)[0], visual_tokens=2)
    with ScoringServer(CaptionAnswers(loss, model="words", max_rows=16)) as running:
        yield running


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().client.close()


def learns(**settings):
    return LikelihoodRatio(sites=[SiteSpec(["adapter"], queries_per_sample=QUERIES)], seed=0, **settings)


def remote(server, llm, *, client=None, **settings):
    usual = {"timeout": 10.0, "wait": 0.001, "max_rows": 4}
    OPEN.append(RemoteCaptionLoss(server.url, **{**usual, **(client or {})}))
    given = {"llm_kwargs": {"tokenizer": llm}, "init": "default", "strategy": learns(), **settings}
    return aligner(OPEN[-1], **given)


def fit(task, photos, folder, *callbacks, batch=BATCH, **trainer):
    data = captions(photos, captions=None, template="a {} .", batch_size=batch)
    saver = ModelCheckpoint(dirpath=folder, save_top_k=0)
    return fitted(task, data, folder, saver, *callbacks, enable_checkpointing=True, **trainer)


def adapter_of(task):
    return torch.cat([value.flatten() for value in task.adapter.state_dict().values()])


def test_a_run_is_that_of_a_model_here_and_its_rows_are_counted(server, llm, photos, tmp_path):
    here, task = aligner(llm, init="default", strategy=learns()), remote(server, llm)
    start = adapter_of(task)
    expected, found = (fit(each, photos, tmp_path, max_epochs=2) for each in (here, task))
    torch.testing.assert_close(adapter_of(task), adapter_of(here), rtol=1e-3, atol=1e-4)
    assert float((adapter_of(task) - start).abs().max()) > 0.1
    for name in ("val/loss", "val/accuracy", "train/loss"):
        assert float(found.callback_metrics[name]) == pytest.approx(float(expected.callback_metrics[name]), rel=1e-4)
    samples = 2 * 10
    assert task.scorer.usage.rows == samples * (1 + QUERIES) + 2 * VALIDATION
    assert float(found.callback_metrics["service/rows"]) == samples * (1 + QUERIES) + VALIDATION  # before the last one
    assert task.strategy.meter.total().forward_equivalents == here.strategy.meter.total().forward_equivalents
    assert here.asked() == {}


@pytest.mark.parametrize("pilots", [False, True])
def test_a_run_stopped_by_max_queries_goes_on_and_ends_as_one_that_was_not(server, llm, photos, tmp_path, pilots):
    """Pilots are asked for before the step begins, and count."""

    def run(limit=0, resume=None):
        spec = PilotSpec(sites=["adapter"], queries=2) if pilots else PilotSpec()
        task = remote(server, llm, max_queries=limit, strategy=learns(pilots=spec))
        chosen = QueryAllocatorCallback(allocator=OptimalAllocator(traces=TraceSettings(source="pilots")))
        settings = {"max_steps": 5, "max_epochs": -1, "limit_val_batches": 0, "resume": resume}
        try:
            fit(task, photos, tmp_path, *[chosen][: int(pilots)], **settings)
        except SpentQueriesError as error:
            return task, error
        return task, None

    whole, _ = run()
    steps = [4, 4, 2, 4, 4]  # samples of ten in two epochs
    each = 1 + QUERIES
    task, stopped = run(limit=sum(steps[:4]) * each - 1)
    assert task.scorer.usage.rows == sum(steps[:3]) * each
    message = rf"max_queries = {sum(steps[:4]) * each - 1}: {sum(steps[:3]) * each} are spent .* takes {STEP}\. Saved"
    assert re.search(message, str(stopped))
    again, error = run(limit=sum(steps[:4]) * each - 1, resume=stopped.saved)
    assert str(error).endswith(f"{sum(steps[:3]) * each} are spent and the next step takes {STEP}.")
    assert again.scorer.usage.rows == sum(steps[:3]) * each
    later, error = run(limit=sum(steps) * each, resume=stopped.saved)
    assert error is None
    assert torch.equal(adapter_of(later), adapter_of(whole))
    assert later.scorer.usage.rows == whole.scorer.usage.rows == sum(steps) * each


def test_limits_that_leave_no_room_are_told_before_anything_is_asked(server, llm, photos, tmp_path):
    task = remote(server, llm, max_queries=STEP - 1)
    with pytest.raises(SettingError, match=rf"max_queries = {STEP - 1}: is below one step, which takes {STEP}"):
        fit(task, photos, tmp_path)
    assert task.scorer.usage.rows == 0
    with pytest.raises(SettingError, match=r"max_queries = 10: counts the rows of a service, but there is no service"):
        fit(aligner(llm, max_queries=10), photos, tmp_path)
    most = 10 * (1 + QUERIES) + VALIDATION - 1
    with pytest.raises(SpentQueriesError, match=rf"the next step takes {VALIDATION}\. Saved"):
        fit(remote(server, llm, max_queries=most), photos, tmp_path, batch=5, max_epochs=1)


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint_that_resumes(server, llm, photos, tmp_path):
    task = remote(server, llm, max_skipped_steps=1, client={"attempts": 1, "timeout": 1.0})
    server.fault = lambda key, attempt: (503, {}, b"") if re.search(r"^0-[1-9]", key) else None
    message = r"2 steps in a row lost every query .* Saved .*last.ckpt: --ckpt_path .* goes on when the service answers"
    with pytest.raises(LostQueriesError, match=message), pytest.warns(RuntimeWarning, match="got no answer"):
        fit(task, photos, tmp_path)
    server.fault = lambda key, attempt: None
    later = remote(server, llm)
    fit(later, photos, tmp_path, max_steps=2, max_epochs=3, limit_val_batches=0, resume=tmp_path / "last.ckpt")
    assert later.strategy.draw == 4
    assert later.scorer.usage.failed > 0
    server.answers.info = type(server.answers.info)(**{**vars(server.answers.info), "model": "letters"})
    with pytest.raises(SettingError, match=r"llm = 'service letters': .* was learned with 'service words'"):
        fit(remote(server, llm), photos, tmp_path, resume=tmp_path / "last.ckpt")


def test_what_needs_the_model_here_says_what_works(server, llm, photos, tmp_path):
    refusal = (
        r"loss = 'RemoteCaptionLoss': has no derivative here: the language model runs elsewhere and answers with "
        r"losses alone\. Train what is before it by a strategy that needs none: LikelihoodRatio, SPSA or MeZO"
    )
    with pytest.raises(SettingError, match=refusal):
        remote(server, llm, strategy=Backprop(), relative_sigma=0.0)
    with pytest.raises(SettingError, match=r"init = 'embedding': needs the embeddings .* Write init: default"):
        remote(server, llm, init="embedding")
    data = captions(photos, captions=None, template="a {} .", batch_size=BATCH)
    task = remote(server, llm)
    with pytest.raises(SettingError, match=r"can only score captions, not write them"):
        fit(task, photos, tmp_path, max_steps=1).predict(task, data)


def test_an_accuracy_without_all_answers_is_none(server, llm):
    task = remote(server, llm, client={"attempts": 1})
    classes, vectors = task.caption_ids(["a ship .", "a truck ."]), torch.randn(2, 32)
    own = PaddedTargets.of([torch.tensor(ids) for ids in classes])
    assert likeliest(task.loss, vectors, own, classes).isfinite().all()
    asked = iter(range(99))
    server.fault = lambda key, attempt: (503, {}, b"") if next(asked) < 2 else None
    with pytest.warns(RuntimeWarning, match="got no answer"):
        assert likeliest(task.loss, vectors, own, classes).isnan().all()
