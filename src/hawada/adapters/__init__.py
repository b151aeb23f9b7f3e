"""What a model family declares, how its models are saved and loaded, and how gates are attached to them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
