"""Benchmarks, each with its own command: ``python -m benchmarks``, ``python -m benchmarks.memory``, and so on.

Only ratios of times taken side by side in one process are reported; absolute times say more about the machine.
"""
