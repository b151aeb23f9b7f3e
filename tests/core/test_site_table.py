import copy
import json

import numpy as np
import pytest
import torch

from hawada.adapters.base import Shape
from hawada.adapters.torchvision.resnet import ResNetAdapter
from hawada.core.export import ExportPolicy, Rounding, materialize
from hawada.core.profiler import Rounds
from hawada.core.proxy_cost import LatencyProxy, fidelity, random_keep
from hawada.core.simulated import SimulatedClock
from hawada.core.site_table import LatencyTable, build_table
from hawada.core.structure import full_widths, widths_of

QUICK = Rounds(precision=0.5, min_rounds=3, max_rounds=3)


@pytest.fixture(scope="module")
def resnet():
    """The tiny network, its declaration and a simulated table of it."""
    adapter = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32)
    model = adapter.skeleton()
    groups, sites, inputs = adapter.groups(model), adapter.sites(model), adapter.example_inputs(Shape(8))
    policy = ExportPolicy(rounding={"channel": Rounding(8)})
    table = build_table(
        model, groups, sites, [(1, model, inputs)], SimulatedClock(), policy=policy, points=5, rounds=QUICK
    )
    return model, groups, inputs, policy, table


def test_tables_round_trip_through_json(hand_table):
    table = hand_table
    copied = LatencyTable.from_dict(json.loads(json.dumps(table.as_dict())))
    assert copied.as_dict() == table.as_dict()
    assert [entry.site for entry in copied.sites] == [entry.site for entry in table.sites]
    assert [entry.grid for entry in copied.sites] == [entry.grid for entry in table.sites]
    widths = {"wide": 7, "branch": 1, "inner": 3}
    assert float(LatencyProxy(copied).predict(widths)) == float(LatencyProxy(table).predict(widths))


def test_the_table_predicts_unseen_sliced_models(resnet):
    model, groups, inputs, policy, table = resnet
    random, proxy, clock = np.random.default_rng(0), LatencyProxy(table), SimulatedClock()
    predicted, measured = [], []
    for index in range(14):
        keep = random_keep(groups, policy, random)
        ms = clock.prepare(materialize(model, groups, keep), inputs)()
        if index < 6:
            proxy.add_sample(widths_of(keep, groups), ms)
        else:
            predicted.append(float(proxy.predict(widths_of(keep, groups))))
            measured.append(ms)
    found = fidelity(predicted, measured)
    assert found["mape"] < 0.05
    assert found["kendall_tau"] > 0.85


def test_grids_hold_allowed_widths_with_both_ends(resnet):
    _, groups, _, policy, table = resnet
    allowed = {group.name: policy.widths(group) for group in groups}
    for entry in table.sites:
        for name, points in zip(entry.site.groups, entry.grid, strict=True):
            assert set(points) <= set(allowed[name])
            assert (points[0], points[-1]) == (allowed[name][0], allowed[name][-1])
            assert len(points) <= 5


def test_a_removed_branch_costs_the_same_whatever_was_inside(resnet):
    table = resnet[-1]
    for entry in table.sites:
        assert len(set(entry.ms[0].tolist())) == 1
        assert entry.ms[0, 0] < entry.ms[1, -1]


def test_identical_sites_are_timed_once_and_no_hook_stays(resnet):
    model, groups, inputs, policy, _ = resnet

    class Counting(SimulatedClock):
        prepared = 0

        def prepare(self, model, inputs):
            self.prepared += 1
            return super().prepare(model, inputs)

    sites = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32).sites(model)
    clock, state = Counting(), copy.deepcopy(model.state_dict())
    table = build_table(model, groups, sites[:2], [(1, model, inputs)], clock, policy=policy, points=3, rounds=QUICK)
    assert clock.prepared == 3  # three widths for two blocks of one shape; where a branch is gone nothing runs
    assert table.sites[0].ms.tolist() == table.sites[1].ms.tolist()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_the_proxy_never_falls_when_a_width_grows_however_noisy_the_clock(resnet):
    model, groups, inputs, policy, _ = resnet
    sites = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32).sites(model)
    clock = SimulatedClock(noise=0.5, seed=1)
    table = build_table(model, groups, sites, [(1, model, inputs)], clock, policy=policy, points=5, rounds=QUICK)
    proxy, random = LatencyProxy(table), np.random.default_rng(2)
    for _ in range(100):
        narrow = {group.name: float(random.uniform(0, group.units)) for group in groups}
        wide = {name: float(random.uniform(width, full_widths(groups)[name])) for name, width in narrow.items()}
        assert float(proxy.predict(narrow)) <= float(proxy.predict(wide)) + 1e-9


def test_a_table_over_several_widths_is_monotone_in_each():
    adapter = ResNetAdapter(arch="bottleneck", layers=[1, 1, 1, 1], num_classes=10, image_size=32)
    model = adapter.skeleton()
    table = build_table(
        model,
        adapter.groups(model),
        adapter.sites(model)[:1],
        [(1, model, adapter.example_inputs(Shape(1)))],
        SimulatedClock(noise=0.5),
        policy=ExportPolicy(rounding={"channel": Rounding(16)}),
        points=4,
        rounds=QUICK,
    )
    ms = table.sites[0].ms
    assert ms.shape == (2, 3, 3)
    assert all((np.diff(ms, axis=axis) >= 0).all() for axis in range(3))
