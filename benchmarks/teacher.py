"""Published weights made ready for other images than they were trained on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from cifar_resnet import CifarResNet
from safetensors.torch import load_file, save_file

from hawada.core.files import partial_path
from hawada.core.finetune import Finetuner
from hawada.data import cifar10


def adapted(weights: Path, depth: int, data: Path, epochs: int, root: Path) -> Path:
    """Weights of a CIFAR ResNet, finetuned on labels for some epochs of the training images; made once in `root`."""
    asked = hashlib.blake2b(f"{depth} {data.resolve()} {epochs}".encode() + weights.read_bytes(), digest_size=8)
    path = root / f"teacher_{asked.hexdigest()}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        model = CifarResNet(depth)
        model.load_state_dict(load_file(weights))
        accelerator = Accelerator(mixed_precision="bf16")
        loader = cifar10(str(data)).resident(accelerator.device).train_loader(64, seed=0)
        trainer = Finetuner(epochs, lr=1e-3, weight_decay=5e-4)
        trainer.fit(model, loader, accelerator=accelerator)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.cpu().state_dict(), path)
    return path


def ten_classes(weights: Path, data: Path, root: Path) -> Path:
    """Weights of an ImageNet classifier, a .pth state dict, whose `_fc` keeps Imagenette's classes; made once."""
    asked = hashlib.blake2b(f"{data.resolve()}".encode() + weights.read_bytes(), digest_size=8)
    path = root / f"ten_classes_{asked.hexdigest()}.safetensors"
    if path.is_file():
        return path
    with np.load(data / "val.npz", allow_pickle=False) as archive:
        rows = torch.from_numpy(archive["imagenet1k_index"])
    state = torch.load(weights, map_location="cpu", weights_only=True)  # tensors; no code is run
    state |= {name: state[name][rows].clone() for name in ("_fc.weight", "_fc.bias")}
    root.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    os.replace(partial, path)
    return path
