"""Least squares for the weights of layers that lost inputs, so that they say again what the teacher's said."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hawada.core.finetune import NORMS
from hawada.core.gates import Student
from hawada.core.reconstruction.stepwise import Stepwise, Stopped, stops
from hawada.core.structure import plan_edits

ROWS = 128  # positions of one image that are looked at, at most: neighbours hardly differ
MOST_INPUTS = 16384  # of a layer, kernel included: the square of it is solved
RIDGE = 1e-3  # of the inputs' mean variance: how hard old weights hold on where there are rows in plenty
TEAMS = 256  # threads that passes standing still may have on a CPU: each keeps as many as torch computes with


@torch.no_grad()
def compensate(
    student: Student, teacher: nn.Module, keep: Mapping[str, Sequence[int]], batches: Sequence[Any]
) -> list[str]:
    """Refit every layer that loses inputs to what the teacher's says on the same data; returns their paths, in order.

    Layer by layer in the order of execution, each on what the layers before it say by now, so that a layer also makes
    up for what went wrong before it (He et al., Channel pruning for accelerating very deep neural networks, 2017). A
    pull towards the old weights decides where the data does not. BatchNorm uses the statistics of each batch meanwhile;
    recalibrate it when the model has been sliced. Layers that share their weights, are called more than once or have
    more than `MOST_INPUTS` inputs are left alone.

    All batches go through the models together and wait at each layer until it is refitted; the models must keep nothing
    of a pass on their modules. Where that would take half of the free memory, every layer is come to from the start,
    batch by batch, which is the same and takes longer.

    Args:
        student: its model's weights change, in the columns of inputs that stay; slice it to `keep` afterwards.
        teacher: an ungated copy of that model, in eval mode on the same device.
        keep: kept indices of every gated group.
        batches: (inputs, …), a few hundred samples in all.
    """
    removed = plan_edits(teacher, student.groups, keep).removed
    with student.hard_gated(keep), batch_statistics(student):
        order = readers(student, teacher, keep, batches[0][0])
        inputs = [batch[0] for batch in batches]
        together = len(order) > 1 and _fits(student, inputs)
        visits = (_together if together else _anew)(student, teacher, order, inputs)
        with closing(visits):
            for path, pairs in visits:
                _refit(student.model, path, removed[f"{path}.weight"][1], pairs)
    return order


def _fits(student: Student, inputs: Sequence[Tensor]) -> bool:
    """Whether passes of all batches through both models may stand still at once."""
    device, passes = next(student.model.parameters()).device, 2 * len(inputs)
    x = inputs[0].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        student(x)
        held = torch.cuda.max_memory_allocated(device) - before
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        return passes * held <= free // 2
    few = passes * torch.get_num_threads() <= TEAMS
    return few and passes * _said(student, x) <= psutil.virtual_memory().available // 2


def _said(student: Student, x: Tensor) -> int:
    """Bytes of all that a model's layers say: more than a pass ever holds at once."""
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, Tensor) else 0

    handles = [each.register_forward_hook(count) for each in student.modules() if not list(each.children())]
    student(x)
    for handle in handles:
        handle.remove()
    return total


Visits = Generator[tuple[str, Iterator[tuple[Tensor, Tensor]]]]  # path; what it is given and should say, by batch


def _together(student: Student, teacher: nn.Module, paths: Sequence[str], inputs: Sequence[Tensor]) -> Visits:
    """The layers at these paths, in order of execution; each is seen before it runs."""
    device = next(student.model.parameters()).device
    own, originals = ([model.get_submodule(path) for path in paths] for model in (student.model, teacher))
    passes = [(Stepwise(student, x), Stepwise(teacher, x)) for x in (batch.to(device) for batch in inputs)]
    with stops(own, before=True), stops(originals, before=False):
        try:
            for path, mine, its in zip(paths, own, originals, strict=True):
                yield path, ((here.step(mine), there.step(its)) for here, there in passes)
        finally:
            for one in itertools.chain(*passes):
                one.close()


