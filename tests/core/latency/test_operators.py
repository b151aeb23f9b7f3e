import torch
from torch import nn
from torch.nn import functional

from hawada.core.latency import list_operators
from hawada.core.latency.operators import Operator


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def work_of(function, *inputs, **options):
    return list_operators(Call(function), inputs, **options)


def test_a_product_counts_two_operations_a_multiplication_and_every_tensor_once():
    assert work_of(torch.mm, torch.zeros(3, 5), torch.zeros(5, 7)) == [Operator(2 * 3 * 5 * 7, 4 * (15 + 35 + 21))]


def test_bytes_follow_the_dtype():
    assert work_of(torch.relu, torch.zeros(6, dtype=torch.bfloat16)) == [Operator(0, 24)]


def test_views_are_no_work():
    assert work_of(lambda x: x.view(6).unsqueeze(0), torch.zeros(2, 3)) == []


def test_in_place_reads_and_writes_once():
    assert work_of(lambda x: x.mul_(2), torch.zeros(10)) == [Operator(0, 80)]


def test_a_lookup_moves_the_rows_that_it_returns_and_not_the_table():
    ids, table = torch.zeros(4, dtype=torch.long), torch.zeros(1000, 8)
    assert work_of(functional.embedding, ids, table) == [Operator(0, 4 * 8 + 2 * 4 * 8 * 4)]
    assert work_of(lambda t, i: t[i], table, ids) == [Operator(0, 4 * 8 + 2 * 4 * 8 * 4)]


def test_writing_rows_moves_these_rows():
    ids, rows = torch.zeros(4, dtype=torch.long), torch.zeros(4, 8)
    found = work_of(lambda t, i, r: t.index_copy_(0, i, r), torch.zeros(1000, 8), ids, rows)
    assert found == [Operator(0, 2 * (4 * 8 + 4 * 8 * 4))]


def test_tiles_round_the_arithmetic_up_but_not_the_bytes():
    plain, tiled = (work_of(torch.mm, torch.zeros(3, 5), torch.zeros(5, 7), tile=tile)[0] for tile in (1, 8))
    assert tiled.flops == 2 * 8**3 > plain.flops and tiled.bytes == plain.bytes


def test_a_device_counts_like_shapes_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.zeros(2, 3, 8, 8)
    there, shapes = (list_operators(model, (x,), on_shapes=on_shapes) for on_shapes in (False, True))
    assert [operator.flops for operator in there] == [operator.flops for operator in shapes]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
