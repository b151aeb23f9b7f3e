"""The `hawada` command. Composes the configuration, checks it, runs the stage, and turns failures into one sentence.

torch is imported only once a stage really starts, so `--help`, `--cfg job` and refusals are quick.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hawada.config import (
    build,
    check_given,
    check_spellings,
    check_targets,
    conf_dir,
    expand,
    leave_out_shipped,
    register_resolvers,
    spell_out,
    validate,
)
from hawada.core.latency import check_device, check_runtime
from hawada.experiment import INTERLINGUA, PLANS, Job, Run, planned
from hawada.experiment.results import LOWER_IS_BETTER, Conclusion, EvaluateResult, FrontResult, StageResult
from hawada.workspace import fill_in_from_photos

FAILURE, USER_ERROR, INTERRUPTED = 1, 2, 130
# What a user can do wrong, as opposed to what fails on the way; the last three are folders that cannot be written.
MISTAKES = (HydraException, OmegaConfBaseException, ValueError, PermissionError, NotADirectoryError, FileExistsError)

register_resolvers()
_jobs: list[Job] = []  # those of this process that have ended


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """Run the configured stage; returns the objective that sweepers may maximise, such as accuracy or -perplexity."""
    given = [str(override).partition("=") for override in HydraConfig.get().overrides.task]
    overrides = {key: value for key, _, value in given}
    try:
        result = _run(cfg)
    except Exception as error:
        _jobs.append(Job(overrides, None, error))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # the sweeper must know; a single job's error is reported by main, in one sentence
        return None
    _jobs.append(Job(overrides, result, None))
    if not isinstance(result, EvaluateResult):
        return None
    return -result.slim.quality if result.metric in LOWER_IS_BETTER else result.slim.quality


def _run(cfg: DictConfig) -> StageResult | None:
    spell_out(cfg)
    leave_out_shipped(cfg, [str(override).lstrip("+") for override in HydraConfig.get().overrides.task])
    validate(cfg)
    stage = cfg.stage.name
    stages = planned(stage, cfg)
    plans = [PLANS[name] for name in stages]
    reads = {key for plan in plans for key in plan.reads}
    if any(plan.measures for plan in plans) and cfg.gpu.timing == "measured":
        check_device(gpu=cfg.gpu.name, device=cfg.gpu.device, match=cfg.gpu.match)
        check_runtime(cfg.runtime.mode, gpu=cfg.gpu.name, device=cfg.gpu.device)
    check_given(cfg, reads)
    fill_in_from_photos(cfg)
    hydra_cfg = HydraConfig.get()
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    shared = Path(cfg.output_dir) / str(cfg.name)
    root = Path(hydra_cfg.runtime.output_dir) if sweeping else shared
    run = Run(root, cfg, shared=shared, swept=_swept_keys(sys.argv[1:]) if sweeping else (), overwrite=cfg.overwrite)
    run.check_writable()
    if "precheck" in cfg.model and any("model" in plan.reads for plan in plans):
        build(cfg.model.precheck)
    run.check_all(stages)
    if stages and stage in PLANS:
        run.check_upstream(stages[0])
    for name in stages:
        check_targets(run.settings(name))
    from hawada.stages import inspect, pipeline

    if stage in INTERLINGUA:
        from hawada.interlingua.stages.parts import InterlinguaParts

        InterlinguaParts(run.settings(stage), run, dry=stage == "interlingua-dry").check()
    else:
        pipeline.check(stages, run)
    with run.locked():
        if stage == "inspect":
            return inspect.run(run.settings(stage), run)
        if stage == "pipeline":
            result: StageResult = pipeline.run_pipeline(run)
        else:
            result = [pipeline.run_stage(name, run) for name in stages][-1]
    if isinstance(result, Conclusion) and not sweeping:
        from hawada.report import print_result

        print_result(result, root)
    return result


def main() -> None:
    """Entry point: exit code 0 for success, 2 for a mistake in the configuration, 1 for anything else."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a network of the user's own may lie there
    sys.argv[1:] = [expand(argument) for argument in sys.argv[1:]]
    if {"-m", "--multirun"} & set(sys.argv):
        sys.argv.append(_name_jobs_by_what_is_swept(sys.argv[1:]))
    debugging = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing several lines and exiting with 1
    code = 0
    try:
        check_spellings(sys.argv[1:])
        job()
        if len(_jobs) == 1 and _jobs[0].error is not None:
            raise _jobs[0].error
    except KeyboardInterrupt:
        print("hawada: interrupted; the same command goes on behind the last finished stage", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        if debugging:
            raise
        code = USER_ERROR if isinstance(error, MISTAKES) else FAILURE
        where = "" if code == USER_ERROR else f" ({type(error).__name__}; HYDRA_FULL_ERROR=1 shows where)"
        print(f"hawada: {_sentence(error)}{where}", file=sys.stderr)
    finally:
        if len(_jobs) > 1:
            from hawada.report import print_sweep

            print_sweep(_jobs, _swept_keys(sys.argv[1:]))
    sys.exit(code or max((_exit_code(job.result) for job in _jobs), default=0))


def _exit_code(result: StageResult | None) -> int:
    """Only a run that was asked for a latency and did not prove it fails."""
    if isinstance(result, FrontResult):
        return FAILURE if any(point.status == "infeasible" for point in result.points) else 0
    if isinstance(result, Conclusion):
        return FAILURE if result.target_ms is not None and not result.verdict.is_success else 0
    return 0


def _swept_keys(arguments: list[str], swept: bool = True) -> list[str]:
    """Keys to which the command line gives several values (or with `swept=False`, one)."""
    plain = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    overrides = OverridesParser.create().parse_overrides(plain)
    return [override.key_or_group for override in overrides if override.is_sweep_override() == swept]


def _name_jobs_by_what_is_swept(arguments: list[str]) -> str:
    """The Hydra setting that leaves keys with one value out of the names of a multirun's directories."""
    try:
        fixed = ["name", "output_dir", "overwrite", *_swept_keys(arguments, swept=False)]
    except HydraException:
        fixed = []  # Hydra itself will say what is wrong with the arguments
    quoted = ",".join(f"'{key}'" for key in fixed if not key.startswith("hydra."))
    return f"hydra.job.config.override_dirname.exclude_keys=[{quoted}]"


def _sentence(error: BaseException) -> str:
    """An exception as one line that a user understands."""
    text = " ".join(str(error).split())
    unknown = (
        re.search(r"full_key: (\S+)", str(error.__cause__) if "Could not override" in text else "")  # within a mapping
        or re.search(r"Could not override '([^']+)'", text)
        or re.search(r"Key '([^']+)' is not in struct", text)
    )
    if unknown:
        return f"{unknown[1]}: there is no such key; `hawada --cfg job` lists them"
    choice = re.search(
        r"Could not find '([^']+?)/([^'/]+)' Available options in '[^']+': (.*?) Config search path", text
    )
    if choice:
        return f"{choice[1]}={choice[2]}: there is no such choice; available are {', '.join(choice[3].split())}"
    return text or type(error).__name__
