"""What may be removed from a model, which units stay, and the smaller model that follows from both."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
