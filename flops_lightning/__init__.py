"""Train networks with forward passes only, and spend the queries where they reduce the variance most.

Names are imported when they are first used (``__init__.pyi`` lists them), so ``import flops_lightning`` is fast and
loads neither torch nor Lightning.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
