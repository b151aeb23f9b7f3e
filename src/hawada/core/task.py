"""What the outputs of a kind of model mean: what is distilled, what is learned from labels, and how it is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hawada.core.structure import TensorRow

VOID = 255  # what masks have where a pixel does not count
IGNORED = -100  # the label of a position that no loss and no score counts: padding, or the last one of a text
Loss = Callable[[Tensor, Tensor], Tensor]  # (student's, teacher's) -> a scalar


@dataclass(frozen=True)
class Scores:
    """A model's quality on test data.

    Attributes:
        predicted: The predictions, by which `agreement` compares two models, on the CPU.
        figures: The measures of quality by name, such as `accuracy`, `nll` and `perplexity`.
    """

    predicted: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def nll(self) -> float:
        """The mean negative log-likelihood of the labels, in nats."""
        return self.figures["nll"]

    @property
    def accuracy(self) -> float:
        """The fraction of the positions that count whose likeliest class is the label."""
        return self.figures["accuracy"]

    @property
    def perplexity(self) -> float:
        """exp(nll); for a language model this is the perplexity per token."""
        return self.figures["perplexity"]


class Task:
    """Classification, of whole samples or of tokens: the task of image classifiers and language models.

    Other tasks override what differs.
    """

    def metric(self, of_data: str, labelled: bool) -> str:
        """The name of the measure of quality.

        Args:
            of_data: The one that the data names.
            labelled: Whether the test data have labels.
        """
        return of_data if labelled else "agreement"

    def pick(self, output: Any) -> Tensor:
        """Pick from what a model returns the tensor that is distilled and scored, one row for each sample.

        A task that does not override this leaves it to the model's adapter.
        """
        logits: Tensor = output
        return logits

    def loss(self, kd: Loss) -> Loss:
        """Return the distillation loss, given the configured one."""
        return kd

    def labels_of(self, labels: Tensor, outputs: Tensor) -> Tensor:
        """Return labels as class indices, one for each row of outputs (…, classes).

        Args:
            labels: Class indices of any dtype and of as many elements as there are rows, or one-hot ones.
            outputs: What `pick` returned.

        Raises:
            ValueError: The labels do not fit the outputs.
        """
        rows = outputs.shape[:-1]
        if labels.shape == outputs.shape:
            labels = labels.argmax(-1)
        if labels.numel() != math.prod(rows):
            raise ValueError(
                f"data: labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(outputs.shape)}; give "
                "one class index for each sample, token or pixel, or set task=outputs"
            )
        return labels.reshape(rows).long()

    def label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of outputs (…, classes) against labels (…), a scalar."""
        return F.cross_entropy(outputs.float().flatten(0, -2), labels.flatten())

    def sampled_nll(self, rows: Tensor) -> Tensor:
        """The negative log-likelihood of labels drawn from the predictions for rows (positions, classes), summed."""
        # `Any`, because torch gives `sample` no type hints
        predictions: Any = torch.distributions.Categorical(logits=rows.detach(), validate_args=False)
        drawn: Tensor = predictions.sample()
        return F.cross_entropy(rows, drawn, reduction="sum")

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[Any], pick: Callable[[Any], Tensor]) -> Scores:
        """Run a model, in its own dtype, on test data.

        Args:
            model: The model, in eval mode.
            batches: (inputs,) or (inputs, labels), see `labels_of`; `IGNORED` labels do not count.
            pick: A function of what the model returns that returns logits, (batch, classes) or (batch, tokens,
                classes).

        Raises:
            ValueError: No label counts.
        """
        predicted, seen, loss, classes = [], [], 0.0, 0
        for inputs, *rest in batches:
            logits = pick(run(model, inputs))
            if not rest:
                predicted.append(logits.argmax(-1).flatten().cpu())
                continue
            labels, classes = self.labels_of(rest[0].to(logits.device), logits), logits.shape[-1]
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]  # (positions, classes), (positions,)
            best = logits.argmax(-1)
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            predicted.append(best.cpu())
            seen.append(labels.cpu())
        count = sum(map(len, seen))
        if not predicted or (seen and not count):
            raise ValueError("the test data is empty; check data.root, data.path and data.test_samples")
        if not seen:
            return Scores(torch.cat(predicted))
        return Scores(torch.cat(predicted), self.figures(torch.cat(predicted), torch.cat(seen), loss / count, classes))

    def figures(self, predicted: Tensor, labels: Tensor, nll: float, classes: int) -> dict[str, float]:
        """Return the measures of quality by name.

        Args:
            predicted: The likeliest class at every position that counts, (positions,).
            labels: The right ones.
            nll: The mean negative log-likelihood of the labels, in nats.
            classes: The number of classes.
        """
        accuracy = float((predicted == labels).double().mean())
        return {"accuracy": accuracy, "nll": nll, "perplexity": math.exp(min(nll, 700.0))}

    def agreement(self, teacher: Scores, slim: Scores) -> float:
        """How far two models predict the same, 1 for equal predictions."""
        return float((teacher.predicted == slim.predicted).float().mean())

    def qualities(self, metric: str, teacher: Scores, slim: Scores) -> tuple[float, float]:
        """The quality of the teacher and of the slim model."""
        if metric == "agreement":
            return 1.0, self.agreement(teacher, slim)
        return teacher.figures[metric], slim.figures[metric]


