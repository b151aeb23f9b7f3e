"""Any network whose forward pass can be followed: what may be removed is read from its graph."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
