"""What a run would cost, said before it is begun: ``python main.py plan``.

``length``: samples, steps and validations, as pure functions. ``cost``: what a step costs, read from a few of them.
``measurement``: those few steps, timed by ``stopwatch``, with ``memory`` at their peak; ``measured`` is what was seen.
``plan``: all of it together. ``table``: the same as text. ``trainer``: the command.
"""

from __future__ import annotations
