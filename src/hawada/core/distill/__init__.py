"""Knowledge distillation: how a student's outputs are compared with the teacher's."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
