"""What a model's time is spent on, and how much of it pruning could take away, found before any training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
