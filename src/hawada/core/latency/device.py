"""The device that is present: which one it is, whether it is the one asked for, and how a CPU is set up.

Nothing here imports torch before it is needed, so that a wrong device is noticed in well under a second.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def present_gpus() -> list[str]:
    """Return the product names of the NVIDIA GPUs that the driver lists; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [
            str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index)))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def check_device(*, gpu: str, device: str, match: str | None) -> None:
    """Check that the device that measurements need is the one that is present.

    Args:
        gpu: the `gpu=` choice, for the message.
        device: the kind of device: `auto`, `cpu`, `mps` or `cuda`.
        match: a regular expression that the GPU's product name must contain, or None for any.

    Raises:
        ValueError: when it is another device; the message names the one that is present and the remedies.
    """
    if device != "cuda":
        return
    present = present_gpus()
    if present and (match is None or any(re.search(match, name, re.IGNORECASE) for name in present)):
        return
    here = ", ".join(present) if present else "no NVIDIA GPU"
    raise ValueError(
        f"gpu={gpu}: the device present is not {('an ' if match and match[0] in 'AH' else 'a ') + (match or 'GPU')} "
        f"({here} found) and latency is only measured where the model will run; run this on such a machine, "
        "use gpu=local for the machine at hand, or rehearse with gpu.timing=simulated"
    )


def check_runtime(runtime: str, *, gpu: str, device: str) -> None:
    """Check that models can be run as asked on the device that measurements need.

    Args:
        runtime: the runtime: `eager`, `cudagraph` or `compile`.
        gpu: the `gpu=` choice, for the message.
        device: the kind of device: `auto`, `cpu`, `mps` or `cuda`.

    Raises:
        ValueError: when CUDA graphs are asked for on a device without CUDA.
    """
    if runtime == "cudagraph" and (device in ("cpu", "mps") or not present_gpus()):
        raise ValueError(
            f"runtime=cudagraph: CUDA graphs need an NVIDIA GPU and gpu={gpu} has none here; set runtime=eager, "
            "or rehearse with gpu.timing=simulated"
        )


def resolve_device(device: str, *, match: str | None = None) -> torch.device:
    """Choose the device: for `auto` cuda, else mps, else cpu; for `cuda` the first card that matches.

    Args:
        device: the kind of device: `auto`, `cpu`, `mps` or `cuda`.
        match: a regular expression that the card's product name must contain, or None for any.

    Raises:
        ValueError: when torch cannot use such a device.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("gpu.device: torch finds no Apple GPU here; use gpu=local")
    if device != "cuda":
        return torch.device(device)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for index, name in enumerate(names):
        if match is None or re.search(match, name, re.IGNORECASE):
            return torch.device("cuda", index)
    raise ValueError(
        f"gpu.match: torch {torch.__version__} sees {', '.join(names) or 'no CUDA device'} and not {match or 'any'}; "
        "check CUDA_VISIBLE_DEVICES and that torch was built for CUDA"
    )


@functools.cache
def allowed_cpus() -> tuple[int, ...]:
    """Return the CPUs that this process was allowed at the first call, which comes before it pins itself."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def prepare_cpu(threads: int | None) -> int:
    """Set the process up so that a CPU's times repeat.

    This fixes the number of intra-op threads, pins the process to as many CPUs, and makes glibc keep freed memory:
    otherwise every large activation is mapped anew, and its page faults are timed, which vary and take up to half of a
    forward pass.

    Args:
        threads: the number of threads; None means one for every CPU that this process may use.

    Returns:
        The number of threads.

    Raises:
        ValueError: when this process may use fewer CPUs.
    """
    import torch

    allowed = allowed_cpus()
    count = threads or len(allowed)
    if count > len(allowed):
        raise ValueError(f"runtime.threads: {count} is more than the {len(allowed)} CPUs that this process may use")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, allowed[:count])
    torch.set_num_threads(count)
    _keep_freed_memory()
    return count


def _keep_freed_memory() -> bool:
    """Raise the thresholds above which glibc maps memory and returns it; False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 32 << 20  # 32 MiB is the most that glibc accepts
    return bool(mallopt(m_mmap_threshold, largest) and mallopt(m_trim_threshold, 1 << 30))


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Describe what latencies depend on: hardware, driver and versions. Only where it is equal may they be compared."""
    import torch

    record: dict[str, Any] = {
        "device": device.type,
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        record |= {
            "name": torch.cuda.get_device_name(device),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch does not annotate it
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_conv": torch.backends.cudnn.allow_tf32,
        }
    return record


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the fingerprint, the platform and the versions of every library that a result may depend on."""
    names = (
        "hawada",
        "torch",
        "torchvision",
        "transformers",
        "accelerate",
        "numpy",
        "scipy",
        "hydra-core",
        "omegaconf",
    )
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "fingerprint": fingerprint(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "versions": versions,
    }


def _cpu_name() -> str:
    """Return the CPU's product name where the system reports it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
