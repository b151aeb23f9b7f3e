"""HawAda: pretrained models slimmed to a measured latency budget on the GPU (or CPU) at hand."""

from hawada.api import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"
