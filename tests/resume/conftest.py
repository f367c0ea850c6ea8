from __future__ import annotations

from tests.tasks.conftest import digits, make_task, make_trainer

__all__ = ["digits", "make_task", "make_trainer"]
