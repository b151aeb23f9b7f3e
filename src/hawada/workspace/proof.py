"""The proof that an adapter's declaration is right, before anything is timed: gated and sliced models agree."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hawada.core.evaluate import compare_outputs, count_parameters
from hawada.core.gates import Student
from hawada.core.latency import random_keep
from hawada.core.structure import Keep, keep_all, keep_first, widths_of
from hawada.workspace.subject import Subject

MAX_RELATIVE_DIFFERENCE = 1e-5  # largest difference of logits, relative to the largest logit, in float32
MAX_PARAMETERS = 3 * 10**8  # of a model that is proved in seconds
PERTURBED_BY = 0.2  # what norms begin with, ones and zeros, would hide a wrong declaration


def prove_declaration(subject: Subject) -> None:
    """Compare a hard-gated and a sliced model of random weights and widths.

    Models with more than `MAX_PARAMETERS` are not compared, since that would take longer than seconds.

    Raises:
        ValueError: The two differ; the group that is wrong is named.
    """
    if count_parameters(subject.meta) > MAX_PARAMETERS:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = subject.adapter.skeleton().cpu()
        _perturb(model)
    for keeps_branches in (True, False):  # where a branch goes, the groups inside it are not compared
        keep = _random_keep(subject, keeps_branches=keeps_branches)
        difference = _difference(subject, model, keep)
        if not difference <= MAX_RELATIVE_DIFFERENCE:
            break
    else:
        return
    whole = keep_all(subject.groups)
    alone = {name: whole | {name: kept} for name, kept in keep.items() if len(kept) < len(whole[name])}
    wrong = [name for name, cut in alone.items() if _difference(subject, model, cut) > MAX_RELATIVE_DIFFERENCE]
    raise ValueError(
        f"model.adapter: a sliced model differs from the gated one by {difference:.1e} of its largest output, so the "
        f"declaration of {', '.join(wrong[:3]) or 'its groups together'} is wrong; report the network, or declare its "
        "groups in an adapter of your own"
    )


def _random_keep(subject: Subject, *, keeps_branches: bool) -> Keep:
    """Random units of random widths that are allowed; with `keeps_branches` all branches and layers stay."""
    draw = np.random.default_rng(0)
    groups, policy = subject.groups, subject.policy
    widths = widths_of(random_keep(groups, policy, draw), groups)
    if keeps_branches:
        for members in policy.shared(groups):
            allowed = policy.widths(members[0])
            width = allowed[-1] if members[0].removes else int(draw.choice(allowed))
            widths |= dict.fromkeys((member.name for member in members), width)
    order = {group.name: [int(unit) for unit in draw.permutation(group.units)] for group in groups}
    return keep_first(groups, widths, order)


def _perturb(model: nn.Module) -> None:
    """Change what begins as ones and zeros."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() <= 1:
                parameter.data.add_(torch.randn_like(parameter) * PERTURBED_BY)
        if isinstance(variance := getattr(module, "running_var", None), torch.Tensor):
            variance.uniform_(0.5, 2.0)


@torch.no_grad()
def _difference(subject: Subject, model: nn.Module, keep: Keep) -> float:
    """The largest difference of outputs between the gated and the sliced model, relative to the largest."""
    inputs, raw = subject.check_inputs(), subject.adapter.raw
    sliced = raw(subject.slim(model, keep))(*inputs)
    with Student(model, subject.groups) as student, student.hard_gated(keep):
        gated = raw(student)(*inputs)
    found = compare_outputs(gated, sliced)
    return found["max_abs_diff"] / max(found["max_abs_logit"], 1e-9)
