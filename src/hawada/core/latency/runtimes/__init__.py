"""How a model is run while it is timed: eager, as a CUDA graph, or compiled."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
