"""Chooses what to keep so that the measured latency meets the budget, slices it, proves slices and gates equal."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import nn

from hawada.core.evaluate import compare_outputs
from hawada.core.files import write_json
from hawada.core.gates import Student
from hawada.core.latency import Budget, Proxy, source_of
from hawada.core.search import BudgetSearch, Candidate, SearchResult, search_export
from hawada.core.structure import Group, Keep, completed, keep_all, keep_from_gates, widths_of
from hawada.core.verdict import Comparison, Verdict
from hawada.experiment import Run
from hawada.experiment.results import CandidateModel, Difference, ExportResult, InfeasibleExport, SearchOutcome
from hawada.report import Progress
from hawada.workspace import (
    ModelStopwatch,
    Quality,
    Subject,
    compare_in_fresh_process,
    load_proxy,
    open_stage,
    predicted,
)

MAX_RELATIVE_DIFFERENCE = 1e-5  # largest difference of logits, relative to the largest logit, in float32


def run(cfg: DictConfig, run: Run) -> ExportResult | InfeasibleExport:
    """Write `export/slim` and `export/teacher`, what was measured on the way, and the equivalence proof."""
    subject, watch, store = open_stage(cfg, run)
    teacher = subject.teacher()
    student = load_student(subject, teacher)
    with store.writing("export") as folder, Progress("export", cfg.export.max_measurements) as progress:
        quality = Quality(subject, student, teacher, progress, has_target=watch.budget.has_target)
        progress.say("choosing widths and measuring")
        keep, outcome = _choose(watch, student, teacher, quality, progress)
        if isinstance(outcome, InfeasibleExport):
            return outcome  # nothing holds the budget: the stage leaves no manifest and counts as not finished
        progress.done()
        slim = subject.slim(student.model, keep)
        equivalence = prove_equivalence(subject, student, slim, keep)
        slim, reconstruction = quality.reconstructed(slim, keep)
        subject.save(folder / "slim", slim, keep)
        subject.save(folder / "teacher", teacher, keep_all(subject.groups))
        write_json(folder / "keep.json", {name: list(kept) for name, kept in keep.items()})
        result = ExportResult(
            summary=outcome.summary,
            status=outcome.status,
            measured=outcome.measured,
            candidates=outcome.candidates,
            widths=widths_of(keep, subject.groups),
            equivalence=equivalence,
            refitted=reconstruction.refitted,
            nats=reconstruction.nats,
            sensitivity=quality.sensitivities,
        )
        return run.finish("export", result)


def load_student(subject: Subject, teacher: nn.Module) -> Student:
    """The gated model as training left it."""
    folder = subject.store.folder("train")
    student = Student(copy.deepcopy(teacher), subject.gated_groups, subject.new_gate)
    for name, theta in load_file(folder / "gates.safetensors").items():
        with torch.no_grad():
            student.gate_of(name).theta.copy_(theta)
    if (folder / "weights.safetensors").is_file():
        student.model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)  # tied ones once
    return student.eval()


def prove_equivalence(subject: Subject, student: Student, slim: nn.Module, keep: Keep) -> Difference:
    """Difference of logits between the hard-gated student and the slim model on example inputs.

    Raises:
        RuntimeError: when they differ by more than `MAX_RELATIVE_DIFFERENCE`: the adapter's declaration is wrong.
    """
    inputs = subject.check_inputs()
    slim = copy.deepcopy(slim).cpu().float()
    with torch.no_grad(), student.hard_gated({g.name: keep[g.name] for g in student.groups}):
        gated = subject.adapter.raw(student.cpu())(*inputs)
        sliced = subject.adapter.raw(slim)(*inputs)
    found = Difference(**compare_outputs(gated, sliced))
    if not found.max_abs_diff <= MAX_RELATIVE_DIFFERENCE * found.max_abs_logit:
        raise RuntimeError(f"the sliced model differs from the gated one by {found.max_abs_diff:.3g}: a group is wrong")
    return found


@contextmanager
def measuring(
    watch: ModelStopwatch, model: nn.Module, teacher: nn.Module, on_measured: Callable[[Comparison], None] | None = None
) -> Iterator[Callable[[Keep], Comparison]]:
    """A function that slices `model` to a choice and compares it with the teacher; with timing=table, predicts it.

    On a CPU each comparison has a process of its own, as the verdict will have, so that both are measured alike.
    """
    subject, timing = watch.subject, watch.cfg.gpu.timing
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        afresh = source_of(watch.clock) == "measured" and timing != "table" and watch.device.type == "cpu"
        if afresh:
            subject.save(folder / "teacher", teacher, keep_all(subject.groups))
        reference = None if afresh else watch.timed(copy.deepcopy(teacher))

        def measure(keep: Keep) -> Comparison:
            if timing == "table":
                return predicted(subject, keep)
            slim = subject.slim(model, keep)
            if afresh:
                shutil.rmtree(folder / "slim", ignore_errors=True)
                subject.save(folder / "slim", slim, keep)
                comparison = compare_in_fresh_process(watch, folder / "teacher", folder / "slim", folder)
            else:
                assert reference is not None
                comparison = watch.compare(reference, watch.timed(slim), watch.inputs())
            if on_measured is not None:
                on_measured(comparison)
            return comparison

        yield measure


def make_search(
    watch: ModelStopwatch,
    student: Student,
    quality: Quality,
    measure: Callable[[Keep], Comparison],
    budget: Budget,
    proxy: Proxy,
) -> BudgetSearch:
    """The search for one target."""
    subject = watch.subject
    from_gates = completed(keep_from_gates(student.own_gates(), student.groups, subject.policy), subject.groups)
    return BudgetSearch(
        groups=subject.groups,
        objective=quality.objectives[0],
        alternatives=quality.objectives[1:],
        proxy=proxy,
        policies=subject.policies,
        measure=measure,
        budget=budget,
        teacher_ms=subject.store.run.result("profile").teacher_ms,
        start=widths_of(from_gates, subject.groups) if subject.cfg.export.widths == "gates" else None,
        confirmations=watch.confirmations,
    )


def _choose(
    watch: ModelStopwatch, student: Student, teacher: nn.Module, quality: Quality, progress: Progress
) -> tuple[Keep, SearchOutcome]:
    """Kept indices and what was measured to find them."""
    with measuring(watch, student.model, teacher, lambda measured: tell(progress, measured)) as measure:
        return _search(watch, student, quality, measure)


def tell(progress: Progress, measured: Comparison) -> None:
    """One measurement is done."""
    progress.step(f"measured {measured.ratio.median:.3f} of the teacher")


def _search(
    watch: ModelStopwatch, student: Student, quality: Quality, measure: Callable[[Keep], Comparison]
) -> tuple[Keep, SearchOutcome]:
    """Kept indices for the configured target, or those of the gates where there is none."""
    subject = watch.subject
    if not watch.budget.has_target:
        keep = completed(keep_from_gates(student.own_gates(), student.groups, subject.policy), subject.groups)
        comparison = measure(keep)
        return keep, SearchOutcome(
            summary=f"no target; the gates' widths take {comparison.ratio.median:.3f} of the teacher's time",
            status="no target",
            measured=comparison,
            candidates=(),
        )
    search = make_search(watch, student, quality, measure, watch.budget, load_proxy(subject, "train"))
    found = search_export(search, subject.cfg.export.max_measurements)
    outcome = described(found, subject.groups)
    if found.status == "infeasible":
        measured = outcome.measured
        target_ms = watch.budget.ratio(measured.baseline.median) * measured.baseline.median
        outcome = InfeasibleExport(
            summary=outcome.summary,
            status=outcome.status,
            measured=measured,
            candidates=outcome.candidates,
            verdict=Verdict.INFEASIBLE,
            reason=f"the fastest is {measured.candidate.median:.3f} ms, the target is {target_ms:.3f} ms",
            target_ms=target_ms,
        )
    return found.chosen.keep, outcome


def described(found: SearchResult, groups: Sequence[Group]) -> SearchOutcome:
    """A search's outcome, as results hold it."""
    comparison = found.chosen.comparison
    return SearchOutcome(
        summary=f"{found.status}: {comparison.ratio.median:.3f} of the teacher's time, "
        f"{len(found.candidates)} models measured",
        status=found.status,
        measured=comparison,
        candidates=tuple(_candidate_model(candidate, groups) for candidate in found.candidates),
    )


def _candidate_model(candidate: Candidate, groups: Sequence[Group]) -> CandidateModel:
    return CandidateModel(
        level=candidate.level,
        predicted_ratio=candidate.predicted_ratio,
        ratio=candidate.comparison.ratio,
        value=candidate.value,
        widths=widths_of(candidate.keep, groups),
    )