def _anew(student: Student, teacher: nn.Module, paths: Sequence[str], inputs: Sequence[Tensor]) -> Visits:
    """The same without holding more than one batch's activations."""
    device = next(student.model.parameters()).device
    for path in paths:
        own, original = student.model.get_submodule(path), teacher.get_submodule(path)
        batches = (batch.to(device) for batch in inputs)
        yield path, ((seen(student, own, x)[0], seen(teacher, original, x)[1]) for x in batches)


@torch.no_grad()
def readers(student: Student, teacher: nn.Module, keep: Mapping[str, Sequence[int]], example: Tensor) -> list[str]:
    """Paths of the layers that `compensate` would refit, in the order in which the model comes to them."""
    edits = plan_edits(teacher, student.groups, keep)
    owners = Counter(id(parameter) for module in student.model.modules() for parameter in module._parameters.values())
    found: dict[nn.Module, str] = {}
    for name, dims in edits.removed.items():
        path, _, tensor = name.rpartition(".")
        module: Any = student.model.get_submodule(path)
        gone = any(f"{path}.".startswith(f"{other}.") for other in edits.replaced)
        if tensor == "weight" and 1 in dims and not gone and is_linear(module) and owners[id(module.weight)] == 1:
            found[module] = path
    called: list[str] = []
    handles = [module.register_forward_hook(lambda module, *_: called.append(found[module])) for module in found]
    student(example.to(next(student.model.parameters()).device))
    for handle in handles:
        handle.remove()
    return [path for path in called if called.count(path) == 1]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is plainly linear in its whole input, by weights of (outputs, inputs, …) of its own."""
    plain = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Linear, nn.Conv2d))
    weight = module._parameters.get("weight")  # a computed weight is none
    return plain and weight is not None and getattr(module, "groups", 1) == 1 and weight[0].numel() <= MOST_INPUTS


def _refit(model: nn.Module, path: str, gone: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Solve for the weights of one layer's inputs that stay, and for its bias if it has one.

    Args:
        model: the student's.
        path: of the layer.
        gone: inputs that do not stay.
        pairs: what the layer is given and what it should say, by batch.
    """
    module: Any = model.get_submodule(path)
    stays = torch.ones(module.weight.shape[1], dtype=torch.bool)
    stays[gone] = False
    index = stays.nonzero().flatten().to(module.weight.device)
    old = module.weight[:, index].flatten(1).T.double()  # (inputs, outputs)
    moments = Moments(len(old), old.shape[1], centred=is_centred(model, module))
    for given, wanted in pairs:
        x = input_rows(module, given.index_select(1 if isinstance(module, nn.Conv2d) else -1, index))
        moments.add(x, output_rows(module, wanted))
    covariance = moments.covariance()
    change = torch.linalg.solve(moments.definite(), moments.products_with_outputs() - covariance @ old)
    new = old + change
    module.weight[:, index] = new.T.reshape(-1, len(index), *module.weight.shape[2:]).to(module.weight.dtype)
    if module.bias is not None:
        module.bias.copy_(moments.mean_out - moments.mean_in @ new)


def is_centred(model: nn.Module, module: Any) -> bool:
    """Whether a shift of a layer's outputs is made up for elsewhere: by its bias, or the BatchNorm behind it."""
    norms = any(isinstance(other, NORMS) for other in model.modules())
    return module.bias is not None or (isinstance(module, nn.Conv2d) and norms)


