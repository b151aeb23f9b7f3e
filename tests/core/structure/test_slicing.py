import copy

import pytest
import torch
from torch import nn

from hawada.core.structure import slice_conv2d, slice_embedding, slice_linear
from hawada.core.structure.slicing import slice_tensor


def test_slice_tensor_copies_without_history():
    weight = nn.Parameter(torch.arange(12.0).view(3, 4))
    for index in ([0, 2], torch.tensor([0, 2]), None):
        sliced = slice_tensor(weight, 1, index)
        assert torch.equal(sliced, weight.detach() if index is None else weight.detach()[:, [0, 2]])
        assert not sliced.requires_grad and sliced.is_contiguous()
        sliced.zero_()
    assert float(weight.detach().sum()) == 66.0


def test_an_empty_axis_is_refused():
    with pytest.raises(ValueError, match="nothing would be left of an axis of 4; keep at least one element"):
        slice_tensor(torch.zeros(3, 4), 1, [])


@pytest.mark.parametrize(("index", "named"), [([0, 4], 4), ([-1, 2], -1)])
def test_an_index_outside_the_axis_is_named(index, named):
    with pytest.raises(ValueError, match=f"index {named} is outside an axis of 4 elements"):
        slice_tensor(torch.zeros(3, 4), 1, index)


@pytest.mark.parametrize("bias", [True, False])
def test_a_sliced_linear_computes_the_kept_outputs_of_the_kept_inputs(bias):
    linear, x = nn.Linear(5, 4, bias=bias), torch.randn(2, 5)
    x[:, [1, 2]] = 0.0
    sliced = slice_linear(linear, out_features=[0, 3], in_features=[0, 3, 4])
    assert torch.allclose(sliced(x[:, [0, 3, 4]]), linear(x)[:, [0, 3]], atol=1e-6)
    assert (sliced.in_features, sliced.out_features, sliced.bias is not None) == (3, 2, bias)


def test_a_sliced_convolution_keeps_its_geometry():
    conv = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(2, 0), dilation=(2, 1), bias=False, padding_mode="circular")
    x = torch.randn(2, 4, 9, 9)
    x[:, [0, 2]] = 0.0
    sliced = slice_conv2d(conv, out_channels=[1, 4, 5], in_channels=[1, 3])
    assert torch.allclose(sliced(x[:, [1, 3]]), conv(x)[:, [1, 4, 5]], atol=1e-6)
    assert (sliced.in_channels, sliced.out_channels) == (2, 3)


def test_a_sliced_convolution_keeps_its_bias():
    conv = nn.Conv2d(2, 4, 3)
    assert torch.equal(slice_conv2d(conv, out_channels=[3, 1]).bias, conv.bias[[3, 1]])


def test_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="a convolution with groups=2 has no freely removable channels; groups=1"):
        slice_conv2d(nn.Conv2d(4, 4, 3, groups=2), out_channels=[0])


def test_a_sliced_embedding_looks_up_the_kept_columns_of_the_kept_rows():
    embedding = nn.Embedding(6, 4, padding_idx=3)
    sliced = slice_embedding(embedding, embedding_dim=[0, 2], num_embeddings=[1, 3, 5])
    assert torch.equal(sliced(torch.tensor([0, 2])), embedding(torch.tensor([1, 5]))[:, [0, 2]])
    assert (sliced.num_embeddings, sliced.embedding_dim, sliced.padding_idx) == (3, 2, 1)


def test_the_padding_row_cannot_be_cut():
    with pytest.raises(ValueError, match="row 3 is the padding row and cannot be cut; keep it in num_embeddings"):
        slice_embedding(nn.Embedding(6, 4, padding_idx=3), num_embeddings=[0, 1])


def test_mode_and_requires_grad_follow_and_the_original_stays():
    linear = nn.Linear(4, 4).eval()
    linear.weight.requires_grad_(False)
    before = copy.deepcopy(linear.state_dict())
    sliced = slice_linear(linear, out_features=[1, 2])
    assert not sliced.training and not sliced.weight.requires_grad and sliced.bias.requires_grad
    with torch.no_grad():
        sliced.weight.zero_()
        sliced.bias.zero_()
    assert linear.out_features == 4
    assert all(torch.equal(linear.state_dict()[name], tensor) for name, tensor in before.items())
