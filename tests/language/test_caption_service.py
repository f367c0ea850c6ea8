"""Captions scored elsewhere: the losses of the model, in order, and books that balance whatever the server does."""

import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionAnswers, CaptionLoss, RemoteCaptionLoss
from flops_lightning.network.staging import stage_network
from flops_lightning.service import BadRequest
from flops_lightning.service.payload import packed, unpacked
from flops_lightning.strategies import SPSA, Backprop, LikelihoodRatio
from tests.pretended_gpu import pretended_gpu
from tests.reference.language import WIDTH, caption_ids, tiny_llama
from tests.reference.networks import gradients, normal
from tests.reference.scoring_server import ScoringServer, storm

LENGTHS = (3, 1, 9, 4, 2, 6)
SITE = {"stages": ["0"], "kind": "linear", "sigma": 1e-2, "queries_per_sample": 8}
OPEN = []


def model(**settings) -> CaptionLoss:
    return CaptionLoss(tiny_llama().float(), visual_tokens=2, **settings)


@pytest.fixture
def server():
    with ScoringServer(CaptionAnswers(model(), model="tiny", max_rows=16)) as running:
        yield running


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().client.close()


def remote(server, **settings) -> RemoteCaptionLoss:
    OPEN.append(RemoteCaptionLoss(server.url, **{"timeout": 5.0, "wait": 0.001, "max_rows": 4, **settings}))
    return OPEN[-1]


def late(request, answer):
    """Answers come in another order than the questions."""
    time.sleep(zlib.crc32(str(request["rows"]).encode()) % 20 / 1000)
    return answer


def estimated(loss, kind=LikelihoodRatio, steps=3):
    torch.manual_seed(0)
    adapter = nn.Sequential(nn.Linear(3, 2 * WIDTH))
    site = {**SITE, "kind": "block" if kind is SPSA else "linear"}
    strategy = kind(sites=[site], seed=0, chunk_rows=32)
    strategy.bind(stage_network(adapter), loss)
    x, captions, counts = normal(len(LENGTHS), 3).float(), caption_ids(*LENGTHS), torch.tensor([8, 4, 10, 12, 6, 8])
    reports = [strategy.estimate(strategy.clean_pass(x, captions), counts) for _ in range(steps)]
    return strategy, gradients(adapter)["0.weight"], reports


@pytest.mark.parametrize("settings", [{}, {"bos": 1, "eos": 2}])
def test_losses_are_those_of_the_model_here(settings):
    loss, captions = model(**settings), caption_ids(*LENGTHS, padding=-7)
    z = 0.3 * normal(len(LENGTHS), 2, WIDTH).float()
    with ScoringServer(CaptionAnswers(loss, max_rows=16)) as server:
        other = remote(server)
        torch.testing.assert_close(other(z.flatten(1), captions), loss(z, captions))
        assert other.flops(captions).tolist() == loss.flops(captions).tolist()
        if loss.bos is not None:
            torch.testing.assert_close(other.score(None, captions), loss.score(None, captions))
        asked = replace(captions, given=np.array([1, 0, 4, 2, 0, 1]))
        torch.testing.assert_close(other(z, asked), loss(z, asked))
        assert not torch.allclose(loss(z, asked), loss(z, captions))
        twice = torch.tensor([3, 3, 3, 0])  # as a chunk is filled up
        before = other.client.usage.rows
        found = other(z[twice], captions.take(twice))
        torch.testing.assert_close(found, loss(z[twice], captions.take(twice)))
        assert other.client.usage.rows - before == 2


@pytest.mark.parametrize("kind", [LikelihoodRatio, SPSA])
def test_a_killed_slow_and_disordered_server_changes_no_bit_and_loses_no_query(server, kind):
    calm_loss = remote(server)
    calm, gradient, _ = estimated(calm_loss, kind)
    server.fault, server.change = storm(0.15, stalled=0.05, silent=0.3), late
    rough = remote(server, connections=8, timeout=0.2, attempts=20)
    killer = threading.Timer(0.3, restart, [server])
    killer.start()
    strategy, found, reports = estimated(rough, kind)
    killer.join()
    assert torch.equal(found, gradient)
    spent = 3 * (48 + 6)
    assert rough.client.usage.rows == calm_loss.client.usage.rows == spent
    assert [(report.queries, report.lost) for report in reports] == [(48, 0)] * 3
    total = strategy.meter.total()
    assert (total.queries, total.lost) == (3 * 48, 0)
    assert total.forward_equivalents == pytest.approx(calm.meter.total().forward_equivalents)
    assert rough.client.usage.retries > 0
    assert rough.client.usage.failed == 0


