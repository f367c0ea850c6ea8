"""What a run would cost, said before it starts: ``python main.py plan``.

``cost``: the length of a run and the cost of a step, as pure functions. ``measurement``: a few real steps, timed by
``stopwatch``. ``plan``: all of it together, and the same as text. ``trainer``: the command.
"""

from __future__ import annotations
