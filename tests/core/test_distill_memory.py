"""Why losses are taken in chunks: at a large vocabulary the logits of a batch are most of what training holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# One process for each way, so that neither sees memory that the other left behind. Logits of a chunk, 41 MB, are more
# than glibc ever keeps for later, so what is freed is gone.
SCRIPT = """
import json, resource, sys, threading, time
import torch
from safetensors.torch import save_file
from torch import nn
from hawada.core.distill import Distillation, KDConfig, Outputs

chunk, output = json.loads(sys.argv[1]), sys.argv[2]
TOKENS, WIDTH, VOCABULARY = 640, 64, 128256
generator = torch.Generator().manual_seed(0)
heads = [nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False) for _ in range(2)]
for head in heads:
    head.weight.normal_(generator=generator)
student, teacher = (torch.randn(1, TOKENS, WIDTH, generator=generator) for _ in range(2))
student.requires_grad_()


def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def say(features, head):
    return Outputs(head(features)) if chunk is None else Outputs(None, features, head)


peak, over = held(), threading.Event()


def watch():
    global peak
    while not over.is_set():
        peak = max(peak, held())
        time.sleep(0.005)


watcher = threading.Thread(target=watch)
inputs = peak
watcher.start()
with torch.no_grad():
    wanted = say(teacher, heads[1])
loss = Distillation(KDConfig(2.0), chunk=chunk).losses(say(student, heads[0]), wanted, None)["kd"]
loss.backward()
over.set()
watcher.join()
save_file({"loss": loss.detach(), "gradient": student.grad}, output)
print(json.dumps(peak - inputs))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory of a process as Linux shows it")
def test_losses_in_chunks_hold_a_quarter_of_the_memory_at_most(tmp_path):
    held, found = {}, {}
    for name, chunk in (("plain", None), ("chunked", 80)):
        output = tmp_path / f"{name}.safetensors"
        command = [sys.executable, "-c", SCRIPT, json.dumps(chunk), str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        held[name], found[name] = json.loads(done.stdout), load_file(output)
    assert held["plain"] > 2 * 640 * 128256 * 4  # at least the logits of both were there at once
    assert held["chunked"] <= 0.25 * held["plain"]
    plain, chunked = found["plain"], found["chunked"]
    assert torch.allclose(chunked["loss"], plain["loss"], rtol=1e-5)
    difference = float((chunked["gradient"] - plain["gradient"]).abs().max())
    assert difference <= 1e-5 * float(plain["gradient"].abs().max())