def restart(server):
    server.stop()
    time.sleep(0.3)
    server.start()


def test_what_is_given_up_is_lost_in_the_books(server):
    """Requests for perturbed rows, one in four."""
    chosen = lambda key: key.split("-")[2:3] == ["0"] and zlib.crc32(key.encode()) % 4 == 0  # noqa: E731
    server.fault = lambda key, attempt: (503, {}, b"") if chosen(key) else None
    loss = remote(server, attempts=1)
    with pytest.warns(RuntimeWarning, match="got no answer"):
        strategy, found, reports = estimated(loss)
    lost = sum(report.lost for report in reports)
    usage, total = loss.client.usage, strategy.meter.total()
    answered = sum(len(request["rows"]) for request in server.requests)
    assert 20 < lost < 3 * 24
    assert (total.queries, total.lost) == (3 * 48, lost)
    assert usage.rows == 3 * 54
    assert answered == usage.rows - lost
    assert usage.calls == len(server.requests) + usage.failed + usage.retries + 1  # 1: /info
    assert torch.isfinite(found).all()


def test_requests_name_site_and_draw_and_clean_rows_have_twice_the_attempts(server):
    estimated(remote(server), steps=2)
    places = {tuple(request["key"].split("-")[1:3]) for request in server.requests}
    assert places == {("0", "clean"), ("0", "0"), ("1", "clean"), ("1", "0")}


def test_it_cannot_be_differentiated(server):
    with pytest.raises(SettingError, match=r"RemoteCaptionLoss.*has no derivative"):
        Backprop().bind(stage_network(nn.Sequential(nn.Linear(3, 2 * WIDTH))), remote(server))


def test_automatic_rows_make_no_room_for_it(server):
    loss = remote(server)
    strategy = LikelihoodRatio(sites=[SITE], seed=0, chunk_rows="auto")
    strategy.bind(stage_network(nn.Sequential(nn.Linear(3, 2 * WIDTH))), loss)
    strategy.clean_pass(normal(6, 3).float(), caption_ids(*LENGTHS))
    assert loss.client.usage.rows == 6


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"kind": "losses"}, "kind = 'losses'"),
        ({"rows": list(range(17)), "ids": [[1]] * 17}, "17 rows in a request"),
        ({"ids": [[1], [2]]}, "2 captions or their given ids do not fit 1 rows"),
        ({"given": [0, 1]}, "1 captions or their given ids do not fit 1 rows"),
        ({"vectors": packed(torch.zeros(1, 3, WIDTH))}, r"shape \(1, 3, 16\), not \(1, 2, 16\)"),
        ({"ids": [[]]}, "has no tokens"),
        ({"ids": [[77]]}, "is no id of the language model"),
        ({"ids": [["x"]]}, "'x' is no whole number"),
        ({"ids": [[3, -100]]}, "-100 is no whole number, 0 or more"),
        ({"ids": [[3, 1.5]]}, "1.5 is no whole number"),
        ({"ids": [True]}, "Error"),
        ({"given": [-1]}, "-1 is no whole number"),
        ({"ids": [[1, 2]], "given": [2]}, "has no tokens"),
    ],
)
def test_bad_requests_are_refused_with_their_reason(request_, message):
    """Also those after the first, at which the model looks at no id."""
    answers = CaptionAnswers(model(), max_rows=16)
    answers({"kind": "captions", "rows": [0], "ids": [[1]], "vectors": packed(torch.zeros(1, 2, WIDTH))})
    given = {"kind": "captions", "rows": [0], "ids": [[1]], "vectors": packed(torch.zeros(1, 2, WIDTH)), **request_}
    with pytest.raises(BadRequest, match=message):
        answers(given)


def test_a_model_on_a_gpu_answers():
    """Vectors and ids come with the request, so they begin on the CPU."""
    here, request = model(), {"kind": "captions", "rows": [0], "ids": [[1, 2]], "given": [1]}
    request["vectors"] = packed(torch.ones(1, 2, WIDTH))
    expected = CaptionAnswers(here)(request)
    there = CaptionAnswers(here)
    with pretended_gpu():
        here.llm.to("cuda")
        found = there(request)
    torch.testing.assert_close(unpacked(found["values"]), unpacked(expected["values"]))


def test_a_server_of_something_else_is_refused(server):
    with pytest.raises(SettingError, match=r"service.max_rows = 32: is more than the 16 rows"):
        remote(server, max_rows=32)
    server.answers = type("Other", (), {"info": type("Info", (), {"as_dict": lambda self: {"features": 8}})()})()
    with pytest.raises(SettingError, match="tells nothing of captions at /info: it names no `width`"):
        remote(server)
