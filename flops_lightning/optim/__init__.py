"""Optimisers, their schedules, and the clipping of gradients."""

from __future__ import annotations