class Segmentation(Task):
    """Semantic segmentation: a class for every pixel.

    Models return (batch, classes, height, width), or a dictionary that holds it as `output`, or a list that begins with
    it. Labels are (batch, height, width), or the same row by row; 255 does not count.

    Args:
        output: The key of the output that is distilled and scored, where a model returns a dictionary.
    """

    def __init__(self, output: str = "out") -> None:
        self.output = output

    def metric(self, of_data: str, labelled: bool) -> str:
        return "mean_iou" if labelled else "agreement"

    def pick(self, output: Any) -> Tensor:
        """Return logits of shape (batch, pixels, classes)."""
        first = output[0] if isinstance(output, list | tuple) else output
        maps: Tensor = first[self.output] if isinstance(first, Mapping) else first
        return maps.movedim(1, -1).flatten(1, -2)

    def labels_of(self, labels: Tensor, outputs: Tensor) -> Tensor:
        """See `Task.labels_of`; of shape (batch, classes, height, width) they are one-hot."""
        if labels.ndim == 4 and labels.shape[1] == outputs.shape[-1] > 1:
            labels = labels.argmax(1)
        found = super().labels_of(labels, outputs)
        return found if outputs.shape[-1] > VOID else torch.where(found == VOID, IGNORED, found)

    def figures(self, predicted: Tensor, labels: Tensor, nll: float, classes: int) -> dict[str, float]:
        """See `Task.figures`; `mean_iou` is the mean over the classes of intersection over union of all pixels."""
        pairs = labels * classes + predicted
        confusion = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).double()
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        overlap = (confusion.diagonal() / union)[union > 0]
        return {**super().figures(predicted, labels, nll, classes), "mean_iou": float(overlap.mean())}


class AnyOutputs(Task):
    """Any tensors, such as those of regression, of embeddings, or several at once: each is distilled on its own scale.

    Args:
        score: The path of a function of (what the model returns, labels) that returns a number for a batch, larger
            is better; its mean over test samples is reported. None reports how far the outputs are from the teacher's.
        learn_labels: Whether labels are learned, by the mean squared error; they must have the outputs' shape.
    """

    def __init__(self, score: str | None = None, learn_labels: bool = False) -> None:
        self.score_path, self.learn_labels = score, learn_labels
        self.own_score = None if score is None else resolve_name(score)
        self._sizes: tuple[int, ...] = ()

    def metric(self, of_data: str, labelled: bool) -> str:
        return "output_error" if self.own_score is None else "score"

    def pick(self, output: Any) -> Tensor:
        """Return the elements of all floating-point outputs in a row, (batch, elements)."""
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.ndim]
        batch = max((len(tensor) for tensor in tensors), default=0)
        of_samples = [tensor for tensor in tensors if len(tensor) == batch]
        rows = [tensor.reshape(batch, -1).float() for tensor in of_samples]
        self._sizes = tuple(row.shape[1] for row in rows)
        return torch.cat(rows, 1)

    def loss(self, kd: Loss) -> Loss:
        """The mean over the output tensors of the squared error relative to the teacher's variance."""
        return self._relative_error

    def labels_of(self, labels: Tensor, outputs: Tensor) -> Tensor:
        """Return the labels as they are."""
        return labels

    def label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean squared error, or 0 where labels are not learned."""
        if not self.learn_labels:
            return outputs.sum() * 0.0
        return F.mse_loss(outputs, labels.reshape(len(labels), -1).float())

    def sampled_nll(self, rows: Tensor) -> Tensor:
        """The same of values drawn from normal distributions around the outputs, on each tensor's scale."""
        scale = self._scale(rows.detach())
        return 0.5 * (torch.randn_like(rows) - (rows - rows.detach()) / scale).square().sum()

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[Any], pick: Callable[[Any], Tensor]) -> Scores:
        """See `Task.score`; `score` is the user's own."""
        predicted, total, count = [], 0.0, 0
        for inputs, *rest in batches:
            output = run(model, inputs)
            predicted.append(pick(output).cpu())
            if self.own_score is not None:
                total += float(self.own_score(output, *rest)) * len(inputs)
            count += len(inputs)
        if not count:
            raise ValueError("the test data is empty; check data.root, data.path and data.test_samples")
        return Scores(torch.cat(predicted), {} if self.own_score is None else {"score": total / count})

    def agreement(self, teacher: Scores, slim: Scores) -> float:
        """The share of the variance of the teacher's outputs that the slim model's have, at least 0."""
        return max(0.0, 1.0 - float(self._relative_error(slim.predicted, teacher.predicted)))

    def qualities(self, metric: str, teacher: Scores, slim: Scores) -> tuple[float, float]:
        """See `Task.qualities`; `output_error` is the root mean squared error relative to the teacher's deviation."""
        if metric == "output_error":
            return 0.0, math.sqrt(float(self._relative_error(slim.predicted, teacher.predicted)))
        return teacher.figures[metric], slim.figures[metric]

    def _relative_error(self, student: Tensor, teacher: Tensor) -> Tensor:
        parts = zip(self._parts(student.float()), self._parts(teacher.float()), strict=True)
        errors = [F.mse_loss(own, target) / target.var(correction=0).clamp_min(1e-12) for own, target in parts]
        return torch.stack(errors).mean()

    def _scale(self, rows: Tensor) -> Tensor:
        """The standard deviation of the output tensor that an element belongs to, as a row."""
        stds = [part.std(correction=0).clamp_min(1e-6).expand(part.shape[1]) for part in self._parts(rows)]
        return torch.cat(stds)

    def _parts(self, rows: Tensor) -> Sequence[Tensor]:
        return torch.split(rows, list(self._sizes), dim=1) if sum(self._sizes) == rows.shape[1] else [rows]


def run(model: nn.Module, inputs: Tensor | TensorRow) -> Any:
    """Call a model with a batch, moved to its device and dtype."""
    weight = next(model.parameters())
    return model(inputs.to(weight if inputs.is_floating_point() else weight.device))
