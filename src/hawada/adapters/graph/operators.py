"""Facts about the operators of a graph: which of them pass channels on, and what they do to zeros and signs."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

# These treat each channel by itself (or keep the same elements in the same order), and 0 stays 0.
ZERO_KEEPING_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish,
    nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
ZERO_KEEPING_FUNCTIONS = {
    "dropout", "dropout2d", "feature_dropout", "stochastic_depth", "contiguous", "clone",
    "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "tanh", "elu", "celu", "selu", "mish",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate",
}  # fmt: skip

# These treat each channel by itself, but 0 becomes something else: a gate before them would not equal slicing.
ZERO_CHANGING_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)
ZERO_CHANGING_FUNCTIONS = {"sigmoid", "hardsigmoid", "softplus", "exp", "logsigmoid"}

SUM_FUNCTIONS = {"add", "sub"}
PRODUCT_FUNCTIONS = {"mul", "div", "truediv"}

# The first two return nothing negative whatever their input is, the sign-keeping ones where no input is negative.
NON_NEGATIVE_FUNCTIONS = {"relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "exp"}
NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
SIGN_KEEPING_FUNCTIONS = {
    "dropout", "stochastic_depth", "contiguous", "clone", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "flatten", "mean", "amax", "getitem", "pad", "add", "mul", "cat", "concat",
}  # fmt: skip
SIGN_KEEPING_MODULES = (
    nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
    nn.ZeroPad2d,
)  # fmt: skip

NORM_MODULES = tuple(
    norm
    for size in "123"
    for norm in (getattr(nn, f"BatchNorm{size}d"), getattr(nn, f"InstanceNorm{size}d"))
)  # fmt: skip
CONVOLUTION_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def operator_name(node: fx.Node) -> str:
    """Return the name of a function or method, the same for all its spellings; "" where it is not torch's own."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    if node.op != "call_function":
        return ""
    target: Any = node.target
    origin = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    if origin not in ("torch", "torchvision", "_operator", "builtins"):
        return ""
    name = str(getattr(target, "__name__", "")).rstrip("_")
    return name[1:] if origin == "_operator" and name in ("iadd", "isub", "imul", "itruediv") else name


def is_type(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a module computes what one of these classes does; a subclass with its own forward does not."""
    return any(isinstance(module, cls) and type(module).forward is cls.forward for cls in classes)


def is_channel_norm(module: nn.Module) -> bool:
    """Return whether a module normalises each channel by itself."""
    return isinstance(module, _NormBase) and is_type(module, NORM_MODULES)


def never_negative(node: fx.Node, model: nn.Module) -> bool:
    """Return whether no element of the value of a node can be below zero."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if is_type(module, NON_NEGATIVE_MODULES):
            return True
        keeps = is_type(module, SIGN_KEEPING_MODULES)
    else:
        name = operator_name(node)
        if name in NON_NEGATIVE_FUNCTIONS:
            return True
        keeps = name in SIGN_KEEPING_FUNCTIONS and all(
            not _is_negative(arg) for arg in (*node.args, *node.kwargs.values())
        )
    return keeps and bool(node.all_input_nodes) and all(never_negative(n, model) for n in node.all_input_nodes)


def _is_negative(argument: Any) -> bool:
    return isinstance(argument, int | float) and argument < 0
