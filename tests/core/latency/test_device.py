import json
import os

import pytest
import torch

from hawada.core.latency import (
    check_device,
    check_runtime,
    device,
    environment,
    fingerprint,
    prepare_cpu,
    resolve_device,
)
from hawada.core.latency.device import allowed_cpus


@pytest.fixture
def present(monkeypatch):
    def pretend(*names):
        monkeypatch.setattr(device, "present_gpus", lambda: list(names))

    return pretend


@pytest.mark.parametrize("match", ["H100", "h100", "NVIDIA H1", None])
def test_the_gpu_that_was_asked_for_passes(present, match):
    present("NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3")
    check_device(gpu="h100", device="cuda", match=match)


@pytest.mark.parametrize("kind", ["auto", "cpu", "mps"])
def test_only_cuda_needs_a_gpu(present, kind):
    present()
    check_device(gpu="local", device=kind, match=None)


@pytest.mark.parametrize(
    ("names", "match", "message"),
    [
        ([], "H100", r"gpu=mine: the device present is not an H100 \(no NVIDIA GPU found\)"),
        ([], "RTX 4090", r"gpu=mine: the device present is not a RTX 4090 \(no NVIDIA GPU found\)"),
        ([], None, r"gpu=mine: the device present is not a GPU \(no NVIDIA GPU found\)"),
        (["NVIDIA L4"], "A100", r"gpu=mine: the device present is not an A100 \(NVIDIA L4 found\)"),
        (["NVIDIA L4"], "A100", r"use gpu=local for the machine at hand, or rehearse with gpu\.timing=simulated"),
    ],
)
def test_another_device_is_refused_with_the_remedies(present, names, match, message):
    present(*names)
    with pytest.raises(ValueError, match=message):
        check_device(gpu="mine", device="cuda", match=match)


@pytest.mark.parametrize(("kind", "names"), [("cpu", ["NVIDIA H100"]), ("mps", []), ("auto", []), ("cuda", [])])
def test_cuda_graphs_without_cuda_are_refused_with_the_remedy(present, kind, names):
    present(*names)
    with pytest.raises(ValueError, match=r"runtime=cudagraph: .* gpu=mine has none here; set runtime=eager"):
        check_runtime("cudagraph", gpu="mine", device=kind)
    for runtime in ("eager", "compile"):
        check_runtime(runtime, gpu="mine", device=kind)


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_cuda_graphs_on_cuda_pass(present, kind):
    present("NVIDIA H100")
    check_runtime("cudagraph", gpu="mine", device=kind)


def test_auto_is_the_best_device_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.fixture
def cpus(monkeypatch):
    """The CPUs of a machine with three, which the process may use at first."""
    threads, pinned = torch.get_num_threads(), [{0, 1, 2}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: pinned[-1], raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, chosen: pinned.append(set(chosen)), raising=False)
    allowed_cpus.cache_clear()
    yield pinned
    allowed_cpus.cache_clear()
    torch.set_num_threads(threads)


def test_the_cpu_is_set_up_with_as_many_threads_as_asked(cpus):
    assert prepare_cpu(None) == torch.get_num_threads() == 3
    assert prepare_cpu(1) == torch.get_num_threads() == 1
    assert cpus[-1] == {0}
    assert prepare_cpu(None) == 3  # what an earlier job pinned itself to does not count
    assert cpus[-1] == {0, 1, 2}
    with pytest.raises(ValueError, match=r"runtime\.threads: 4096 is more than the 3 CPUs"):
        prepare_cpu(4096)


def test_the_first_card_that_matches_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("NVIDIA T4", "NVIDIA H100 80GB HBM3")[index])
    assert resolve_device("cuda", match="H100") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"gpu\.match: .*sees NVIDIA T4.* and not H200; check CUDA_VISIBLE_DEVICES"):
        resolve_device("cuda", match="H200")


def test_a_fingerprint_tells_thread_counts_apart_and_repeats():
    cpu = torch.device("cpu")
    first = fingerprint(cpu)
    assert first == fingerprint(cpu)
    assert first["device"] == "cpu" and first["name"] and first["torch"] == torch.__version__
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert fingerprint(cpu) != first
    finally:
        torch.set_num_threads(threads)


def test_the_environment_is_json_and_names_the_libraries():
    record = json.loads(json.dumps(environment(torch.device("cpu"))))
    assert record["fingerprint"] == fingerprint(torch.device("cpu"))
    assert record["versions"]["torch"] and record["versions"]["hawada"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_present_and_has_a_fingerprint():
    assert device.present_gpus()
    check_device(gpu="local", device="cuda", match=None)
    record = fingerprint(torch.device("cuda"))
    assert record["driver"] == device.driver_version() is not None
    assert record["name"] in device.present_gpus()
