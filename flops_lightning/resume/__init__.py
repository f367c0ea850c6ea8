"""Runs that are stopped and go on: checkpoint files, signals, and what a resumed run obeys or refuses."""

from __future__ import annotations
