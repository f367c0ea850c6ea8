"""Runs that are stopped and go on: checkpoint files, signals, and what a resumed run obeys or refuses."""
