"""The base class of adapters, which lists what a model family must declare, and how the models are saved."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hawada.core.distill import Alignment, Outputs
from hawada.core.files import partial_path, sha256
from hawada.core.structure import (
    Edits,
    Group,
    Inputs,
    Keep,
    KeptWhole,
    Site,
    all_tensors,
    fill,
    materialize,
    plan_edits,
    set_structure,
)

WEIGHTS = "model.safetensors"
MANIFEST = "hawada.json"
CHANNELS_LAST = "channels_last"
MANIFEST_FORMAT = 2  # a manifest with another number is refused


@dataclass(frozen=True)
class Shape:
    """The shape of one timed call.

    Attributes:
        batch: The number of sequences or images that are computed at once.
        phase: This is `forward` (a plain forward pass), or for a language model `prefill` (the prompt, up to the first
            token), `decode` (one further token) or `generate` (the prompt and all new tokens).
        prompt: The number of tokens that the prompt has.
        new_tokens: The number of tokens that are generated after it.
    """

    batch: int
    phase: str = "forward"
    prompt: int = 128
    new_tokens: int = 32


class Adapter(ABC):
    """Declares one family of models.

    A subclass keeps its constructor's arguments plain (strings, numbers, lists): they are what a saved model's
    manifest holds, and `skeleton()` must rebuild the same architecture from them.

    Attributes:
        modality: `image` or `text`, the kind of data that the models take.
        phases: The phases whose latency can be asked for.
        layouts: These are `heterogeneous` (every group has its own width) and possibly `uniform`.
        imports: The constructor arguments that name code to import and call; a saved model with one must be trusted.
        stock_reload: A Python program that loads a saved model without this package and runs it; None where the format
            needs this package. It takes four arguments: the folder, a safetensors file of inputs, the safetensors file
            that it writes the outputs to, and the number of threads.
    """

    modality = "image"
    phases: tuple[str, ...] = ("forward",)
    layouts: tuple[str, ...] = ("heterogeneous",)
    imports: tuple[str, ...] = ()
    stock_reload: str | None = None

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """Build the untrained architecture in eval mode, on torch's current default device (`meta` costs nothing)."""

    @abstractmethod
    def teacher(self) -> nn.Module:
        """Load the pretrained model in eval mode, in float32 on the CPU.

        Raises:
            ValueError: The weights are not found or cannot be downloaded; the message names the local-path option.
        """

    def check_teacher(self) -> None:  # noqa: B027 (a family without files to check has nothing to override)
        """Check quickly that `teacher()` will find its weights; nothing is loaded.

        Raises:
            ValueError: The weights will not be found; the message names the local-path option.
        """

    def saved_gates(self) -> Path | None:
        """Return the safetensors file of trained gates (theta by group name) beside the weights; None without one."""
        return None

    def check_layout(self, layout: str, groups: Sequence[Group]) -> None:
        """Check that models can be saved in a layout.

        Raises:
            ValueError: This family has no such layout.
        """
        if layout not in self.layouts:
            raise ValueError(
                f"export.layout: {layout} is not a layout of {type(self).__name__}; it has {', '.join(self.layouts)}"
            )

    def check_shape(self, shape: Shape) -> None:
        """Check that models can be called with a shape.

        Raises:
            ValueError: This family has no such phase, or the shape exceeds what the model takes.
        """
        if shape.phase not in self.phases:
            raise ValueError(
                f"budget.phase: {shape.phase} is not a phase of {type(self).__name__}; it has {', '.join(self.phases)}"
            )

    @abstractmethod
    def groups(self, model: nn.Module) -> list[Group]:
        """Declare everything that may be removed from `model`, a skeleton or teacher of this adapter."""

    def kept_whole(self, model: nn.Module) -> Sequence[KeptWhole]:
        """List the layers of `model` that keep units which one would expect to go, with the reasons."""
        return ()

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """The modules of `model` that the latency table times, in order of execution.

        A module that no group touches is left out: its time is part of the proxy's overhead.
        """

    @abstractmethod
    def example_inputs(self, shape: Shape) -> Inputs:
        """Inputs of one call in the shape's phase, on the CPU; they have the same values every time."""

    def input_names(self) -> Sequence[str]:
        """The names of the inputs where the model takes several, in the order of `example_inputs`."""
        return ()

    def workload(self, model: nn.Module, shape: Shape) -> nn.Module:
        """The module that is timed: called with `example_inputs(shape)`, it runs `model` as the phase does."""
        return model

    def parts(self, model: nn.Module, shape: Shape) -> list[tuple[float, nn.Module, Shape]]:
        """The calls that the phase is made of, as (how often, workload, its shape); the site table times each."""
        return [(1.0, self.workload(model, shape), shape)]

    def raw(self, model: nn.Module) -> nn.Module:
        """The module whose outputs are compared, distilled and counted: `model` itself, unless it postprocesses.

        Args:
            model: a teacher, a student or a slim model; the result shares its modules and parameters.
        """
        return model

    def logits(self, output: Any) -> Tensor:
        """The logits, (batch, classes) or (batch, tokens, classes), within what the model returns."""
        logits: Tensor = output
        return logits

    def outputs(self, model: nn.Module, inputs: Tensor, *, features: bool = False, hidden: bool = False) -> Outputs:
        """Run a model for distillation.

        Args:
            model: a teacher, a student or a slim model.
            inputs: one batch, on the model's device.
            features: return what the last layer is called with, and the layer, instead of logits.
            hidden: return the hidden states too.

        Raises:
            ValueError: The family has no features or hidden states.
        """
        self.check_outputs(features=features, hidden=hidden)
        return Outputs(self.logits(self.raw(model)(inputs)))

    def check_outputs(self, *, features: bool, hidden: bool) -> None:
        """Check that `outputs` has the features or hidden states that distillation uses.

        Raises:
            ValueError: The family has none; the message names the keys to change.
        """
        if features or hidden:
            raise ValueError(
                f"{type(self).__name__} has no features or hidden states; set distill.chunk=null and "
                "distill.hidden_weight=0"
            )

    def alignment(self, groups: Sequence[Group], keep: Keep) -> Alignment | None:
        """Say which of the teacher's hidden states a model sliced to `keep` still has; None stands for all of them."""
        return None

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Return the mean and standard deviation per channel that the weights were trained with.

        None leaves the normalisation to the data.
        """
        return None

    def tokenizer(self) -> Any:
        """Return the tokenizer of a text model.

        Raises:
            ValueError: The family takes no text.
        """
        raise ValueError(f"{type(self).__name__} takes no text; choose data= of the kind that the model takes")

    def greedy_tokens(self, model: nn.Module, inputs: Inputs, count: int) -> Tensor | None:
        """Generate tokens greedily after `inputs`, (batch, count); None for models that generate nothing."""
        return None

    def slim(self, model: nn.Module, groups: Sequence[Group], keep: Keep) -> nn.Module:
        """The physically smaller model, in eval mode: no gates, no hooks.

        Args:
            model: the teacher, or a student's gated model; not changed.
            groups: its declaration.
            keep: kept indices of every group.
        """
        return materialize(model, groups, keep).eval()

    def slice_site(self, model: nn.Module, groups: Sequence[Group], keep: Keep, path: str) -> nn.Module:
        """The module that `slim` has for the one at `path` of `model`, the identity where it is gone.

        The latency table and the staircases of the doctor time it, so a family that overrides `slim` overrides this
        too. Nothing outside the module is cut.

        Args:
            model: the unpruned model, in eval mode; not changed.
            groups: its declaration.
            keep: kept indices of every group.
            path: of a site of `sites(model)`.
        """
        return materialize(model, groups, keep, path)

    def loads_with(self, path: str, model: nn.Module) -> str:
        """Return Python code that loads a saved model from `path`."""
        return f"import hawada\n\nmodel = hawada.load({path!r})"

    def as_saved(self, model: nn.Module) -> nn.Module:
        """Return the model with its weights rounded as `write` rounds them, in float32 on the CPU."""
        return model

    def write(self, path: Path, model: nn.Module, edits: Edits) -> dict[str, Any]:
        """Write the weights into a folder.

        Args:
            path: the folder; it exists.
            model: what `slim` returned, possibly finetuned.
            edits: what was planned on the unpruned model to make it.

        Returns:
            What the manifest must hold for `read` to rebuild the shape.
        """
        first = _first_names(model)
        state = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if first.get(name, name) == name  # safetensors holds a tensor that has several names once
        }
        save_file(state, path / WEIGHTS, metadata={"format": "pt"})
        replaced = {name: list(keeps) for name, keeps in edits.replaced.items()}
        structure: dict[str, Any] = {"attributes": edits.attributes, "replaced": replaced}
        return structure | ({"memory_format": CHANNELS_LAST} if _is_channels_last(model) else {})

    def read(self, path: Path, manifest: Mapping[str, Any]) -> nn.Module:
        """Read what `write` wrote: the model in eval mode, on the CPU.

        Args:
            path: the folder.
            manifest: its hawada.json, with what `write` returned.

        Raises:
            ValueError: when the weights do not fit the manifest.
        """
        with torch.device("meta"):
            model = self.skeleton()
        model = set_structure(model, manifest["attributes"], manifest["replaced"])
        _fill(model, load_file(path / WEIGHTS), path)
        if manifest.get("memory_format") == CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model.eval()


def save_model(
    path: Path,
    model: nn.Module,
    *,
    adapter: Adapter,
    adapter_spec: Mapping[str, Any],
    teacher: nn.Module,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
) -> list[Path]:
    """Write a teacher or slim model beside a manifest that tells how to rebuild its shape.

    The manifest carries the SHA-256 of the weights and is written last, so a folder without it is not a model. A model
    that was saved there before is replaced; other files stay as they are.

    Args:
        path: The folder, which is made if it is missing.
        model: The result of `adapter.slim(teacher, groups, keep)`, possibly finetuned.
        adapter: The adapter of the model's family.
        adapter_spec: The adapter's `_target_` and constructor arguments.
        teacher: The unpruned architecture; the values of its weights do not matter.
        groups: The groups that the adapter declares of the teacher.
        keep: The kept indices by group name.

    Returns:
        The files that were written.

    Raises:
        ValueError: One of these files would replace a file that does not belong to a saved model.
    """
    path.mkdir(parents=True, exist_ok=True)
    scratch = partial_path(path / "model")  # inside, because what is beside may be another file system
    scratch.mkdir()
    try:
        structure = adapter.write(scratch, model, plan_edits(teacher, groups, keep))
        names = sorted(file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file())
        before = _saved_before(path, [*names, Path(MANIFEST)])
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, path / name)
    finally:
        shutil.rmtree(scratch)
    for gone in before - {str(name) for name in names}:
        (path / gone).unlink(missing_ok=True)  # weights of the earlier model, which would be taken for this one's
    manifest = {
        "format": MANIFEST_FORMAT,
        "adapter": dict(adapter_spec),
        **structure,
        "keep": {name: list(kept) for name, kept in keep.items()},
        "sha256": {str(name): sha256(path / name) for name in names if name.match("*.safetensors")},
    }
    whole = partial_path(path / MANIFEST)
    whole.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(whole, path / MANIFEST)
    return [*(path / name for name in names), path / MANIFEST]


def _saved_before(path: Path, names: Sequence[Path]) -> set[str]:
    """List the weights of the model that was saved in a folder before, by the names in its manifest.

    Raises:
        ValueError: One of `names` exists although no model was saved there, or is a link.
    """
    try:
        record = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        record = None
    saved = isinstance(record, dict) and isinstance(record.get("sha256"), dict) and "adapter" in record
    for name in names:
        if os.path.lexists(path / name) and ((path / name).is_symlink() or not saved):
            raise ValueError(
                f"{path / name} was there before and is no saved model's, so it is not replaced; "
                "move it away, or save to another folder"
            )
    if record is None or not saved:
        return set()
    known = {name: path / name for name in record["sha256"] if Path(name).name == name}
    return {name for name, file in known.items() if file.is_file() and not file.is_symlink()}


def _is_channels_last(model: nn.Module) -> bool:
    """Return whether convolutions of images lie in memory with the channels innermost."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4 and not parameter.is_contiguous()]
    return any(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give every tensor of a meta model its saved value, whatever its shape; the names must agree exactly."""
    first = _first_names(model)
    expected = {first.get(name, name) for name in model.state_dict()}
    if expected != set(state):
        odd = sorted(expected ^ set(state))[0]
        raise ValueError(f"{path / WEIGHTS} does not fit its manifest: {odd} is on one side only; export it again")
    fill(model, {name: state[first.get(name, name)] for name in model.state_dict()})


def _first_names(model: nn.Module) -> dict[str, str]:
    """For every parameter and buffer the first of its names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in all_tensors(model).items()}
