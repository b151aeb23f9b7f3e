"""Chooses what to keep so that the measured latency meets the budget, slices it, proves slices and gates equal."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import nn

from hawada.core.evaluate import compare_outputs
from hawada.core.gates import Student
from hawada.core.latency import Budget, Comparison, Proxy, source_of
from hawada.core.search import BudgetSearch, Candidate, SearchResult, search_export
from hawada.core.structure import Group, Keep, completed, keep_all, keep_from_gates, widths_of
from hawada.experiment import Run, write_json
from hawada.report import Progress
from hawada.workspace import Quality, Workspace, compare_in_fresh_process, load_proxy, predicted

EQUALITY = 1e-5  # largest difference of logits, relative to the largest logit, in float32


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `export/slim` and `export/teacher`, what was measured on the way, and the equivalence proof."""
    work = Workspace(cfg, run)
    teacher = work.teacher()
    student = load_student(work, teacher)
    with work.writing("export") as folder, Progress("export", cfg.export.max_measurements) as progress:
        quality = Quality(work, student, teacher, progress)
        progress.say("choosing widths and measuring")
        keep, record = _choose(work, student, teacher, quality, progress)
        if "verdict" in record:
            return record  # nothing holds the budget: the stage leaves no manifest and counts as not finished
        progress.done()
        slim = work.slim(student.model, keep)
        equivalence = prove_equivalence(work, student, slim, keep)
        slim, refit = quality.compensated(slim, keep)
        work.save(folder / "slim", slim, keep)
        work.save(folder / "teacher", teacher, keep_all(work.groups))
        write_json(folder / "keep.json", {name: list(kept) for name, kept in keep.items()})
        record |= {"widths": widths_of(keep, work.groups), "equivalence": equivalence, **quality.as_dict()}
        return run.finish("export", {**record, **refit})


def load_student(work: Workspace, teacher: nn.Module) -> Student:
    """The gated model as training left it."""
    folder = work.run.folder("train")
    student = Student(copy.deepcopy(teacher), work.gated_groups, work.new_gate)
    for name, theta in load_file(folder / "gates.safetensors").items():
        with torch.no_grad():
            student.gate_of(name).theta.copy_(theta)
    if (folder / "weights.safetensors").is_file():
        student.model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)  # tied ones once
    return student.eval()


def prove_equivalence(work: Workspace, student: Student, slim: nn.Module, keep: Keep) -> dict[str, float]:
    """Difference of logits between the hard-gated student and the slim model on example inputs.

    Raises:
        RuntimeError: when they differ by more than `EQUALITY`: the adapter's declaration is wrong.
    """
    inputs = work.check_inputs()
    slim = copy.deepcopy(slim).cpu().float()
    with torch.no_grad(), student.hard_gated({g.name: keep[g.name] for g in student.groups}):
        gated = work.adapter.logits(student.cpu()(*inputs))
        sliced = work.adapter.logits(slim(*inputs))
    record = compare_outputs(gated, sliced)
    if not record["max_abs_diff"] <= EQUALITY * record["max_abs_logit"]:
        raise RuntimeError(
            f"the sliced model differs from the gated one by {record['max_abs_diff']:.3g}: a group is wrong"
        )
    return record


@contextmanager
def measuring(
    work: Workspace, model: nn.Module, teacher: nn.Module, on_measured: Callable[[Comparison], None] | None = None
) -> Iterator[Callable[[Keep], Comparison]]:
    """A function that slices `model` to a choice and compares it with the teacher; with timing=table, predicts it.

    On a CPU each comparison has a process of its own, as the verdict will have, so that both are measured alike.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        afresh = source_of(work.clock) == "measured" and work.cfg.gpu.timing != "table" and work.device.type == "cpu"
        if afresh:
            work.save(folder / "teacher", teacher, keep_all(work.groups))
        reference = None if afresh else work.timed(copy.deepcopy(teacher))

        def measure(keep: Keep) -> Comparison:
            if work.cfg.gpu.timing == "table":
                return predicted(work, keep)
            slim = work.slim(model, keep)
            if afresh:
                shutil.rmtree(folder / "slim", ignore_errors=True)
                work.save(folder / "slim", slim, keep)
                comparison = compare_in_fresh_process(work, folder / "teacher", folder / "slim", folder)
            else:
                assert reference is not None
                comparison = work.compare(reference, work.timed(slim))
            if on_measured is not None:
                on_measured(comparison)
            return comparison

        yield measure


def make_search(
    work: Workspace,
    student: Student,
    quality: Quality,
    measure: Callable[[Keep], Comparison],
    budget: Budget,
    proxy: Proxy,
) -> BudgetSearch:
    """The search for one target."""
    from_gates = completed(keep_from_gates(student.own_gates(), student.groups, work.policy), work.groups)
    return BudgetSearch(
        groups=work.groups,
        saliency=quality.saliency,
        worths=quality.worths,
        loss=quality.loss,
        gates=quality.gates,
        proxy=proxy,
        policies=work.policies,
        measure=measure,
        budget=budget,
        teacher_ms=work.run.result("profile")["teacher_ms"],
        start=widths_of(from_gates, work.groups) if work.cfg.export.widths == "gates" else None,
        confirmations=work.confirmations,
    )


def _choose(
    work: Workspace, student: Student, teacher: nn.Module, quality: Quality, progress: Progress
) -> tuple[Keep, dict[str, Any]]:
    """Kept indices and what was measured to find them."""
    with measuring(work, student.model, teacher, lambda measured: tell(progress, measured)) as measure:
        return _search(work, student, quality, measure)


def tell(progress: Progress, measured: Comparison) -> None:
    """One measurement is done."""
    progress.step(f"measured {measured.ratio.median:.3f} of the teacher")


def _search(
    work: Workspace, student: Student, quality: Quality, measure: Callable[[Keep], Comparison]
) -> tuple[Keep, dict[str, Any]]:
    """Kept indices for the configured target, or those of the gates where there is none."""
    if not work.budget.has_target:
        keep = completed(keep_from_gates(student.own_gates(), student.groups, work.policy), work.groups)
        comparison = measure(keep)
        return keep, {
            "summary": f"no target; the gates' widths take {comparison.ratio.median:.3f} of the teacher's time",
            "status": "no target",
            "measured": comparison.as_dict(),
            "candidates": [],
        }
    search = make_search(work, student, quality, measure, work.budget, load_proxy(work, "train"))
    found = search_export(search, work.cfg.export.max_measurements)
    record = described(found, work.groups)
    if found.status == "infeasible":
        comparison = found.chosen.comparison
        target_ms = work.budget.ratio(comparison.baseline.median) * comparison.baseline.median
        record |= {
            "verdict": "infeasible",
            "reason": f"the fastest is {comparison.candidate.median:.3f} ms, the target is {target_ms:.3f} ms",
            "target_ms": target_ms,
        }
    return found.chosen.keep, record


def described(found: SearchResult, groups: Sequence[Group]) -> dict[str, Any]:
    """A search's outcome, for JSON."""
    comparison = found.chosen.comparison
    return {
        "summary": f"{found.status}: {comparison.ratio.median:.3f} of the teacher's time, "
        f"{len(found.candidates)} models measured",
        "status": found.status,
        "measured": comparison.as_dict(),
        "candidates": [_described(candidate, groups) for candidate in found.candidates],
    }


def _described(candidate: Candidate, groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "level": candidate.level,
        "predicted_ratio": candidate.predicted_ratio,
        "ratio": candidate.comparison.ratio.as_dict(),
        "worth": candidate.worth,
        "widths": widths_of(candidate.keep, groups),
    }
