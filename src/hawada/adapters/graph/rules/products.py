"""Operators that mix channels: convolutions, products of matrices, attention."""

from __future__ import annotations

from collections.abc import Sequence

from hawada.adapters.graph.labels import Field, Fields, along, axes_of, compress
from hawada.adapters.graph.trace import Op, Value
from hawada.adapters.graph.walk import Walk, rules

PRODUCTS = rules()
MULTIPLYING = {"mm", "bmm", "addmm", "baddbmm", "convolution"}
BETWEEN_ACTIVATIONS = "multiplies activations with each other over channels"


@PRODUCTS.rule("convolution", "_convolution", "convolution_overrideable")
def convolved(op: Op, walk: Walk) -> list[Fields]:
    given, weight, bias = op.args[0], op.args[1], op.args[2]
    transposed, groups = bool(op.args[6]), int(op.args[8])
    rank, unbatched = len(given.shape), len(given.shape) != len(weight.shape)
    if unbatched:
        return walk.stop(op, "is given one image without a batch")
    inner, outer = (0, 1) if transposed else (1, 0)
    entering = [field for field in walk.fields(given) if axes_of(field) == [1]]
    passing = [field for field in walk.fields(given) if _is_pointwise_along(op, axes_of(field))]
    for field in walk.fields(given):
        if axes_of(field) != [1] and not any(field is other for other in passing):
            walk.keep_field(op, field, "is convolved along the axis of channels")
    for field in walk.fields(weight):
        if axes_of(field) not in ([inner], [outer]):
            walk.labels.keep(field)
    read, written = (_axis(walk, weight, axis) for axis in (inner, outer))
    if groups > 1:
        return [(*_grouped(op, walk, entering, groups, transposed)[0], *passing)]
    if entering and read is not None:
        walk.labels.couple(entering[0].reshape(-1), read)
        walk.consume(op, read)
    elif read is not None:
        walk.labels.keep(read)
    elif entering:
        walk.keep_field(op, entering[0], "is convolved with a weight that is not a parameter's")
    return [(*_written(op, walk, written, bias, rank), *passing)]


def _is_pointwise_along(op: Op, axes: list[int]) -> bool:
    """Return whether a convolution treats the places along these axes behind the channels one by one."""
    weight, stride, padding = op.args[1], op.args[3], op.args[4]
    if not axes or any(axis < 2 for axis in axes):
        return False
    settings = [(weight.shape[axis], _of_axis(stride, axis), _of_axis(padding, axis)) for axis in axes]
    return all(setting == (1, 1, 0) for setting in settings)


def _of_axis(setting: int | Sequence[int], axis: int) -> int:
    """The stride or padding along an axis behind the channels."""
    if isinstance(setting, int):
        return setting
    return setting[axis - 2] if len(setting) > 1 else setting[0]


def _grouped(op: Op, walk: Walk, entering: list[Field], groups: int, transposed: bool) -> list[Fields]:
    """A convolution with groups: each channel by itself, or as many of every group."""
    given, weight, bias = op.args[0], op.args[1], op.args[2]
    rank = len(given.shape)
    own = _axis(walk, weight, 0)  # of a transposed one these are the input channels
    if weight.shape[1] == 1 and (not transposed or weight.shape[0] == groups):
        if own is None or not entering:
            for value in (weight, *([bias] if bias is not None else [])):
                for field in walk.fields(value):
                    walk.labels.keep(field)
            for field in entering:
                walk.keep_field(op, field, "is convolved with a weight that is not a parameter's")
            return [()]
        table = own.reshape(groups, -1)  # one row per input channel
        walk.labels.couple(table, entering[0].reshape(groups, -1))
        walk.passes(op, own)
        for field in () if bias is None else walk.fields(bias):
            walk.labels.couple(field.reshape(-1), own)
            walk.passes(op, field.reshape(-1))
        return [compress([along(own, 1, rank)])]
    inner, outer = _axis(walk, weight, 0 if transposed else 1), _axis(walk, weight, 1 if transposed else 0)
    if transposed:
        for labels in (inner, outer):
            if labels is not None:
                walk.labels.keep(labels)
        return walk.stop(op, "is a transposed convolution with groups")
    if entering and inner is not None:
        table = entering[0].reshape(groups, -1)  # one row per group of the convolution: a unit is one column
        walk.labels.couple(table, table[:1])
        walk.labels.couple(table[0], inner)
        walk.consume(op, inner, groups)
    else:
        for labels in (inner, *(field.reshape(-1) for field in entering)):
            if labels is not None:
                walk.labels.keep(labels)
    if outer is not None:
        table = outer.reshape(groups, -1)
        walk.labels.couple(table, table[:1])
    return [_written(op, walk, outer, bias, rank)]


