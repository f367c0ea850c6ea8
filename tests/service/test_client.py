"""The transport: what is repeated, what stops at once, what is counted, and what is never told."""

import copy
import email.utils
import logging
import pickle
import time
import warnings

import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.service import ServiceClient, ServiceSettings
from flops_lightning.service.client import Request
from flops_lightning.service.payload import packed
from flops_lightning.service.retries import Unanswered, _retry_after, patient
from tests.reference.scoring_server import ScoringServer, storm


class Echo:
    """Answers each row with its number, and half."""

    info = None

    def __call__(self, request):
        rows = request["rows"]
        return {"rows": rows, "values": packed(torch.tensor([[n, n + 0.5] for n in rows]))}


OPEN = []


def client_of(server, **settings):
    OPEN.append(ServiceClient(ServiceSettings(**{"url": server.url, "timeout": 5.0, "wait": 0.001, **settings})))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def numbers(client, count, largest=3):
    return client.rows(lambda rows: {"kind": "echo"}, count, (2,), largest=largest)[:, 0]


@pytest.fixture
def server():
    with ScoringServer(Echo()) as running:
        yield running


@pytest.mark.parametrize("connections", [1, 16])
def test_rows_come_in_order_whatever_the_number_of_connections(server, connections):
    client = client_of(server, connections=connections)
    assert numbers(client, 50).tolist() == list(range(50))
    assert (client.usage.calls, client.usage.rows, client.usage.retries) == (17, 50, 0)
    assert [len(request["rows"]) for request in sorted(server.requests, key=lambda r: r["rows"])] == [3] * 16 + [2]


def test_a_storm_loses_nothing_and_every_call_is_counted_once(server):
    server.fault = storm(0.15, stalled=0.05, silent=0.3)
    client = client_of(server, connections=16, timeout=0.2, attempts=12)
    assert numbers(client, 200).tolist() == list(range(200))
    usage = client.usage
    assert usage.retries > 5
    assert (usage.rows, usage.failed) == (200, 0)
    assert server.received == usage.calls == 67 + usage.retries
    assert sum(len(request["rows"]) for request in server.requests) == 200


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_say_later_are_repeated_and_then_the_rows_are_lost(server, status):
    client = client_of(server, attempts=3)
    server.fault = lambda key, attempt: (status, {}, b"") if key.split("-")[4] == "3" else None
    with pytest.warns(RuntimeWarning, match=f"1 of 3 requests .* 1 were given up after 3 attempts.*status {status}"):
        found = numbers(within(client), 9)
    assert found.isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert (client.usage.calls, client.usage.retries, client.usage.failed, client.usage.rows) == (5, 2, 1, 9)


def within(client, site="scores", draw=0):
    """The client, asking for rows of a site from now on."""
    client._place, client._first = NoiseKey(7, draw, site), 0
    return client


def test_a_broken_connection_and_silence_are_repeated(server):
    answers = {1: 0.0, 2: 0.5}
    server.fault = lambda key, attempt: answers.get(attempt)
    client = client_of(server, timeout=0.2, attempts=3)
    assert numbers(client, 2).tolist() == [0, 1]
    assert (client.usage.calls, client.usage.retries) == (3, 2)


def test_clean_evaluations_have_twice_the_attempts(server):
    server.fault = lambda key, attempt: (503, {}, b"") if attempt <= 3 else None
    with pytest.warns(RuntimeWarning, match=r"after 2 attempts"):
        assert numbers(within(client_of(server, attempts=2)), 2).isnan().all()
    server.attempts.clear()
    assert numbers(within(client_of(server, attempts=2), "clean"), 2).tolist() == [0, 1]


def test_an_answer_that_holds_nan_is_lost_at_once(server):
    server.change = lambda request, answer: answer | {"values": packed(torch.full((2, 2), torch.nan))}
    client = client_of(server)
    assert numbers(client, 2).isnan().all()
    assert (client.usage.calls, client.usage.failed) == (1, 0)


