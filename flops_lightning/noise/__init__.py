"""Random numbers that are functions of keys: which entry of which row is drawn, never when."""

from __future__ import annotations
