"""What is known of each operator of a graph: which pass channels on, and what they do to zeros and signs."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

# Each channel by itself (or the same elements in the same order), and 0 stays 0.
PASSING_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish,
    nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
PASSING = {
    "dropout", "dropout2d", "feature_dropout", "stochastic_depth", "contiguous", "clone",
    "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "tanh", "elu", "celu", "selu", "mish",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate",
}  # fmt: skip

# Each channel by itself, but 0 becomes something else: a gate before it would not do what slicing does.
SHIFTING_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)
SHIFTING = {"sigmoid", "hardsigmoid", "softplus", "exp", "logsigmoid"}

SUMS = {"add", "sub"}
PRODUCTS = {"mul", "div", "truediv"}

# Never negative, whatever comes; and never negative where what comes is not.
POSITIVE = {"relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "exp"}
POSITIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
KEEPING_SIGN = {
    "dropout", "stochastic_depth", "contiguous", "clone", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "flatten", "mean", "amax", "getitem", "pad", "add", "mul", "cat", "concat",
}  # fmt: skip
KEEPING_SIGN_MODULES = (
    nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
    nn.ZeroPad2d,
)  # fmt: skip

NORMS = tuple(
    norm
    for size in "123"
    for norm in (getattr(nn, f"BatchNorm{size}d"), getattr(nn, f"InstanceNorm{size}d"))
)  # fmt: skip
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def operator_name(node: fx.Node) -> str:
    """The name of a function or method, the same for all its spellings; "" for one that is not torch's own."""
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
    """Whether a module computes what one of these classes does: a subclass with a forward of its own does not."""
    return any(isinstance(module, cls) and type(module).forward is cls.forward for cls in classes)


def is_norm(module: nn.Module) -> bool:
    """Whether it normalises each channel by itself."""
    return isinstance(module, _NormBase) and is_type(module, NORMS)


def never_negative(node: fx.Node, model: nn.Module) -> bool:
    """Whether nothing that a node evaluates to can be below zero."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if is_type(module, POSITIVE_MODULES):
            return True
        keeps = is_type(module, KEEPING_SIGN_MODULES)
    else:
        name = operator_name(node)
        if name in POSITIVE:
            return True
        keeps = name in KEEPING_SIGN and all(not _is_negative(arg) for arg in (*node.args, *node.kwargs.values()))
    return keeps and bool(node.all_input_nodes) and all(never_negative(n, model) for n in node.all_input_nodes)


def _is_negative(argument: Any) -> bool:
    return isinstance(argument, int | float) and argument < 0
