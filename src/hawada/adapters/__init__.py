"""Adapters declare what may be removed from a model family; their models are gated, saved and loaded here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