@pytest.mark.parametrize(
    ("status", "setting"),
    [(400, "url"), (401, "token_env"), (403, "token_env"), (404, "url"), (413, "max_rows"), (422, "url"), (302, "url")],
)
def test_refusals_stop_at_once_and_quote_the_first_line(server, status, setting, monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")
    server.fault = lambda key, attempt: (status, {}, b"no: s3cret is not welcome\nsecond line")
    client = client_of(server, token_env="SCORER_TOKEN")
    with pytest.raises(SettingError) as refused:
        numbers(client, 9)
    message = str(refused.value)
    assert message.startswith(f"service.{setting} = ")
    assert f"status {status}: no: *** is not welcome." in message
    assert "second" not in message
    assert client.usage.retries == 0
    server.fault = lambda key, attempt: None
    assert numbers(within(client), 9).tolist() == list(range(9))  # and it can be asked again


def test_the_token_is_sent_and_never_shown(server, monkeypatch, caplog):
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")
    client = client_of(server, token_env="SCORER_TOKEN", attempts=2)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        numbers(client, 2)
        server.fault = lambda key, attempt: (503, {}, b"s3cret")
        numbers(client, 2)
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    shown = caplog.text + str([w.message for w in warned]) + repr(client.settings) + repr(vars(client)["settings"])
    assert "s3cret" not in shown
    assert b"s3cret" not in pickle.dumps(client)
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(SettingError, match=r"service.token_env = 'SCORER_TOKEN': is the name of no environment"):
        client_of(server, token_env="SCORER_TOKEN")


WRONG = {
    "its rows are": lambda request, answer: answer | {"rows": answer["rows"][::-1]},
    "its values have the shape": lambda request, answer: answer | {"values": packed(torch.zeros(2, 3))},
    "bytes do not fill the shape": lambda request, answer: answer | {"values": {"shape": [2, 2], "data": "AAAA"}},
    "no array": lambda request, answer: answer | {"values": [1.0, 2.0]},
    "no mapping": lambda request, answer: [answer],
    "lacks what was just sent": lambda request, answer: {"missing": ["x"]},
}


@pytest.mark.parametrize("problem", WRONG)
def test_answers_of_the_wrong_shape_or_order_stop_at_once(server, problem):
    server.change = WRONG[problem]
    supplied = []

    def supply(lost):
        supplied.append(lost)
        return True

    with pytest.raises(SettingError, match=f"service.url = .*gave an answer that is none: .*{problem}"):
        client_of(server).rows(
            lambda rows: {}, 2, (2,), largest=2, supply=lambda lost: bool(supplied.append(lost)) or 1
        )
    assert len(supplied) == (3 if "lacks" in problem else 0)


def test_retry_after_is_respected_and_waits_fit_into_the_timeout():
    settings = ServiceSettings(url="http://x", timeout=1.0, wait=0.25)

    def wait(number, **told):
        outcome = type("Outcome", (), {"exception": lambda self: Unanswered("", **told)})()
        state = type("State", (), {"outcome": outcome, "attempt_number": number})
        return patient(settings, 5, None, lambda: None).wait(state)

    for number in (1, 2):
        usual = 0.25 * 2 ** (number - 1)
        waits = {wait(number) for _ in range(20)}
        assert len(waits) > 10  # jittered
        assert usual / 2 <= min(waits) < max(waits) <= usual
    assert wait(10) == 1.0
    assert wait(10, waited=0.75) == pytest.approx(0.25)
    assert wait(1, waited=1.0) == 0.0
    assert wait(1, waited=1.0, later=30.0) == 30.0
    assert wait(1, later=1e9) == 600.0
    assert _retry_after("7") == 7.0
    assert _retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert [_retry_after(told) for told in (None, "", "soon", "-1", "nan")] == [0.0] * 5


def test_the_server_is_asked_again_when_it_said(server):
    server.fault = lambda key, attempt: (503, {"Retry-After": "0.3"}, b"") if attempt == 1 else None
    started = time.monotonic()
    assert numbers(client_of(server), 2).tolist() == [0, 1]
    assert time.monotonic() - started >= 0.3


def test_a_dead_server_is_found_out_within_attempts_times_timeout():
    with ScoringServer(Echo()) as server:
        client = client_of(server, attempts=3, timeout=1.0, connections=2)
    started = time.monotonic()
    with pytest.raises(SettingError, match=r"service.url = .*does not answer: ConnectError"):
        client.info()
    assert time.monotonic() - started < 3
    client.usage.calls = client.usage.retries = client.usage.failed = 0
    with pytest.warns(RuntimeWarning, match=r"10 of 10 requests to http.* got no answer; [12] were given up after 3"):
        assert numbers(within(client), 30).isnan().all()
    assert client.usage.calls == client.usage.retries + client.usage.failed
    assert client.usage.failed <= 2  # the others were not even asked
    assert client.usage.rows == 3 * client.usage.failed
    with pytest.warns(RuntimeWarning, match=r"after 1 attempts"):
        numbers(client, 3)  # nor does the rest of the step wait as long
    with server:
        assert numbers(within(client, draw=1), 3).tolist() == [0, 1, 2]


def test_silence_is_found_out_within_attempts_times_timeout(server):
    server.fault = lambda key, attempt: 5.0
    client = client_of(server, attempts=3, timeout=0.2, connections=2)
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"ReadTimeout"):
        assert numbers(within(client), 30).isnan().all()
    assert time.monotonic() - started < 1.0


