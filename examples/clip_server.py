"""A CLIP behind a web service, for prompts to be tuned from elsewhere: ``python examples/clip_server.py``.

``pip install -e ".[server]"`` installs LitServe. ``--model`` and ``--pretrained`` are those of open_clip;
``docs/service.md`` has the protocol. With the variable CLIP_SERVER_TOKEN set, clients must bring that token
(``service: {token_env: CLIP_SERVER_TOKEN}``).
"""

import argparse
import os
import secrets
from typing import Any

import litserve as ls
from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from flops_lightning.service import BadRequest, ClipAnswers
from flops_lightning.tasks.clip_model import load_clip

TOKEN = "CLIP_SERVER_TOKEN"


class ClipAPI(ls.LitAPI):
    """Answers one request after the other; images and classes that were handed over stay in its one worker."""

    def __init__(self, model: str, pretrained: str, max_rows: int) -> None:
        super().__init__(api_path="/score")
        self.model, self.pretrained, self.max_rows = model, pretrained, max_rows

    def answers(self, device: str) -> ClipAnswers:
        """The model on a device."""
        clip, tokenizer = load_clip(self.model, self.pretrained)
        name = f"{self.model} {self.pretrained}".strip()
        return ClipAnswers(clip.to(device), tokenizer=tokenizer, model=name, max_rows=self.max_rows)

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        self.answer = self.answers(device)

    def predict(self, x: Any) -> Any:
        """Score; what is wrong with a request is told with its status."""
        try:
            return self.answer(x)
        except BadRequest as error:
            raise HTTPException(error.status, str(error)) from error


class TokenAPI(ClipAPI):
    """The same for those who bring the token."""

    def authorize(self, auth: HTTPAuthorizationCredentials = Depends(HTTPBearer())) -> None:  # noqa: B008
        """Compare the token; LitServe calls this before every request."""
        if not secrets.compare_digest(auth.credentials, os.environ[TOKEN]):
            raise HTTPException(401, "wrong token")


def main(args: list[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A CLIP behind a web service.")
    parser.add_argument("--model", default="ViT-B-32-quickgelu", help="of open_clip, or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="weights of open_clip, such as openai, or a file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_rows", type=int, default=256, help="most rows of a request")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    given = parser.parse_args(args)
    api = (TokenAPI if os.environ.get(TOKEN) else ClipAPI)(given.model, given.pretrained, given.max_rows)
    info = api.answers("cpu").info
    # One worker: it alone has what was handed over.
    settings = {"accelerator": given.device, "devices": 1, "workers_per_device": 1, "timeout": False}
    server = ls.LitServer(api, model_metadata=info.as_dict(), max_payload_size=2 * info.max_bytes, **settings)
    server.run(host=given.host, port=given.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
