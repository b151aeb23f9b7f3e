"""Measured and predicted milliseconds: clocks, interleaved comparisons, latency tables and the proxy."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
