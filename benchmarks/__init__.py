"""Speed of a training step beside the inference it is made of: ``python -m benchmarks``.

Only ratios of times taken side by side in one process are reported; absolute times say more about the machine.
"""

from __future__ import annotations

from benchmarks.cases import Case, full_cases, quick_cases
from benchmarks.measurement import measure
from benchmarks.timing import Ratio, Timings, alternate

__all__ = ["Case", "Ratio", "Timings", "alternate", "full_cases", "measure", "quick_cases"]
