"""The tables of the documentation as commands."""
