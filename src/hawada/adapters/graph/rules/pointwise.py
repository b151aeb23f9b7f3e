"""Operators that compute every element by itself, and those that mix elements of one axis."""

from __future__ import annotations

import numpy as np

from hawada.adapters.graph.labels import Field, Fields, along, axes_of, compress
from hawada.adapters.graph.trace import Op, Value
from hawada.adapters.graph.walk import Walk, rules

POINTWISE = rules()


@POINTWISE.rule(
    "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "tanh", "elu", "celu", "selu", "mish",
    "hardtanh", "hardshrink", "softshrink", "threshold", "sigmoid", "hardsigmoid", "softplus", "log_sigmoid",
    "log_sigmoid_forward", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal",
    "neg", "abs", "sign", "sgn", "square", "pow", "erf", "sin", "cos", "tan", "atan", "floor", "ceil", "round", "trunc",
    "clamp", "clamp_min", "clamp_max", "nan_to_num", "isnan", "isinf", "logical_not", "bitwise_not", "clone", "detach",
    "alias", "lift_fresh", "contiguous", "_to_copy", "to", "native_dropout", "dropout", "view_as", "positive",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "fill", "zero",
    "hardsigmoid_backward", "lift",
    "feature_dropout", "logit", "frac", "acos", "asin", "cosh", "sinh",
)  # fmt: skip
def elementwise(op: Op, walk: Walk) -> list[Fields]:
    """Nothing but the first tensor has channels, and the result has its shape."""
    given = op.inputs[0]
    if any(walk.fields(other) for other in op.inputs[1:]):
        return combined(op, walk)
    return [walk.fields(given) if made.shape == given.shape else () for made in op.outputs]


@POINTWISE.rule(
    "add", "sub", "rsub", "mul", "div", "true_divide", "where", "maximum", "minimum", "fmod", "remainder", "eq", "ne",
    "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "atan2", "lerp",
    "addcmul", "addcdiv", "floor_divide", "_prelu_kernel", "prelu", "masked_fill", "copysign", "xlogy", "hypot",
)  # fmt: skip
def combined(op: Op, walk: Walk) -> list[Fields]:
    given = [(value, walk.fields(value)) for value in op.inputs]
    found = compress(walk.merged(op, given))
    if op.name in ("add", "sub"):
        moving = [value for value, fields in given if fields and not value.constant]
        if len(moving) > 1:
            walk.sums += [(op, field.reshape(-1)) for field in found]
    return [found]


@POINTWISE.rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort",
                "topk", "argsort", "logcumsumexp", )  # fmt: skip
def within_axis(op: Op, walk: Walk) -> list[Fields]:
    """Elements of one axis are mixed; channels on it stay."""
    given: Value = op.args[0]
    axis = op.argument(2 if op.name == "topk" else 1, "dim", -1) % max(len(given.shape), 1)
    found = [walk.collapse(op, field, [axis], "mixes channels") for field in walk.fields(given)]
    return [compress(found) for _ in op.outputs]


@POINTWISE.rule("triu", "tril")
def one_side(op: Op, walk: Walk) -> list[Fields]:
    """Which elements of the last two axes are left depends on their numbers."""
    rank = len(op.args[0].shape)
    reason = "picks channels by their numbers"
    return [compress(walk.collapse(op, field, [rank - 2, rank - 1], reason) for field in walk.fields(op.args[0]))]


@POINTWISE.rule("native_layer_norm", "_fused_rms_norm")
def normalised(op: Op, walk: Walk) -> list[Fields]:
    """A norm over the last axes that is not a module of its own: what lies along them stays together."""
    given: Value = op.args[0]
    rank, over = len(given.shape), len(op.args[1])
    found = [
        walk.collapse(op, field, range(rank - over, rank), "takes statistics over channels")
        for field in walk.fields(given)
    ]
    for value in op.inputs[1:]:
        walk.keep(op, value, "takes statistics over channels")
    return [compress(found), *([()] * (len(op.outputs) - 1))]


@POINTWISE.rule("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "norm", "prod",
                "any", "all", "argmax", "argmin", "logsumexp", "linalg_vector_norm", "median",
                "count_nonzero")  # fmt: skip
def reduced(op: Op, walk: Walk) -> list[Fields]:
    """Reductions over other axes leave channels alone."""
    given: Value = op.args[0]
    rank = len(given.shape)
    at = 2 if op.name in ("norm", "linalg_vector_norm") else 1
    dims = op.argument(at, "dim")
    if op.name in ("max", "min") and isinstance(dims, Value):  # the larger of two tensors
        return combined(op, walk)
    listed = (
        sorted({int(dim) % max(rank, 1) for dim in np.atleast_1d(dims)})
        if dims not in (None, [])
        else list(range(rank))
    )
    whole = [walk.collapse(op, field, listed, "sums over channels") for field in walk.fields(given)]
    return [
        compress(field if len(output.shape) == rank else field.squeeze(tuple(listed)) for field in whole)
        for output in op.outputs
    ]


@POINTWISE.rule(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "mkldnn_max_pool2d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
    "upsample_trilinear3d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "max_pool1d_with_indices", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
)  # fmt: skip
def pooled(op: Op, walk: Walk) -> list[Fields]:
    """The last axes are pooled or resized; channels lie before them."""
    given: Value = op.args[0]
    output, rank = op.output.shape, len(given.shape)
    resized = _spatial_axes(op, rank)
    found = []
    for field in walk.fields(given):
        if any(axis >= rank - resized for axis in axes_of(field)):
            walk.keep_field(op, field, "pools over channels")
        else:
            found.append(field)
    return [compress(found) if made.shape == output else () for made in op.outputs]


def _spatial_axes(op: Op, rank: int) -> int:
    """How many of the last axes an operator pools, which its name tells."""
    digits = [int(letter) for letter in op.name if letter.isdigit()]
    return digits[0] if digits else rank - 2


@POINTWISE.rule("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "new_zeros", "new_ones", "new_full",
                "new_empty", "linspace", "eye", "rand", "randn", "meshgrid", "empty_strided", "new_empty_strided",
                "randint", "randperm", "bincount", "nonzero", "_local_scalar_dense", "item", "is_same_size",
                "_assert_async", "_assert_tensor_metadata", "sym_size", "numel", "nms")  # fmt: skip
def made(op: Op, walk: Walk) -> list[Fields]:
    """The result has no channels, whatever was given."""
    return [() for _ in op.outputs]


@POINTWISE.rule("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training", "miopen_batch_norm",
                "_native_batch_norm_legit", "_batch_norm_no_update", "_batch_norm_with_update",
                "_native_batch_norm_legit_functional", "batch_norm")  # fmt: skip
def batch_normalised(op: Op, walk: Walk) -> list[Fields]:
    """Each channel is normalised by itself: it and its statistics are one."""
    given: Value = op.args[0]
    rank = len(given.shape)
    found: list[Field] = []
    own = [value for value in op.inputs[1:] if value.shape == given.shape[1:2]]
    for field in walk.fields(given):
        if axes_of(field) == [1] or (all(axis == 0 for axis in axes_of(field)) and op.name != "native_batch_norm"):
            found.append(field)
        else:
            walk.keep_field(op, field, "takes statistics over channels")
    for value in own:
        for tracked in walk.fields(value):
            shaped = along(tracked.reshape(-1), 1, rank)
            if found:
                walk.labels.couple(found[0], shaped)
                walk.passes(op, tracked.reshape(-1))
            else:
                walk.labels.keep(tracked)
    return [compress(found), *([()] * (len(op.outputs) - 1))]