def test_keys_name_seed_draw_site_and_first_row_and_stay_the_same_in_every_attempt(server):
    server.fault = lambda key, attempt: (503, {}, b"") if attempt == 1 else None
    client = client_of(server)
    with client.rows_of(NoiseKey(7, 3, "image prompt", 1)):
        numbers(client, 4)
        numbers(client, 2)  # another chunk of the same site
    keys = [key.rsplit("-", 1)[0] for key in server.attempts]
    assert sorted(keys) == ["7-3-image%20prompt-1-0", "7-3-image%20prompt-1-3", "7-3-image%20prompt-1-4"]
    assert set(server.attempts.values()) == {2}


def test_a_cost_is_counted_once_also_if_the_request_is_sent_again(server):
    client = client_of(server)
    missing = iter([{"missing": ["x"]}])
    server.change = lambda request, answer: next(missing, answer)
    request = Request(lambda: {"rows": [0]}, cost={"rows": 1, "text_passes": 4})
    assert client.ask([request], lambda lost: lost == [["x"]])[0]["rows"] == [0]
    assert (client.usage.calls, client.usage.rows, client.usage.text_passes) == (2, 1, 4)


def test_copies_count_in_one_place_and_a_pickled_client_connects_anew(server):
    client = client_of(server)
    numbers(client, 3)
    assert copy.deepcopy([client])[0] is client
    other = pickle.loads(pickle.dumps(client))
    assert numbers(other, 3).tolist() == [3, 4, 5]
    assert (client.usage.calls, other.usage.calls) == (1, 2)
    other.close()
    client.close()
    assert numbers(client, 3).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://x"}, "service.url = 'ftp://x': is not the address of a web service. Write, for example, http"),
        ({"url": "localhost:8000"}, "is not the address of a web service"),
        ({"url": "http://[x"}, "is not the address of a web service"),
        ({"url": "http://me:word@host/a"}, "service.url = 'http://host/a': holds a user or password.*token_env"),
        ({"connections": 0}, "service.connections = 0"),
        ({"max_rows": -1}, "service.max_rows = -1"),
        ({"timeout": 0.0}, "service.timeout = 0.0"),
        ({"attempts": 0}, "service.attempts = 0"),
        ({"wait": -1.0}, "service.wait = -1.0"),
        ({"images_mb": 0}, "service.images_mb = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(SettingError, match=message) as refused:
        ServiceClient(ServiceSettings(**{"url": "http://localhost", **settings}))
    assert "word" not in str(refused.value).replace("password", "")
