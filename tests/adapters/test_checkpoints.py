"""State dicts as people have them: torch's own files, nested, with prefixes, tied; and what is no state dict."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hawada.adapters.checkpoints import read_checkpoint, without_prefixes
from hawada.adapters.weights import WeightsSource


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def source(path):
    return WeightsSource("mynets.Net", None, str(path), named=False)


def filled(path, model=Net):
    loader = source(path)
    loader.check(model)
    return loader.fill(model)


def assert_same(model, other):
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in model.state_dict().items())


WRAPPERS = {
    "plain": lambda state: state,
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "module.module.": lambda state: {f"module.module.{name}": tensor for name, tensor in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "module._orig_mod.": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "an inner _orig_mod.": lambda state: {n.replace("backbone.", "backbone._orig_mod."): t for n, t in state.items()},
    "averaged": lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{n}": t for n, t in state.items()},
    "a trainer's own": lambda state: {"criterion.weight": torch.ones(2)} | {f"model.{n}": t for n, t in state.items()},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "ema": {name: tensor * 0 for name, tensor in state.items()}},
    "ema alone": lambda state: {"ema": {"module": None} | state, "step": torch.tensor(7)},
    "twice": lambda state: {"model": {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}},
    "half precision": lambda state: {
        n: t.half().float().half() if t.is_floating_point() else t for n, t in state.items()
    },
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_torchs_own_files_fill_the_model(tmp_path, wrapped, suffix):
    model = Net()
    if wrapped == "half precision":
        model = model.half().float()
    torch.save(WRAPPERS[wrapped](model.state_dict()), tmp_path / f"net{suffix}")
    assert_same(filled(tmp_path / f"net{suffix}"), model)


def test_prefixes_are_taken_off_safetensors_too(tmp_path):
    model = Net()
    save_file(WRAPPERS["module."](model.state_dict()), tmp_path / "net.safetensors")
    assert_same(filled(tmp_path / "net.safetensors"), model)


def test_files_of_the_old_format_are_read(tmp_path):
    model = Net()
    torch.save(model.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    assert_same(filled(tmp_path / "net.pth"), model)


def test_a_tied_tensor_may_have_been_saved_once(tmp_path):
    model = Tied()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "second.weight"}
    save_file(state, tmp_path / "net.safetensors")
    assert_same(filled(tmp_path / "net.safetensors", Tied), model)


def test_a_model_whose_own_names_begin_like_a_wrappers_is_left_alone():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    state = Module().state_dict()
    assert without_prefixes(state, state.keys()).keys() == state.keys()


class Whole(Net):
    """Pickled by class."""


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (lambda: Whole(), r"holds more than tensors.* save model\.state_dict\(\) with torch\.save"),
        (lambda: [1, 2], r"holds no state dict but a list; save model\.state_dict\(\)"),
        (lambda: {"epoch": 3}, r"holds no state dict but a dict with the keys epoch; save"),
    ],
)
def test_what_holds_no_state_dict_is_refused(tmp_path, held, message):
    torch.save(held(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=rf"model\.adapter\.path: .*net\.pth {message}"):
        read_checkpoint(tmp_path / "net.pth")


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes((tmp_path / "net.pth").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"net\.pth is not a file that torch\.save wrote"):
        read_checkpoint(tmp_path / "net.pth")


def test_a_scripted_model_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt is a TorchScript program; save state_dict\(\) of the module"):
        read_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path, change):
    state = copy.copy(Net().state_dict())
    if change == "missing":
        del state["fc.weight"]
    else:
        state["fc.weight" if change == "shape" else "fc.scale"] = torch.ones(2, 7)
    torch.save(state, tmp_path / "net.pth")
    expected = {"missing": "fc.weight", "extra": "fc.scale", "shape": "fc.weight"}[change]
    with pytest.raises(ValueError, match=rf"net\.pth does not fit mynets\.Net: .*{expected}"):
        source(tmp_path / "net.pth").check(Net)


@pytest.mark.parametrize("prefixes", [("model.", "ema."), ("student.", "momentum_teacher.")])
def test_the_weights_of_several_models_are_refused(tmp_path, prefixes):
    state = {f"{prefix}{name}": tensor for prefix in prefixes for name, tensor in Net().state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"holds the weights of several models, below .*; save those of one alone"):
        source(tmp_path / "net.pth").check(Net)


class Owner(nn.Module):
    """Has a child of the name that DataParallel adds."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_a_child_called_module_keeps_its_name(tmp_path):
    model = Owner()
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "net.pth")
    assert_same(filled(tmp_path / "net.pth", Owner), model)


def test_further_classifiers_that_only_training_needs_are_left_out(tmp_path):
    model = Net()
    torch.save({**model.state_dict(), "aux_classifier.0.weight": torch.ones(2)}, tmp_path / "net.pth")
    assert_same(filled(tmp_path / "net.pth"), model)
