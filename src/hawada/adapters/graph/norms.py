"""Norms over channels, recognised by what a module computes and not by its class."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hawada.adapters.graph.trace import Call, Trace
from hawada.adapters.graph.walk import NormFound
from hawada.core.gates import NormHook
from hawada.core.structure import Norm, set_attribute

MIXING = {"mean", "sum", "var", "var_mean", "native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm",
          "linalg_vector_norm", "norm", "batch_norm", "native_batch_norm"}  # fmt: skip
PLAIN = (int, float, str, tuple)
EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-4, 1e-3, 0.0)
SAME_WITHIN = 1e-5
MAX_PROBED_POSITIONS = 7  # along an axis that is no channels


def find_norms(trace: Trace) -> dict[Call, NormFound]:
    """The calls of norms over channels, each with (kind, eps, axis of its input, number of parts)."""
    found: dict[Call, NormFound] = {}
    known: dict[Any, NormFound | None] = {}
    for call in trace.calls:
        ops = trace.ops[call.start : call.end]
        mixes = any(op.name in MIXING for op in ops)
        if not mixes or not call.leaf or not call.alone or call.output is None:
            continue
        shape = call.inputs[0].shape
        if call.output.shape != shape or len(shape) < 2:
            continue
        module = trace.module(call)
        plain = sorted((name, repr(value)) for name, value in vars(module).items() if isinstance(value, PLAIN))
        key = (type(module), shape, tuple(plain), tuple(tuple(p.shape) for p in module.parameters()))
        if key not in known:
            known[key] = _norm(module, shape)
        if (norm := known[key]) is not None:
            found[call] = norm
    return found


def _norm(module: nn.Module, shape: tuple[int, ...]) -> NormFound | None:
    """What a module normalises; None where it is not one of the known norms."""
    rank = len(shape)
    sizes = {tuple(parameter.shape) for parameter in module.parameters()}
    counts = {parameter.numel() for parameter in module.parameters()}
    named = {name for name, _ in module.named_parameters()}
    if len(counts) > 1 or named - {"weight", "bias"} or any(len([s for s in size if s > 1]) > 1 for size in sizes):
        return None
    axes = [axis for axis in (rank - 1, 1) if axis > 0 and (not counts or shape[axis] in counts)]
    groups = {value for value in vars(module).values() if isinstance(value, int) and not isinstance(value, bool)}
    own_eps = [getattr(module, name) for name in EPS_NAMES if isinstance(getattr(module, name, None), float)]
    own, probes = _filled(module), _probes(shape)
    for axis in dict.fromkeys(axes):
        candidates = [("layer", 1), ("rms", 1)]
        if axis == 1:
            candidates += [("group", parts) for parts in sorted({1, *groups}) if parts >= 1 and shape[1] % parts == 0]
        for kind, parts in candidates:
            for eps in (*own_eps, *USUAL_EPS):
                hook = NormHook([(_open(shape[axis]), Norm("", kind, eps, axis, parts, multiplied=False))])
                if all(_same(own, hook, x) for x in probes) and _same_when_cut(
                    module, probes, (kind, eps, axis, parts)
                ):
                    return kind, eps, axis, parts
                if own_eps:
                    break
    return None


def _filled(module: nn.Module) -> nn.Module:
    """A copy on the CPU with random parameters."""
    generator = torch.Generator().manual_seed(0)
    filled = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    for parameter in filled.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator, device="cpu") + 0.5)
    for buffer in filled.buffers():
        buffer.zero_()
    return filled


def _probes(shape: tuple[int, ...]) -> list[Tensor]:
    """Inputs of ordinary and of small size, so that what is added to the variance shows; other axes are short."""
    generator = torch.Generator().manual_seed(0)
    inner = [min(size, MAX_PROBED_POSITIONS) for size in shape[2:-1]]
    small = [2, *shape[1:2], *inner, *shape[2:][-1:]]
    x = torch.randn(small, generator=generator, device="cpu")
    return [x + 0.3, 3e-3 * x]


def _open(units: int) -> Any:
    return SimpleNamespace(factor=torch.ones(units, device="cpu"))


def _same_when_cut(module: nn.Module, probes: list[Tensor], norm: NormFound) -> bool:
    """Whether half of the channels are normalised likewise: a number of channels may be written into the module."""
    kind, eps, axis, parts = norm
    kept = probes[0].shape[axis] // parts // 2 * parts
    if kept == 0:
        return False
    cut = copy.deepcopy(module)
    for owner in cut.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                shape = [kept if size == probes[0].shape[axis] else size for size in parameter.shape]
                owner._parameters[name] = nn.Parameter(parameter.new_empty(shape), requires_grad=False)
        for name in ("normalized_shape", "num_channels"):
            if hasattr(owner, name):
                set_attribute(owner, name, kept)
    hook = NormHook([(_open(kept), Norm("", kind, eps, axis, parts, multiplied=False))])
    return all(_same(_filled(cut), hook, x.narrow(axis, 0, kept)) for x in probes)


@torch.no_grad()
def _same(module: nn.Module, hook: NormHook, x: Tensor) -> bool:
    with torch.device("cpu"):
        try:
            theirs = module(x)
        except Exception:  # a module may take inputs of one size alone
            return False
        if not isinstance(theirs, Tensor):
            return False
        return torch.allclose(hook(module, (x,), theirs), theirs, SAME_WITHIN, SAME_WITHIN)
