"""The example of a server, in a process of its own on the loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.prompts import ClassTexts
from flops_lightning.service import HttpScorer, LocalScorer
from flops_lightning.tasks.clip_model import load_clip
from tests.clip_digits import MODEL

ROOT = Path(__file__).parents[2]
pytest.importorskip("litserve", reason="the example is made with it")
pytestmark = pytest.mark.slow  # the server takes seconds to start


@pytest.fixture(scope="module")
def url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "examples/clip_server.py", "--model", MODEL["model_name"], "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CLIP_SERVER_TOKEN": "s3cret"}
    server = subprocess.Popen([*command, "--device", "cpu", "--max_rows", "16"], cwd=ROOT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        yield address
    finally:
        server.terminate()
        server.wait(30)


def scorer_of(url, **settings):
    # It is not up yet: two minutes of attempts.
    service = {"token_env": "SCORER", "wait": 0.5, "attempts": 20, "timeout": 8.0, **settings}
    return HttpScorer(url, MODEL["class_names"], MODEL["template"], **service)


def test_the_example_answers_as_the_model_here(url, monkeypatch):
    monkeypatch.setenv("SCORER", "s3cret")
    scorer = scorer_of(url)
    clip, tokenizer = load_clip(MODEL["model_name"], "")
    local = LocalScorer(clip, ClassTexts(clip, MODEL["class_names"], MODEL["template"], tokenizer))
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(40, 3, 8, 8, generator=generator), torch.arange(40) % 10
    text = scorer.words(4) + 0.1 * torch.randn(40, 4, scorer.info.text_width, generator=generator)
    image = torch.randn(40, 2, scorer.info.image_width, generator=generator)
    names = scorer.keep(images)
    assert torch.equal(names, local.keep(images))
    for ask in (
        lambda each: each.encode_text(text),
        lambda each: each.encode_image(names, image),
        lambda each: each.logits(names, text, image),
    ):
        found, expected = ask(scorer), ask(local)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found, expected = (each.losses(names, labels, text, image) for each in (scorer, local))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert scorer.usage.rows == 160
    assert scorer.usage.failed == 0
    assert not (ROOT / "client.py").exists()
    scorer.client.close()


def test_the_example_refuses_a_wrong_token_and_says_what_is_wrong_with_a_request(url, monkeypatch):
    monkeypatch.setenv("SCORER", "s3cret")
    scorer = scorer_of(url)
    with pytest.raises(SettingError, match=r"status 413: .*17 rows in a request"):
        scorer.client.rows(lambda rows: {"kind": "patches", "images": []}, 17, (), largest=17)
    scorer.client.close()
    monkeypatch.setenv("SCORER", "guess")
    with pytest.raises(SettingError, match=r"service.token_env = 'SCORER': .* status 401: .*wrong token"):
        scorer_of(url)