def _written(op: Op, walk: Walk, written: Field | None, bias: Value | None, rank: int) -> Fields:
    """The channels that a convolution makes, which its bias has too."""
    biases = [] if bias is None else [field.reshape(-1) for field in walk.fields(bias)]
    if written is None:
        for labels in biases:
            walk.labels.keep(labels)
        return ()
    walk.produce(op, written)
    for labels in biases:
        walk.labels.couple(labels, written)
        walk.produce(op, labels)
    if bias is not None and not biases and bias.shape[0] > 1:
        walk.keep_field(op, written, "adds a bias that is not a parameter's")
    return compress([along(written, 1, rank)])


def _axis(walk: Walk, value: Value, axis: int) -> Field | None:
    """The labels along one axis of a weight; None where it has none there alone."""
    found = [field for field in walk.fields(value) if axes_of(field) == [axis]]
    return found[0].reshape(-1) if len(found) == 1 else None


@PRODUCTS.rule("mm", "bmm", "addmm", "baddbmm")
def multiplied(op: Op, walk: Walk) -> list[Fields]:
    """A product of matrices, (…, i, k) x (…, k, j), to which addmm adds something of shape (…, i, j)."""
    adds = op.name in ("addmm", "baddbmm")
    left, right = op.args[adds : adds + 2]
    found = product(op, walk, left, right)
    if adds:
        added: Value = op.args[0]
        merged = walk.merged(op, [(op.output, found), (added, walk.fields(added))])
        if added.constant:
            for field in walk.fields(added):
                walk.produce(op, field.reshape(-1))
        elif any(walk.fields(added)):
            walk.sums += [(op, field.reshape(-1)) for field in merged]
        return [compress(merged)]
    return [compress(found)]


def product(op: Op, walk: Walk, left: Value, right: Value) -> list[Field]:
    """Couple the channels of a product (…, i, k) x (…, k, j) and return those of its result."""
    rank = len(left.shape)
    i, k, ours, theirs = rank - 2, rank - 1, list(walk.fields(left)), list(walk.fields(right))
    ours = [_of_batch(walk, field, rank) for field in ours]
    theirs = [_of_batch(walk, field, rank) for field in theirs]
    over = [[field for field in ours if field.shape[k] > 1], [field for field in theirs if field.shape[i] > 1]]
    if any(over):
        _contract(op, walk, left, right, *over)
    batch = [
        (value, [field for field in fields if any(axis < i for axis in axes_of(field))])
        for value, fields in ((left, ours), (right, theirs))
    ]
    shaped = [(Value((*value.shape[:i], 1, 1)), fields) for value, fields in batch]
    found = walk.merged(op, shaped)
    found += [field for field in ours if axes_of(field) == [i]]
    columns = [field for field in theirs if axes_of(field) == [k]]
    found += columns
    left_is_weight, right_is_weight = _weights(left, right)
    if right_is_weight and not left_is_weight:
        for field in columns:
            walk.produce(op, field.reshape(-1))
    if left_is_weight and not right_is_weight:
        for field in (field for field in ours if axes_of(field) == [i]):
            walk.produce(op, field.reshape(-1))
    return found


