"""What each stage found out, as frozen dataclasses that come back from JSON as they were."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
