"""Measures the machine: a table of every site, and whole sliced models that calibrate the proxy and test it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from omegaconf import DictConfig
from torch import nn

from hawada.config import build
from hawada.core.files import write_json
from hawada.core.latency import (
    Clock,
    LatencyTable,
    bootstrap_median,
    build_table,
    calibrate,
    fidelity,
    random_keep,
    summarize,
)
from hawada.core.structure import Keep, completed, keep_all, smallest_keep, widths_of
from hawada.core.verdict import Interval
from hawada.experiment import Run
from hawada.experiment.results import (
    Fidelity,
    HeldOutModel,
    ProfiledModel,
    ProfileResult,
    TimedAs,
    result_from_json,
)
from hawada.report import Progress
from hawada.workspace import (
    TABLE_FILE,
    ModelStopwatch,
    Subject,
    given_table,
    open_stage,
    predicted,
    prove_declaration,
    write_table,
)

MODELS_PER_CHUNK = 8  # sliced models held in memory at once
MAX_CHUNK_SECONDS = (
    3.0  # and measured together at most, once there are enough rounds; many models make up for few rounds
)


def run(cfg: DictConfig, run: Run) -> ProfileResult:
    """Write `profile/latency_table.json`, `profile/proxy.json` and how well the proxy predicts unseen models.

    The latency does not depend on the weights' values, so the untrained architecture is measured. With
    `gpu.timing=table`, nothing is: everything is taken from the given file.
    """
    subject, watch, store = open_stage(cfg, run)
    if cfg.gpu.timing == "table":
        return adopt_table(watch, run)
    prove_declaration(subject)
    teacher = watch.placed(subject.adapter.skeleton())
    chunks = math.ceil((cfg.profile.fitted_models + cfg.profile.held_out_models + 2) / MODELS_PER_CHUNK)
    with store.writing("profile") as folder, Progress("profile", len(subject.sites) + chunks) as progress:
        clock = build(cfg.proxy.clock) if cfg.proxy.get("clock") else watch.clock
        table = time_sites(watch, teacher, clock, progress)
        proxy = subject.new_proxy(table)
        keeps = choose_models(subject)
        progress.say(f"measuring {len(keeps)} whole models")
        measured, noisy = measure_models(watch, teacher, keeps, progress)
        whole, smallest = measured[0].latency_ms, measured[1].ratio
        samples = [(model.widths, model.ratio.median * whole.median) for model in measured]
        predicted_ms, real_ms = calibrate(proxy, samples, fitted=2 + cfg.profile.fitted_models)
        write_json(folder / "proxy.json", proxy.state())
        quality = Fidelity(**fidelity(predicted_ms, real_ms))
        result = ProfileResult(
            summary=f"teacher {whole.median:.3g} ms; on {quality.samples} unseen models the proxy is off by "
            f"{quality.mape:.1%} (Kendall tau {math.nan if quality.kendall_tau is None else quality.kendall_tau:.2f})",
            teacher_ms=whole.median,
            teacher=whole,
            fastest_ratio=smallest,
            fastest_ms=smallest.median * whole.median,
            fidelity=quality,
            held_out=tuple(
                HeldOutModel(predicted_ms=p, measured_ms=m) for p, m in zip(predicted_ms, real_ms, strict=True)
            ),
            models=tuple(measured),
            timed_as=TimedAs(**watch.timed_as),
            handover_us=watch.handover_us,
            noisy=noisy,
            simulated=watch.clock.simulated,
            environment=store.environment,
        )
        write_table(watch, folder, table, proxy, result)
        return run.finish("profile", result)


def time_sites(watch: ModelStopwatch, teacher: nn.Module, clock: Clock, progress: Progress) -> LatencyTable:
    """The table of every site by this clock."""
    subject = watch.subject
    return build_table(
        teacher,
        subject.groups,
        subject.sites,
        [(times, call, watch.inputs(shape)) for times, call, shape in subject.adapter.parts(teacher, watch.shape)],
        clock,
        policy=subject.policy,
        points=subject.cfg.profile.points,
        rounds=watch.quick_rounds,
        monitor=watch.monitor if clock is watch.clock else None,
        on_site=lambda site: progress.step(f"timed {site}"),
        slice_site=subject.adapter.slice_site,
    )


def choose_models(subject: Subject) -> list[Keep]:
    """Teacher, smallest model, those to calibrate on (spread over the range), and unseen ones (drawn uniformly)."""
    node, random = subject.cfg.profile, np.random.default_rng(subject.cfg.seed)
    keeps = [keep_all(subject.groups), smallest_keep(subject.groups, subject.policy)]
    for around_density, count in ((True, node.fitted_models), (False, node.held_out_models)):
        for _ in range(count):
            keeps.append(random_keep(subject.groups, subject.policy, random, around_density=around_density))
    return keeps


def adopt_table(watch: ModelStopwatch, run: Run) -> ProfileResult:
    """Take what another machine measured.

    Raises:
        ValueError: when it is not a table of the model's sites; see also `given_table`.
    """
    subject, record = watch.subject, given_table(watch)
    table = LatencyTable.from_dict(record)
    if [entry.site for entry in table.sites] != subject.sites:
        raise ValueError(
            f"gpu.table: {subject.cfg.gpu.table} has other sites than the model; measure again with stage=profile"
        )
    remedy = "measure again with stage=profile where the model will run"
    result: ProfileResult = result_from_json(
        "profile", record["result"], place=str(subject.cfg.gpu.table), remedy=remedy
    )
    with subject.store.writing("profile") as folder:
        write_json(folder / TABLE_FILE, record)
        write_json(folder / "proxy.json", record["proxy"])
        there = record["fingerprint"]["name"]
        return run.finish("profile", replace(result, summary=f"table of {there} taken from {subject.cfg.gpu.table}"))


def measure_fastest(watch: ModelStopwatch) -> Interval:
    """Measured ratio to the teacher of the smallest model that the gated groups allow."""
    subject = watch.subject
    keep = completed(smallest_keep(subject.gated_groups, subject.policy), subject.groups)
    if subject.cfg.gpu.timing == "table":
        return predicted(subject, keep).ratio
    teacher = watch.placed(subject.adapter.skeleton())
    return watch.compare(watch.timed(teacher), watch.timed(subject.slim(teacher, keep)), watch.inputs()).ratio


def measure_models(
    watch: ModelStopwatch, teacher: nn.Module, keeps: list[Keep], progress: Progress
) -> tuple[list[ProfiledModel], str | None]:
    """Latency of each sliced model and its ratio to the teacher, in interleaved rounds of a few models at a time.

    Returns:
        The models, and why no verdict may rest on their figures, or None.
    """
    records: list[ProfiledModel] = []
    noisy: str | None = None
    inputs, rounds = watch.inputs(), watch.quick_rounds
    rounds = replace(rounds, max_seconds=min(rounds.max_seconds, MAX_CHUNK_SECONDS), patience_s=watch.rounds.patience_s)
    baseline = watch.clock.prepare(watch.timed(teacher), inputs)
    for start in range(0, len(keeps), MODELS_PER_CHUNK):
        models = [watch.timed(watch.subject.slim(teacher, keep)) for keep in keeps[start : start + MODELS_PER_CHUNK]]
        samplers = [baseline, *(watch.clock.prepare(model, inputs) for model in models)]
        sampled = watch.sample(samplers, rounds)
        noisy, samples = noisy or sampled.noisy, sampled.samples
        for column in range(1, samples.shape[1]):
            ratio = bootstrap_median(samples[:, column] / samples[:, 0])
            widths = widths_of(keeps[len(records)], watch.subject.groups)
            records.append(ProfiledModel(widths=widths, latency_ms=summarize(samples[:, column]), ratio=ratio))
        progress.step(f"measured {len(records)} whole models")
    return records, noisy
