import copy
import json

import numpy as np
import pytest
import torch

from hawada.adapters.torchvision.resnet import ResNetAdapter
from hawada.core.export import ExportPolicy, Rounding, materialize
from hawada.core.profiler import Rounds
from hawada.core.proxy_cost import (
    LatencyProxy,
    LatencyTable,
    SiteTable,
    build_table,
    fidelity,
    random_keep,
)
from hawada.core.simulated import SimulatedClock
from hawada.core.structure import Site, full_widths, keep_all, widths_of, without_orphans

QUICK = Rounds(precision=0.5, min_rounds=3, max_rounds=3)


def hand_table():
    """a: 10 ms at 4 units, 20 ms at 8; b: 1 ms without its branch, else 3, 5 or 9 ms at 2, 4 or 6 units."""
    return LatencyTable(
        [
            SiteTable(Site("a", ("wide",), "early"), ((4, 8),), np.array([10.0, 20.0])),
            SiteTable(
                Site("b", ("branch", "inner"), "late"),
                ((0, 1), (2, 4, 6)),
                np.array([[1.0, 1.0, 1.0], [3.0, 5.0, 9.0]]),
            ),
        ]
    )


@pytest.fixture(scope="module")
def resnet():
    """The tiny network, its declaration and a simulated table of it."""
    adapter = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32)
    model = adapter.skeleton()
    groups, sites, inputs = adapter.groups(model), adapter.sites(model), adapter.example_inputs(8)
    policy = ExportPolicy(rounding={"channel": Rounding(8)})
    table = build_table(model, groups, sites, inputs, SimulatedClock(), policy=policy, points=5, rounds=QUICK)
    return model, groups, inputs, policy, table


@pytest.mark.parametrize(
    ("widths", "ms"),
    [
        ({"wide": 4, "branch": 1, "inner": 2}, 13.0),
        ({"wide": 8, "branch": 0, "inner": 0}, 21.0),
        ({"wide": 6, "branch": 1, "inner": 5}, 15.0 + 7.0),
        ({"wide": 5.0, "branch": 0.5, "inner": 3.0}, 12.5 + 2.5),
        ({"wide": 1, "branch": 1, "inner": 99}, 10.0 + 9.0),  # constant outside the grid
    ],
)
def test_interpolation_by_hand(widths, ms):
    assert float(LatencyProxy(hand_table()).predict(widths)) == pytest.approx(ms)


def test_interpolation_is_differentiable():
    widths = {
        name: torch.tensor(value, requires_grad=True)
        for name, value in [("wide", 6.0), ("branch", 0.5), ("inner", 5.0)]
    }
    LatencyProxy(hand_table()).predict(widths).backward()
    slopes = {name: float(width.grad) for name, width in widths.items()}
    assert slopes == pytest.approx({"wide": 2.5, "branch": 6.0, "inner": 1.0})


def test_tables_round_trip_through_json():
    table = hand_table()
    copied = LatencyTable.from_dict(json.loads(json.dumps(table.as_dict())))
    assert copied.as_dict() == table.as_dict()
    assert [entry.site for entry in copied.sites] == [entry.site for entry in table.sites]
    assert [entry.grid for entry in copied.sites] == [entry.grid for entry in table.sites]
    widths = {"wide": 7, "branch": 1, "inner": 3}
    assert float(LatencyProxy(copied).predict(widths)) == float(LatencyProxy(table).predict(widths))


def random_widths(random):
    return {"wide": int(random.integers(4, 9)), "branch": int(random.integers(2)), "inner": int(random.integers(2, 7))}


def test_the_fit_recovers_overhead_and_scales():
    truth = LatencyProxy(hand_table())
    truth.overhead, truth.scales = 4.0, {"early": 0.5, "late": 1.5}
    random, proxy = np.random.default_rng(0), LatencyProxy(hand_table(), pull=1e-6)
    for _ in range(12):
        widths = random_widths(random)
        proxy.add_sample(widths, float(truth.predict(widths)))
    assert proxy.overhead == pytest.approx(4.0, rel=1e-3)
    assert proxy.scales == pytest.approx(truth.scales, rel=1e-3)


