from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hawada.core.latency import DeviceClock
from hawada.core.latency.runtimes import prepare_call
from hawada.core.latency.runtimes.cudagraph import WARM_UP_CALLS
from hawada.core.latency.runtimes.prepare import RUNTIMES


class Counted(nn.Module):
    """Counts its calls and remembers what it was called with, and a token that every call replaces."""

    def __init__(self):
        super().__init__()
        self.calls, self.given, self.token = 0, None, torch.zeros(1)

    def forward(self, x):
        self.calls, self.given = self.calls + 1, x
        assert torch.is_inference_mode_enabled()
        self.token = torch.ones(1)
        return x


def test_an_eager_call_runs_once_on_inputs_of_its_own():
    model, x = Counted(), torch.randn(2, 3)
    call = prepare_call(model, (x,), "eager")
    assert model.calls == 0
    assert torch.equal(call(), x) and model.calls == 1
    assert model.given.data_ptr() != x.data_ptr()
    first = model.given
    call()
    assert model.given.data_ptr() == first.data_ptr()


def test_a_runtime_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"runtime: 'fast' is not one of eager, cudagraph, compile; set runtime to"):
        prepare_call(nn.Identity(), (torch.zeros(1),), "fast")


def test_cuda_graphs_are_refused_without_cuda():
    with pytest.raises(ValueError, match=r"runtime: CUDA graphs need an NVIDIA GPU .* on cpu; use runtime=eager"):
        DeviceClock(runtime="cudagraph").prepare(nn.Identity(), (torch.zeros(1),))


@pytest.fixture
def compiled(monkeypatch):
    """What was handed to torch.compile; dynamo really traces, but nothing is generated."""
    seen, real = [], torch.compile

    def compile_(function, **options):
        seen.append((function, options))
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    yield seen
    torch._dynamo.reset()


def test_more_widths_than_dynamo_caches_are_all_compiled(compiled):
    """Beyond the cache's limit torch would silently run eagerly, or as one graph refuse."""
    x = torch.randn(2, 4)
    models = [nn.Sequential(nn.Linear(4, width), nn.ReLU()).eval() for width in range(1, 12)]
    assert len(models) > torch._dynamo.config.recompile_limit
    calls = [prepare_call(model, (x,), "compile") for model in models]
    for model, call in zip(models, calls, strict=True):
        assert torch.allclose(call(), model(x), atol=1e-6)
    assert all(options == {"dynamic": False, "fullgraph": True} for _, options in compiled)


def test_a_model_that_cannot_be_compiled_whole_is_refused(compiled):
    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(ValueError, match=r"runtime: Breaks cannot be compiled as one graph \(.*\); use runtime=eager"):
        prepare_call(Breaks(), (torch.zeros(1),), "compile")


class FakeGraph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


class OnGpu:
    """Stands in for a CUDA tensor."""

    device = torch.device("cuda", 0)

    def detach(self):
        return self

    def clone(self):
        return OnGpu()


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA that captures nothing but tells what was asked of it."""
    state = SimpleNamespace(graphs=[], capturing=False, error=None)

    def new_graph():
        state.graphs.append(FakeGraph())
        return state.graphs[-1]

    @contextmanager
    def capture(graph):
        state.capturing = True
        yield
        state.capturing = False
        if state.error is not None:
            raise state.error

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "CUDAGraph": new_graph,
        "graph": capture,
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: nullcontext(),
        "device": lambda d: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_a_graph_is_captured_once_and_then_only_replayed(cuda):
    model = Counted()
    call = prepare_call(model, (OnGpu(),), "cudagraph")
    assert model.calls == WARM_UP_CALLS + 1 and cuda.graphs[0].replays == 0
    for _ in range(5):
        call()
    assert model.calls == WARM_UP_CALLS + 1 and cuda.graphs[0].replays == 5


def test_what_a_graph_reads_stays_alive_though_the_model_replaces_it(cuda):
    model = Counted()
    before_capture = []
    model.register_forward_pre_hook(lambda *_: before_capture.append(model.token) if cuda.capturing else None)
    call = prepare_call(model, (OnGpu(),), "cudagraph")
    assert model.token is not before_capture[0]
    held = call.__closure__
    kept = next(cell.cell_contents for cell in held if isinstance(cell.cell_contents, tuple))
    assert any(tensor is before_capture[0] for tensor in kept[2])


def test_a_model_that_cannot_be_captured_is_one_clear_error(cuda):
    cuda.error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
    with pytest.raises(
        ValueError, match=r"runtime: Counted cannot be captured as a CUDA graph \(CUDA error: .*capturi"
    ):
        prepare_call(Counted(), (OnGpu(),), "cudagraph")


def test_too_little_memory_is_not_blamed_on_the_model(cuda):
    cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        prepare_call(Counted(), (OnGpu(),), "cudagraph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_computes_the_same_on_cuda(runtime):
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).cuda().eval(), torch.randn(5, 8).cuda()
    with torch.no_grad():
        assert torch.allclose(prepare_call(model, (x,), runtime)(), model(x), atol=1e-5)
