import copy
import random
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from hawada.core.gates import SigmoidGate, Student
from hawada.core.structure import Cut, GatePoint, Group, Norm, Removal, keep_all, materialize


def set_gates(student, theta):
    with torch.no_grad():
        for gate in student.gates:
            gate.theta.fill_(theta)


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_gates_at_one_reproduce_the_teacher(toy, groups, inputs):
    expected = toy(inputs)
    student = Student(toy, groups)
    set_gates(student, 50.0)
    assert torch.equal(student(inputs), expected)


def test_open_but_trainable_gates_are_near_the_teacher_and_not_equal(toy, groups, inputs):
    expected = toy(inputs)
    logits = Student(toy, groups)(inputs)
    assert not torch.equal(logits, expected)
    assert float((logits - expected).abs().max().detach()) < 0.1 * float(expected.abs().max().detach())


def test_attach_then_detach_is_bit_identical(toy, groups, inputs):
    expected, state = toy(inputs), copy.deepcopy(toy.state_dict())
    student = Student(toy, groups)
    assert list(toy.state_dict()) == list(state)
    set_gates(student, -1.0)
    student(inputs)
    assert student.detach() is toy
    assert count_hooks(toy) == 0
    assert list(toy.state_dict()) == list(state)
    assert all(torch.equal(toy.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(toy(inputs), expected)


def test_the_context_manager_detaches_even_after_an_error(toy, groups, inputs):
    expected = toy(inputs)
    with pytest.raises(RuntimeError, match="stop"), Student(toy, groups) as student:
        set_gates(student, -50.0)
        raise RuntimeError("stop")
    assert torch.equal(toy(inputs), expected)


def test_foreign_hooks_survive_detach(toy, groups, inputs):
    calls = []
    toy.first.down.register_forward_hook(lambda *_: calls.append(1))
    Student(toy, groups).detach()
    toy(inputs)
    assert calls == [1]


def test_a_deepcopied_student_has_gates_and_hooks_of_its_own(toy, groups, inputs):
    student = Student(toy, groups)
    before = student(inputs)
    clone = copy.deepcopy(student)
    assert torch.equal(clone(inputs), before)
    set_gates(clone, -50.0)
    assert torch.equal(student(inputs), before)
    closed = clone(inputs)
    assert not torch.allclose(closed, before)
    set_gates(student, 50.0)
    assert torch.equal(clone(inputs), closed)


def test_detaching_a_copy_leaves_the_original_gated(toy, groups, inputs):
    student = Student(toy, groups)
    gated = student(inputs)
    clone = copy.deepcopy(student)
    assert count_hooks(clone.detach()) == 0
    assert torch.equal(student(inputs), gated)
    assert torch.equal(clone.model(inputs), student.detach()(inputs))


def test_gradients_of_a_copy_reach_its_own_gates_only(toy, groups, inputs):
    student = Student(toy, groups)
    clone = copy.deepcopy(student)
    clone(inputs).square().mean().backward()
    assert all(gate.theta.grad is not None for gate in clone.gates)
    assert all(gate.theta.grad is None for gate in student.gates)


def test_bf16_autocast(toy, groups, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        expected = toy(inputs)
        student = Student(toy, groups)
        logits = student(inputs)
    assert logits.dtype == expected.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(
        bool(torch.isfinite(gate.theta.grad).all()) and gate.theta.dtype == torch.float32 for gate in student.gates
    )
    set_gates(student, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(student(inputs), expected)


def test_effective_gates_multiply_by_the_parent_and_own_gates_do_not(toy, groups):
    student = Student(toy, groups)
    with torch.no_grad():
        student.gate_of("first.branch").theta.fill_(0.0)
    effective, own = student.effective_gates(), student.own_gates()
    assert torch.allclose(effective["first.hidden"], 0.5 * own["first.hidden"])
    assert torch.equal(effective["second.branch"], own["second.branch"])
    assert float(student.soft_widths()["first.hidden"].detach()) == pytest.approx(
        float(own["first.hidden"].sum().detach())
    )


def test_a_parent_that_is_left_out_counts_as_kept(toy, groups, inputs):
    student = Student(toy, [groups[1]])
    assert torch.equal(student.effective_gates()["first.hidden"], student.own_gates()["first.hidden"])


def test_hard_gates_are_exactly_zero_or_one_and_end_with_the_block(toy, groups):
    student = Student(toy, groups)
    with student.hard_gated(keep_all(groups) | {"first.hidden": (0, 7), "second.branch": ()}):
        assert student.own_gates()["first.hidden"].tolist() == [1.0, 0, 0, 0, 0, 0, 0, 1.0]
        assert student.own_gates()["second.hidden"].tolist() == [0.0] * 8
    assert float(student.own_gates()["second.hidden"].detach().min()) > 0.9


def test_a_gate_of_zero_silences_its_unit(toy, groups, inputs):
    with Student(toy, groups).hard_gated(keep_all(groups) | {"first.branch": (), "second.branch": ()}) as student:
        assert torch.allclose(student(inputs), toy.head(toy.stem(inputs)))


def test_hooks_gate_the_first_of_several_outputs():
    model = nn.Sequential()
    model.add_module("rnn", nn.GRU(3, 4, batch_first=True))
    student = Student(model, [Group("hidden", "channel", 4, (GatePoint("rnn", dim=-1),))])
    x = torch.randn(2, 5, 3)
    full, state = model.rnn.forward(x)
    with student.hard_gated({"hidden": (1,)}):
        output, gated_state = student(x)
    assert torch.equal(output, full * torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(gated_state, state)


def failing_factory(units):
    if units > 1:
        raise RuntimeError("no such gate")
    return SigmoidGate(units)


@pytest.mark.parametrize(
    ("change", "factory", "error", "message"),
    [
        (
            {"gated_at": (GatePoint("first.down", side="inside"),)},
            SigmoidGate,
            ValueError,
            "second.hidden: side 'inside' of first.down is not input or output; choose one",
        ),
        ({"gated_at": (GatePoint("third"),)}, SigmoidGate, ValueError, "the model has no module 'third'"),
        ({}, failing_factory, RuntimeError, "no such gate"),
    ],
)
def test_a_half_attached_model_is_impossible(toy, groups, change, factory, error, message):
    groups[-1] = replace(groups[-1], **change)
    with pytest.raises(error, match=message):
        Student(toy, groups, factory)
    assert count_hooks(toy) == 0


EPS = 1e-5
NORMS = {"layer": lambda width: nn.LayerNorm(width, eps=EPS), "rms": lambda width: nn.RMSNorm(width, eps=EPS)}


@pytest.fixture(params=NORMS)
def normed(request):
    """A producer and the norm that consumes its outputs, both random, with the gated stream between them."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(producer=nn.Linear(6, 12), norm=NORMS[request.param](12)))
    for parameter in model.norm.parameters():
        nn.init.normal_(parameter, 0.5)
    norm = Norm("norm", request.param, EPS)
    return model, Group("stream", "stream", 12, (GatePoint("producer", dim=-1),), norms=(norm,))


@pytest.mark.parametrize("kept", [(0,), (3, 4), (0, 2, 5, 7, 11), tuple(range(1, 12))])
def test_a_norm_over_a_hard_gated_stream_is_the_norm_of_what_stays(normed, inputs, kept):
    model, stream = normed
    produced, norm = model.producer(inputs)[:, list(kept)], copy.deepcopy(model.norm)
    for name, parameter in model.norm.named_parameters():
        setattr(norm, name, nn.Parameter(parameter[list(kept)]))
    norm.normalized_shape = (len(kept),)
    expected = norm(produced)
    with torch.no_grad(), Student(model, [stream]).hard_gated({"stream": kept}) as student:
        normalized = student(inputs)
    gone = sorted(set(range(12)) - set(kept))
    assert float((normalized[:, list(kept)] - expected).abs().max().detach()) <= 1e-6 * float(
        expected.abs().max().detach()
    )
    assert torch.equal(normalized[:, gone], torch.zeros(len(inputs), len(gone)))


@pytest.mark.parametrize("value", [1.0, 0.25])
def test_a_norm_over_equal_gates_is_the_norm_times_the_gate(normed, inputs, value):
    """At 1 it is the norm itself."""
    model, stream = normed
    expected = value * model(inputs)
    student = Student(model, [stream])
    student.gate_of("stream").hard = torch.full((12,), value)
    assert float((student(inputs) - expected).abs().max().detach()) <= 1e-6 * float(expected.abs().max().detach())
    assert torch.equal(student.detach()(inputs), expected / value)


def test_a_norm_over_a_gated_stream_keeps_its_dtype_and_passes_gradients(normed, inputs):
    model, stream = normed
    student = Student(model.bfloat16(), [stream])
    output = student(inputs.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    gradient = student.gate_of("stream").theta.grad
    assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().min()) > 0


def test_a_norm_of_an_unknown_kind_is_refused(normed):
    model, stream = normed
    stream = replace(stream, norms=(Norm("norm", "batch", EPS),))
    with pytest.raises(ValueError, match="stream: norm kind 'batch' of norm is not layer, rms or group; choose one"):
        Student(model, [stream])
    assert count_hooks(model) == 0


class Attention(nn.Module):
    """Two KV heads of two elements, each with two query heads, behind a norm and around a residual."""

    def __init__(self, width):
        super().__init__()
        self.kv_heads, self.per_kv = 2, 2
        self.norm = NORMS["rms"](width)
        self.query, self.key, self.value = nn.Linear(width, 8), nn.Linear(width, 4), nn.Linear(width, 4)
        self.out = nn.Linear(8, width)

    def forward(self, x):
        y = self.norm(x)
        heads = [(self.query(y), self.per_kv), (self.key(y), 1), (self.value(y), 1)]
        # (N, T, K * Q * 2) -> (N, K, Q, T, 2)
        q, k, v = (z.unflatten(-1, (self.kv_heads, each, 2)).permute(0, 2, 3, 1, 4) for z, each in heads)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.out(mixed.permute(0, 3, 1, 2, 4).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = NORMS["layer"](width), nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stream(nn.Module):
    """Two residual layers over a hidden stream of ten units."""

    def __init__(self, width=10):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.layers = nn.Sequential(
            *(nn.Sequential(OrderedDict(attention=Attention(width), mlp=Mlp(width))) for _ in range(2))
        )
        self.norm, self.head = NORMS["layer"](width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.embed(x))))


def linear(path, dim, **units):
    """Cuts of a linear layer: its outputs with the bias, or its inputs."""
    follows = "in_features" if dim else "out_features"
    weight = Cut(f"{path}.weight", dim, **units, follows=follows)
    return (weight,) if dim else (weight, Cut(f"{path}.bias", 0, **units))


def stream_groups():
    groups, points, cuts, norms = [], [GatePoint("embed", dim=-1)], [*linear("embed", 0)], []
    for layer in ("layers.0", "layers.1"):
        attention, mlp, two = f"{layer}.attention", f"{layer}.mlp", {"per_unit": 2}
        producers = GatePoint(f"{attention}.out", dim=-1), GatePoint(f"{mlp}.down", dim=-1)
        groups += [
            Group(layer, "layer", 1, producers, removes=(Removal(layer),)),
            Group(attention, "attention", 1, producers[:1], removes=(Removal(attention),), parent=layer),
            Group(mlp, "mlp", 1, producers[1:], removes=(Removal(mlp),), parent=layer),
            Group(
                f"{layer}.kv",
                "kv",
                2,
                (GatePoint(f"{attention}.value", dim=-1, per_unit=2),),
                (*linear(f"{attention}.key", 0, **two), *linear(f"{attention}.value", 0, **two)),
                parent=attention,
                attributes=(f"{attention}.kv_heads",),
            ),
            Group(
                f"{layer}.query",
                "query",
                4,
                (GatePoint(f"{attention}.out", side="input", dim=-1, per_unit=2),),
                (*linear(f"{attention}.query", 0, **two), *linear(f"{attention}.out", 1, **two)),
                parent=f"{layer}.kv",
                equal_per_parent=2,
                attributes=(f"{attention}.per_kv",),
            ),
            Group(
                f"{layer}.hidden",
                "ffn",
                7,
                (GatePoint(f"{mlp}.down", side="input", dim=-1),),
                (*linear(f"{mlp}.up", 0), *linear(f"{mlp}.down", 1)),
                parent=mlp,
            ),
        ]
        points += producers
        cuts += [*linear(f"{attention}.out", 0), *linear(f"{mlp}.down", 0), *linear(f"{mlp}.up", 1)]
        cuts += [cut for name in ("query", "key", "value") for cut in linear(f"{attention}.{name}", 1)]
        norms += [Norm(f"{attention}.norm", "rms", EPS), Norm(f"{mlp}.norm", "layer", EPS)]
    norms.append(Norm("norm", "layer", EPS))
    cuts += [*linear("head", 1), *(Cut(f"{norm.module}.weight", 0) for norm in norms)]
    cuts += [Cut(f"{norm.module}.bias", 0) for norm in norms if norm.kind == "layer"]
    shapes = tuple(f"{norm.module}.normalized_shape" for norm in norms)
    stream = Group("stream", "stream", 10, tuple(points), tuple(cuts), norms=tuple(norms), attributes=shapes)
    return [*groups, stream]


@pytest.fixture
def stream_model():
    """A model with random norms and biases, so that a gate on the wrong side of them shows."""
    torch.manual_seed(0)
    model = Stream().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            nn.init.normal_(parameter, 0.5)
    return model


def any_heads(groups, draw):
    """Random units, with as many query heads for one KV head as for another, and a third of the branches removed."""
    keep = {}
    for group in groups:
        if group.removes:
            keep[group.name] = tuple(range(draw.random() < 0.7))
        elif group.equal_per_parent:
            width, heads = draw.randint(1, group.equal_per_parent), keep[group.parent]
            blocks = [range(head * group.equal_per_parent, (head + 1) * group.equal_per_parent) for head in heads]
            keep[group.name] = tuple(unit for block in blocks for unit in draw.sample(block, width))
        else:
            keep[group.name] = tuple(draw.sample(range(group.units), draw.randint(2, group.units)))
            if group.kind == "kv":
                keep[group.name] = keep[group.name][: draw.randint(1, 2)]
    return keep


def test_a_gated_stream_with_shared_heads_equals_the_sliced_one(stream_model):
    groups, x = stream_groups(), torch.randn(2, 5, 6)
    student, draw, seen = Student(stream_model, groups), random.Random(0), set()
    for _ in range(40):
        keep = any_heads(groups, draw)
        with torch.no_grad(), student.hard_gated(keep):
            gated = student(x)
            sliced = materialize(student.model, groups, keep)
            assert float((gated - sliced(x)).abs().max().detach()) <= 1e-5 * float(gated.abs().max().detach())
        seen |= {(m.kv_heads, m.per_kv) for m in sliced.modules() if isinstance(m, Attention)}
        assert count_hooks(sliced) == 0
    assert seen == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_a_gated_stream_with_all_gates_at_one_reproduces_the_teacher(stream_model):
    x = torch.randn(2, 5, 6)
    expected = stream_model(x)
    student = Student(stream_model, stream_groups())
    set_gates(student, 50.0)
    assert torch.allclose(student(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(student.detach()(x), expected)


def test_effective_gates_of_many_units_multiply_by_the_unit_that_holds_them(stream_model):
    student = Student(stream_model, stream_groups())
    with torch.no_grad():
        student.gate_of("layers.0.kv").theta.copy_(torch.tensor([0.0, 4.0]))
        student.gate_of("layers.0.attention").theta.fill_(1.0)
        student.gate_of("layers.0").theta.fill_(2.0)
    effective, own = student.effective_gates(), student.own_gates()
    above = own["layers.0"] * own["layers.0.attention"]
    assert torch.allclose(effective["layers.0.kv"], own["layers.0.kv"] * above)
    heads = torch.tensor([0.5, 0.5, 1.0, 1.0]) * torch.tensor([1.0, 1.0, *own["layers.0.kv"][1:].tolist() * 2])
    assert torch.allclose(effective["layers.0.query"], own["layers.0.query"] * heads * above)
    assert torch.equal(effective["stream"], own["stream"])


def test_the_soft_width_of_shared_units_is_the_mean_of_each_parent(stream_model):
    student = Student(stream_model, stream_groups())
    with torch.no_grad():
        student.gate_of("layers.0.query").theta.copy_(torch.tensor([50.0, -50.0, 50.0, 50.0]))
    soft = student.soft_widths()
    assert float(soft["layers.0.query"].detach()) == pytest.approx(1.5)
    assert float(soft["stream"].detach()) == pytest.approx(float(student.own_gates()["stream"].sum().detach()))


def test_hard_gates_close_the_query_heads_of_a_removed_kv_head(stream_model):
    groups = stream_groups()
    with Student(stream_model, groups).hard_gated(keep_all(groups) | {"layers.0.kv": (1,)}) as student:
        assert student.own_gates()["layers.0.query"].tolist() == [0.0, 0.0, 1.0, 1.0]
        assert student.own_gates()["layers.1.query"].tolist() == [1.0] * 4