def test_the_fit_is_never_negative_and_a_heavy_sample_counts_more():
    widths = {"wide": 8, "branch": 1, "inner": 6}  # 29 ms by the table
    proxy = LatencyProxy(hand_table())
    proxy.add_sample(widths, 10.0, weight=10.0)
    proxy.add_sample(widths, 20.0, weight=1.0)
    assert 9.5 < float(proxy.predict(widths)) < 10.5
    proxy.add_sample({"wide": 4, "branch": 0, "inner": 0}, 100.0)
    assert proxy.overhead >= 0.0 and min(proxy.scales.values()) >= 0.0


def test_one_sample_moves_the_prediction_and_the_pull_decides_between_scales():
    widths = {"wide": 8, "branch": 1, "inner": 6}
    proxy = LatencyProxy(hand_table())
    proxy.add_sample(widths, 2 * 29.0)
    assert float(proxy.predict(widths)) == pytest.approx(58.0, rel=0.02)
    assert all(scale >= 0.9 for scale in proxy.scales.values())


def test_a_fit_round_trips_through_json():
    proxy, copied = LatencyProxy(hand_table()), LatencyProxy(hand_table())
    for seed in range(3):
        proxy.add_sample(random_widths(np.random.default_rng(seed)), 10.0 + seed)
    copied.load_state(json.loads(json.dumps(proxy.state())))
    full = {"wide": 8, "branch": 1, "inner": 6}
    assert float(copied.predict(full)) == float(proxy.predict(full))
    copied.add_sample(full, 31.0)
    proxy.add_sample(full, 31.0)
    assert copied.state() == proxy.state()


def test_fidelity_by_hand():
    # errors 1/2, 1/1 and 1/4; of three pairs two are in order
    found = fidelity([1.0, 2.0, 3.0], [2.0, 1.0, 4.0])
    assert found == pytest.approx({"mape": 1.75 / 3, "kendall_tau": 1 / 3, "samples": 3})
    assert fidelity([1.0], [2.0]) == {"mape": 0.5, "kendall_tau": None, "samples": 1}


def test_the_table_predicts_unseen_sliced_models(resnet):
    model, groups, inputs, policy, table = resnet
    random, proxy, clock = np.random.default_rng(0), LatencyProxy(table), SimulatedClock()
    predicted, measured = [], []
    for index in range(14):
        keep = random_keep(groups, policy, random)
        ms = clock.prepare(materialize(model, groups, keep), inputs)()
        if index < 6:
            proxy.add_sample(widths_of(keep), ms)
        else:
            predicted.append(float(proxy.predict(widths_of(keep))))
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
    table = build_table(model, groups, sites[:2], inputs, clock, policy=policy, points=3, rounds=QUICK)
    assert clock.prepared == 4  # three widths and the removed branch, for two blocks of one shape
    assert table.sites[0].ms.tolist() == table.sites[1].ms.tolist()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_the_proxy_never_falls_when_a_width_grows_however_noisy_the_clock(resnet):
    model, groups, inputs, policy, _ = resnet
    sites = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32).sites(model)
    clock = SimulatedClock(noise=0.5, seed=1)
    table = build_table(model, groups, sites, inputs, clock, policy=policy, points=5, rounds=QUICK)
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
        adapter.example_inputs(1),
        SimulatedClock(noise=0.5),
        policy=ExportPolicy(rounding={"channel": Rounding(16)}),
        points=4,
        rounds=QUICK,
    )
    ms = table.sites[0].ms
    assert ms.shape == (2, 3, 3)
    assert all((np.diff(ms, axis=axis) >= 0).all() for axis in range(3))


def test_random_models_are_allowed_seeded_and_diverse(groups):
    policy = ExportPolicy(rounding={"channel": Rounding(2)})
    keeps = [random_keep(groups, policy, np.random.default_rng(seed)) for seed in range(40)]
    assert keeps[0] == random_keep(groups, policy, np.random.default_rng(0))
    assert all(keep == without_orphans(keep, groups) for keep in keeps)
    widths = {len(keep["first.hidden"]) for keep in keeps}
    assert widths == {0, 2, 4, 6, 8}
    assert {len(keep["second.branch"]) for keep in keeps} == {0, 1}
    assert set(keeps[0]) == set(keep_all(groups))