def _weights(left: Value, right: Value) -> tuple[bool, bool]:
    """Tell which of two factors is the weight.

    Where both depend on parameters and buffers alone, as in a network that computes position biases, that is the one
    which no product has made and which is made of a parameter called a weight.
    """
    if left.constant and right.constant:
        return _is_weight(left), _is_weight(right)
    return left.constant, right.constant


def _is_weight(value: Value) -> bool:
    if value.op is None:
        return value.name.endswith("weight")
    return value.op.name not in MULTIPLYING and any(_is_weight(given) for given in value.op.inputs)


def _of_batch(walk: Walk, field: Field, rank: int) -> Field:
    """What goes with a matrix of the batch goes with all of it: such a field differs along the batch alone."""
    if not any(axis < rank - 2 for axis in axes_of(field)) or all(axis < rank - 2 for axis in axes_of(field)):
        return field
    whole = field[..., :1, :1]
    walk.labels.couple(field, whole)
    return whole


def _contract(op: Op, walk: Walk, left: Value, right: Value, over: list[Field], under: list[Field]) -> None:
    """Channels that are summed over must be read by a parameter; those of two activations stay."""
    ours = over[0].reshape(-1) if over and len(axes_of(over[0])) == 1 else None
    theirs = under[0].reshape(-1) if under and len(axes_of(under[0])) == 1 else None
    left_is_weight, right_is_weight = _weights(left, right)
    if ours is not None and theirs is not None and left_is_weight != right_is_weight:
        walk.labels.couple(ours, theirs)
        walk.consume(op, theirs if right_is_weight else ours)
        return
    for field in (*over, *under):
        if left_is_weight != right_is_weight and (not over or not under):
            walk.labels.keep(field)  # a weight whose inputs are no channels
            if not (left_is_weight if over else right_is_weight):
                walk.keep_field(op, field, "is multiplied with something that has no channels")
        else:
            walk.keep_field(op, field, BETWEEN_ACTIVATIONS)


@PRODUCTS.rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def attended(op: Op, walk: Walk) -> list[Fields]:
    """softmax(q k^T) v with q, k, v of shape (batch, heads, tokens, size): heads are the units, or the size of v."""
    query, key, value = op.args[:3]
    rank = len(query.shape)
    for given in op.inputs:  # tokens are mixed, and what a mask says of them means others when some are gone
        for field in walk.fields(given):
            if field.shape[rank - 2] > 1 or (given not in (query, key, value) and field.shape[-1] > 1):
                walk.keep_field(op, field, BETWEEN_ACTIVATIONS)
    heads: list[tuple[Value, list[Field]]] = []
    for given in (query, key):
        fields = [_of_batch(walk, field, rank) for field in walk.fields(given)]
        for field in fields:
            if field.shape[-1] > 1:
                walk.keep_field(op, field, BETWEEN_ACTIVATIONS)
        own = [field for field in fields if any(axis < rank - 2 for axis in axes_of(field))]
        heads.append((Value((*given.shape[:-2], 1, 1)), own))
    matrix = walk.merged(op, heads)
    fields = list(walk.fields(value))
    of_heads = [field for field in fields if any(axis < rank - 2 for axis in axes_of(field))]
    joined = [_of_batch(walk, field, rank) for field in of_heads]
    found = walk.merged(op, [(Value((*query.shape[:-2], 1, 1)), matrix), (Value((*value.shape[:-2], 1, 1)), joined)])
    sizes = [field for field in fields if axes_of(field) == [rank - 1]]
    for mask in op.inputs[3:]:
        of_mask = [field for field in walk.fields(mask) if field.shape[-2:] == (1, 1)]
        found = walk.merged(op, [(Value((*query.shape[:-2], 1, 1)), found), (mask, of_mask)])
    return [compress([*found, *sizes]), *([()] * (len(op.outputs) - 1))]
