"""Any network whose forward pass torch.fx can follow: the groups are read from the graph of that pass."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
