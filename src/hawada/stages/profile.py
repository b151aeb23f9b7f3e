"""Measures the machine: a table of every site, and whole sliced models that calibrate the proxy and test it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import nn

from hawada.config import build
from hawada.core.latency import (
    Clock,
    Interval,
    LatencyTable,
    bootstrap_median,
    build_table,
    calibrate,
    fidelity,
    random_keep,
    sample_rounds,
    summarize,
)
from hawada.core.structure import Keep, completed, keep_all, smallest_keep, widths_of
from hawada.experiment import Run, write_json
from hawada.report import Progress
from hawada.workspace import FILE, Workspace, given_table, predicted, write_table

CHUNK = 8  # sliced models held in memory at once
CHUNK_SECONDS = 3.0  # and measured together at most, once there are enough rounds; many models make up for few rounds


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `profile/latency_table.json`, `profile/proxy.json` and how well the proxy predicts unseen models.

    The latency does not depend on the weights' values, so the untrained architecture is measured. With
    `gpu.timing=table`, nothing is: everything is taken from the given file.
    """
    work = Workspace(cfg, run)
    if cfg.gpu.timing == "table":
        return adopt_table(work, run)
    teacher = work.placed(work.adapter.skeleton())
    chunks = math.ceil((cfg.profile.fitted_models + cfg.profile.held_out_models + 2) / CHUNK)
    with work.writing("profile") as folder, Progress("profile", len(work.sites) + chunks) as progress:
        clock = build(cfg.proxy.clock) if cfg.proxy.get("clock") else work.clock
        table = time_sites(work, teacher, clock, progress)
        proxy = work.new_proxy(table)
        keeps = choose_models(work)
        progress.say(f"measuring {len(keeps)} whole models")
        measured = measure_models(work, teacher, keeps, progress)
        teacher_ms = measured[0]["latency_ms"]["median"]
        widths = [widths_of(keep, work.groups) for keep in keeps]
        samples = [(w, record["ratio"]["median"] * teacher_ms) for w, record in zip(widths, measured, strict=True)]
        predicted_ms, real_ms = calibrate(proxy, samples, fitted=2 + cfg.profile.fitted_models)
        write_json(folder / "proxy.json", proxy.state())
        quality = fidelity(predicted_ms, real_ms)
        result = {
            "summary": f"teacher {teacher_ms:.3g} ms; on {len(real_ms)} unseen models the proxy is off by "
            f"{quality['mape']:.1%} (Kendall tau {quality['kendall_tau']:.2f})",
            "teacher_ms": teacher_ms,
            "teacher": measured[0]["latency_ms"],
            "fastest_ratio": measured[1]["ratio"],
            "fastest_ms": measured[1]["ratio"]["median"] * teacher_ms,
            "fidelity": quality,
            "held_out": [{"predicted_ms": p, "measured_ms": m} for p, m in zip(predicted_ms, real_ms, strict=True)],
            "models": [{"widths": w, **record} for w, record in zip(widths, measured, strict=True)],
            "timed_as": work.timed_as,
            "handover_us": work.handover_us,
            "simulated": work.clock.simulated,
            "environment": work.environment(),
        }
        write_table(work, folder, table, proxy, result)
        return run.finish("profile", result)


def time_sites(work: Workspace, teacher: nn.Module, clock: Clock, progress: Progress) -> LatencyTable:
    """The table of every site by this clock."""
    return build_table(
        teacher,
        work.groups,
        work.sites,
        [(times, call, work.inputs(shape)) for times, call, shape in work.adapter.parts(teacher, work.shape)],
        clock,
        policy=work.policy,
        points=work.cfg.profile.points,
        rounds=work.quick_rounds,
        monitor=work.monitor if clock is work.clock else None,
        on_site=lambda site: progress.step(f"timed {site}"),
        slice_site=work.adapter.slice_site,
    )


def choose_models(work: Workspace) -> list[Keep]:
    """Teacher, smallest model, those to calibrate on (spread over the range), and unseen ones (drawn uniformly)."""
    node, random = work.cfg.profile, np.random.default_rng(work.cfg.seed)
    keeps = [keep_all(work.groups), smallest_keep(work.groups, work.policy)]
    for around_density, count in ((True, node.fitted_models), (False, node.held_out_models)):
        for _ in range(count):
            keeps.append(random_keep(work.groups, work.policy, random, around_density=around_density))
    return keeps


def adopt_table(work: Workspace, run: Run) -> dict[str, Any]:
    """Take what another machine measured.

    Raises:
        ValueError: when it is not a table of the model's sites; see also `given_table`.
    """
    record = given_table(work)
    table = LatencyTable.from_dict(record)
    if [entry.site for entry in table.sites] != work.sites:
        raise ValueError(
            f"gpu.table: {work.cfg.gpu.table} has other sites than the model; measure again with stage=profile"
        )
    with work.writing("profile") as folder:
        write_json(folder / FILE, record)
        write_json(folder / "proxy.json", record["proxy"])
        there = record["fingerprint"]["name"]
        return run.finish(
            "profile", {**record["result"], "summary": f"table of {there} taken from {work.cfg.gpu.table}"}
        )


def measure_fastest(work: Workspace) -> Interval:
    """Measured ratio to the teacher of the smallest model that the gated groups allow."""
    keep = completed(smallest_keep(work.gated_groups, work.policy), work.groups)
    if work.cfg.gpu.timing == "table":
        return predicted(work, keep).ratio
    teacher = work.placed(work.adapter.skeleton())
    return work.compare(work.timed(teacher), work.timed(work.slim(teacher, keep))).ratio


def measure_models(work: Workspace, teacher: nn.Module, keeps: list[Keep], progress: Progress) -> list[dict[str, Any]]:
    """Latency of each sliced model and its ratio to the teacher, in interleaved rounds of a few models at a time."""
    records: list[dict[str, Any]] = []
    inputs, rounds = work.inputs(), work.quick_rounds
    rounds = replace(rounds, max_seconds=min(rounds.max_seconds, CHUNK_SECONDS), patience_s=work.rounds.patience_s)
    baseline = work.clock.prepare(work.timed(teacher), inputs)
    for start in range(0, len(keeps), CHUNK):
        models = [work.timed(work.slim(teacher, keep)) for keep in keeps[start : start + CHUNK]]
        samplers = [baseline, *(work.clock.prepare(model, inputs) for model in models)]
        samples = sample_rounds(samplers, rounds, work.cfg.seed, monitor=work.monitor)
        for column in range(1, samples.shape[1]):
            ratio = bootstrap_median(samples[:, column] / samples[:, 0])
            records.append({"latency_ms": summarize(samples[:, column]).as_dict(), "ratio": ratio.as_dict()})
        progress.step(f"measured {len(records)} whole models")
    return records
