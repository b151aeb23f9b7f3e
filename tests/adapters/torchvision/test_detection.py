"""torchvision's detectors: the raw outputs of gated and sliced models agree, and boxes are scored."""

import copy

import pytest
import torch
from torch import nn

from hawada.adapters import Shape
from hawada.adapters.torchvision import Detection, DetectorAdapter
from hawada.core.evaluate import compare_outputs
from hawada.core.gates import Student
from hawada.core.structure import keep_first, materialize
from hawada.core.task import Scores

DETECTORS = ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn"]


def build(arch):
    torch.manual_seed(0)
    adapter = DetectorAdapter(arch, num_classes=4, image_size=96, stream=True)
    model = adapter.skeleton()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return adapter, model


@pytest.mark.parametrize("arch", DETECTORS[:2])
def test_raw_outputs_of_gated_and_sliced_detectors_agree(arch):
    adapter, model = build(arch)
    inputs = adapter.example_inputs(Shape(2))
    groups = adapter.groups(model)
    cut = {cut.tensor.partition(".")[0] for group in groups for cut in group.cuts}
    assert "backbone" in cut and ("head" in cut or "rpn" in cut)
    keep = keep_first(groups, {g.name: 1 if g.removes else max(1, g.units // 2) for g in groups})
    slim = materialize(model, groups, keep).eval()
    with torch.no_grad(), Student(copy.deepcopy(model), groups) as student, student.hard_gated(keep):
        found = compare_outputs(adapter.raw(student)(*inputs), adapter.raw(slim)(*inputs))
        boxes = slim(*inputs)  # the whole call, postprocessing included
    assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
    assert len(boxes) == 2 and {"boxes", "scores", "labels"} <= set(boxes[0])
    assert model.state_dict().keys() == adapter.skeleton().state_dict().keys()


def test_raw_shares_the_weights_and_leaves_the_model_as_it_is():
    adapter, model = build(DETECTORS[0])
    raw = adapter.raw(model)
    assert next(raw.parameters()) is next(model.parameters()) and "forward" not in vars(model)


def test_what_is_no_detector_is_refused():
    with pytest.raises(ValueError, match=r"ResNet is no detector of torchvision's; is model\.adapter the right one"):
        DetectorAdapter("resnet18", image_size=64).groups(DetectorAdapter("resnet18").skeleton())


class Found(nn.Module):
    """Returns the boxes that it holds."""

    def __init__(self, boxes, labels, scores):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.found = {"boxes": boxes, "labels": labels, "scores": scores}

    def forward(self, images):
        return [self.found for _ in images]


BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]])


def scores(boxes, kinds, values, labels=None):
    model = Found(boxes, torch.tensor(kinds), torch.tensor(values))
    batch = (torch.zeros(2, 3, 64, 64), *([] if labels is None else [labels]))
    return Detection().score(model, [batch], lambda output: output)


def test_the_mean_average_precision_by_hand():
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    truth = torch.full((2, 3, 5), -1.0)
    truth[:, 0] = torch.tensor([0.0, 0.0, 10.0, 10.0, 1.0])
    truth[:, 1] = torch.tensor([20.0, 20.0, 40.0, 41.0, 2.0])
    assert scores(BOXES, [1, 2], [0.9, 0.8], truth).figures["map_50"] == pytest.approx(1.0)
    assert scores(BOXES, [1, 1], [0.9, 0.8], truth).figures["map_50"] == pytest.approx(0.5)


def test_agreement_counts_the_teachers_confident_boxes():
    task = Detection()
    teacher = Scores(torch.tensor([[[0.0, 0, 10, 10, 1, 0.9], [20, 20, 40, 40, 2, 0.8], [0, 0, 5, 5, 1, 0.1]]]))
    slim = Scores(torch.tensor([[[0.0, 0, 10, 11, 1, 0.6], [20, 20, 40, 40, 1, 0.9]]]))
    assert task.agreement(teacher, teacher) == 1.0 and task.agreement(teacher, slim) == 0.5
