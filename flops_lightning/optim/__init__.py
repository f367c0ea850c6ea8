"""Optimisers, their schedules, and the clipping of gradients."""
