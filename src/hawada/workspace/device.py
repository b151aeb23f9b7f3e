"""The device that a configuration names, the threads of its CPU, and the seed."""

from __future__ import annotations

import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig

from hawada.core.latency import prepare_cpu, resolve_device


def prepare(cfg: DictConfig) -> None:
    """Set the threads and seed of this process, as a stage's configuration has them."""
    prepare_cpu(cfg.runtime.threads)
    set_seed(cfg.seed)


def configured_device(gpu: DictConfig) -> torch.device:
    """Where models train and are timed.

    A stage that measures nothing, or on a simulated device, takes what is here when `gpu.device` is not.

    Args:
        gpu: what the stage reads of the configuration of that name.
    """
    if gpu.get("timing") == "measured":
        return resolve_device(gpu.device, match=gpu.match)
    return resolve_device(gpu.device if gpu.device == "cpu" else "auto")