class Moments:
    """Second moments of a layer's inputs x and outputs y, in double precision.

    Args:
        inputs: length of a row of x.
        outputs: of y.
        centred: about their means rather than about 0.
    """

    def __init__(self, inputs: int, outputs: int, *, centred: bool) -> None:
        self.centred = centred
        self.squares = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.products = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.sum_in = torch.zeros(inputs, dtype=torch.float64)
        self.sum_out = torch.zeros(outputs, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows (n, inputs) and (n, outputs)."""
        self.squares = self.squares.to(x.device) + (x.T @ x).double()
        self.products = self.products.to(x.device) + (x.T @ y).double()
        self.sum_in = self.sum_in.to(x.device) + x.double().sum(0)
        self.sum_out = self.sum_out.to(x.device) + y.double().sum(0)
        self.count += len(x)

    @property
    def mean_in(self) -> Tensor:
        """(inputs,); 0 where nothing is centred."""
        return self.sum_in * (self.centred / self.count)

    @property
    def mean_out(self) -> Tensor:
        """(outputs,), likewise."""
        return self.sum_out * (self.centred / self.count)

    def covariance(self) -> Tensor:
        """Of the inputs, (inputs, inputs)."""
        return self.squares / self.count - torch.outer(self.mean_in, self.mean_in)

    def products_with_outputs(self) -> Tensor:
        """Covariance of inputs with outputs, (inputs, outputs)."""
        return self.products / self.count - torch.outer(self.mean_in, self.mean_out)

    def definite(self) -> Tensor:
        """The covariance with a ridge: the fewer rows there are for each input, the less weights may change."""
        covariance = self.covariance()
        ridge = RIDGE + len(covariance) / self.count
        covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(1e-12))
        return covariance


def input_rows(module: Any, x: Tensor) -> Tensor:
    """A layer's input, or some of its channels, as rows that its weights multiply: (rows, inputs).

    Of a convolution `ROWS` positions of each image are looked at, of a linear layer all.
    """
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2).float()
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, _padding(module), mode=mode)
    (tall, wide), (down, right) = module.kernel_size, module.dilation
    patches = padded.unfold(2, down * (tall - 1) + 1, module.stride[0])
    patches = patches.unfold(3, right * (wide - 1) + 1, module.stride[1])[..., ::down, ::right]
    # That is a view, of which only the chosen patches are copied: (images, channels, height, width, *kernel).
    height, width = patches.shape[2:4]
    chosen = _chosen(len(x), height * width).to(x.device)  # (images, positions)
    image = torch.arange(len(x), device=x.device)[:, None]
    return patches[image, :, chosen // width, chosen % width].flatten(2).flatten(0, 1).float()


def output_rows(module: Any, y: Tensor) -> Tensor:
    """The rows of a layer's output that belong to those of `input_rows`: (rows, outputs)."""
    if not isinstance(module, nn.Conv2d):
        return y.flatten(0, -2).float()
    flat = y.flatten(2)  # (images, outputs, positions)
    chosen = _chosen(*flat.shape[::2]).to(y.device)
    return flat.gather(2, chosen[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2).flatten(0, 1).float()


def _padding(module: nn.Conv2d) -> list[int]:
    """As `F.pad` wants it: left, right, top, bottom."""
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for size in reversed(total) for side in (size // 2, size - size // 2)]
    sizes = (0, 0) if module.padding == "valid" else tuple(int(size) for size in module.padding)
    return [sizes[1], sizes[1], sizes[0], sizes[0]]


@lru_cache(maxsize=64)
def _chosen(images: int, positions: int) -> Tensor:
    """Which positions of each image are looked at, the same ones every time: (images, at most ROWS)."""
    if positions <= ROWS:
        return torch.arange(positions).expand(images, -1)
    return torch.rand(images, positions, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :ROWS].clone()


def seen(model: nn.Module, module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a module of a model is given and says; the rest of the forward pass is left out."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append((args[0], output))
        raise Stopped

    handle = module.register_forward_hook(hook)
    try:
        with suppress(Stopped):  # raised by the hook above, and by nothing else
            model(inputs)
    finally:
        handle.remove()
    return found[0]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm by the batch's own statistics, and without remembering them."""
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    training = [norm.training for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
        norm.train()
    try:
        yield
    finally:
        for norm, was in zip(norms, training, strict=True):
            norm.track_running_stats = True
            norm.train(was)
