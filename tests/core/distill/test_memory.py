"""Losses are taken in chunks because with a large vocabulary a batch's logits take most of the memory in training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# This runs in a process of its own, in which glibc returns every large block to the system as soon as it is freed.
SCRIPT = """
import json, resource, sys, threading, time
import torch
from safetensors.torch import save_file
from torch import nn
from hawada.core.distill import Distillation, KDConfig, Outputs

TOKENS, WIDTH, VOCABULARY = 96, 64, 128256
generator = torch.Generator().manual_seed(0)
heads = [nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False) for _ in range(2)]
for head in heads:
    head.weight.normal_(generator=generator)
features = [torch.randn(1, TOKENS, WIDTH, generator=generator) for _ in range(2)]


def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def outputs_of(features, head, chunk):
    return Outputs(head(features)) if chunk is None else Outputs(None, features, head)


def train(chunk, features, heads):
    student = features[0].clone().requires_grad_()
    with torch.no_grad():
        targets = outputs_of(features[1], heads[1], chunk)
    loss = Distillation(KDConfig(2.0), chunk=chunk).losses(outputs_of(student, heads[0], chunk), targets, None)["kd"]
    loss.backward()
    return {"loss": loss.detach(), "gradient": student.grad}


def watched(chunk):
    before, over = held(), threading.Event()
    peak = before

    def watch():
        nonlocal peak
        while not over.is_set():
            peak = max(peak, held())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    save_file(train(chunk, features, heads), f"{sys.argv[1]}/{chunk}.safetensors")
    over.set()
    watcher.join()
    return peak - before


for chunk in (None, 2):  # the first call of a library allocates memory that stays
    train(chunk, [part[:, :4] for part in features], [nn.Linear(WIDTH, 8)] * 2)
print(json.dumps({"chunked": watched(12), "plain": watched(None)}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory of a process as Linux shows it")
def test_losses_in_chunks_hold_a_quarter_of_the_memory_at_most(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout)
    assert held["plain"] > 2 * 96 * 128256 * 4  # the logits of both models existed at once
    assert held["chunked"] <= 0.25 * held["plain"]
    plain, chunked = (load_file(tmp_path / f"{chunk}.safetensors") for chunk in (None, 12))
    assert torch.allclose(chunked["loss"], plain["loss"], rtol=1e-5)
    difference = float((chunked["gradient"] - plain["gradient"]).abs().max())
    assert difference <= 1e-5 * float(plain["gradient"].abs().max())
