"""One fresh process that has transformers and cannot import hawada loads exported folders."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hawada.adapters import Shape, save_model
from hawada.core.evaluate import compare_outputs
from hawada.core.structure import full_widths, keep_first

LAYOUTS = ["uniform", "heterogeneous"]
CASES = [
    *itertools.product(("mha", "gqa4", "mistral", "qwen2", "qwen3", "smollm3", "vit"), LAYOUTS),
    ("mha divisible", "uniform"),
    ("gqa8", "heterogeneous"),  # a llama with biases has no uniform layout
    ("gqa4 branches", "heterogeneous"),  # the same widths everywhere, but single attentions and MLPs gone
    ("vit branches", "heterogeneous"),
]
WIDTHS = {"kv_head": 1, "query_head": 3, "head": 3, "ffn": 18, "stream": 35}

# Each job lists the adapter's own program and its arguments, the classes that load its family, and the file that the
# refused loads are written to.
PROCESS = """
import json, pathlib, sys
sys.modules["hawada"] = None
import transformers
for program, arguments, auto, stock, refusals in json.load(open(sys.argv[1])):
    folder, refused = arguments[0], {}
    ways = {
        "unset": (getattr(transformers, auto), {}),
        "false": (getattr(transformers, auto), {"trust_remote_code": False}),
        "class": (getattr(transformers, stock), {}),
    }
    for name, (loader, options) in ways.items() if "slim" in json.load(open(folder + "/config.json")) else ():
        try:
            loader.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
    pathlib.Path(refusals).write_text(json.dumps(refused))
    sys.argv = ["-c", *arguments]
    exec(program, {})
assert sys.modules["hawada"] is None
"""


def slim_of(case, layout, build_model):
    """Return an adapter, its teacher, groups and kept indices: last units, fewer layers, mixed widths if allowed."""
    family, _, option = case.partition(" ")
    adapter, teacher = build_model(family, branches=layout == "heterogeneous", stream=option != "branches")
    groups = adapter.groups(teacher)
    named = {kind: [group.name for group in groups if group.kind == kind] for kind in {group.kind for group in groups}}
    widths = full_widths(groups)
    if option == "branches":
        widths |= {named["attention"][0]: 0, named["mlp"][1]: 0}
    else:
        widths |= {group.name: WIDTHS[group.kind] for group in groups if group.kind in WIDTHS}
        widths[named["layer"][0]] = 0
        if family == "mha":  # 5 heads divide the stream of 35, 3 do not
            widths |= dict.fromkeys(named["kv_head"], 5 if option == "divisible" else 3)
        if layout == "heterogeneous":
            widths |= {named["attention"][2]: 0, named["ffn"][1]: 7}
    last_first = {group.name: range(group.units)[::-1] for group in groups}
    return adapter, teacher, groups, keep_first(groups, widths, last_first)


@pytest.fixture(scope="module")
def exported(build_model, tmp_path_factory):
    """By case and layout, the folder, the outputs here and in the process, and the loads that the process refused."""
    root = tmp_path_factory.mktemp("stock")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    jobs, found = [], {}
    for index, (case, layout) in enumerate(CASES):
        adapter, teacher, groups, keep = slim_of(case, layout, build_model)
        slim, inputs = adapter.slim(teacher, groups, keep), adapter.example_inputs(Shape(2, "forward", 12, 32))
        folder, given, output, refusals = (root / f"{index}{end}" for end in ("", ".in", ".out", ".json"))
        adapter.check_layout(layout, groups)
        spec = {"_target_": f"{type(adapter).__module__}.{type(adapter).__name__}", "config": adapter.config}
        save_model(folder, slim, adapter=adapter, adapter_spec=spec, teacher=teacher, groups=groups, keep=keep)
        save_file({"000": inputs[0]}, given)
        with torch.no_grad():
            expected = {"logits": slim(*inputs).logits, "tokens": adapter.greedy_tokens(slim, inputs, 32)}
        arguments = [str(path) for path in (folder, given, output)] + ["1"]
        jobs.append([adapter.stock_reload, arguments, adapter.auto, type(teacher).__name__, str(refusals)])
        found[case, layout] = [folder, expected, output, refusals]
    torch.set_num_threads(threads)
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(root / "jobs.json")],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        key: (folder, expected, load_file(output), json.loads(refusals.read_text()))
        for key, (folder, expected, output, refusals) in found.items()
    }


@pytest.mark.parametrize(("case", "layout"), CASES)
def test_a_process_without_hawada_computes_and_generates_the_same(case, layout, exported):
    _, here, there, _ = exported[case, layout]
    found = compare_outputs(here["logits"], there["logits"])
    assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
    if here["tokens"] is None:
        assert set(there) == {"logits"}
    else:
        assert there["tokens"].shape == (2, 32) and torch.equal(there["tokens"], here["tokens"])


MODEL_TYPES = {"gqa4": "mistral", "mha": "mistral", "mha divisible": "llama"}


@pytest.mark.parametrize("case", [case for case, layout in CASES if layout == "uniform"])
def test_a_uniform_folder_is_of_the_familys_own_type_and_needs_no_foreign_code(case, exported):
    folder, _, _, _ = exported[case, "uniform"]
    record = json.loads((folder / "config.json").read_text())
    assert record["model_type"] == MODEL_TYPES.get(case, case)
    assert "auto_map" not in record and "slim" not in record and not list(folder.glob("*.py"))
    assert record["head_dim"] == (8 if case == "qwen3" else 6) and record["hidden_size"] == 35
    assert record["num_hidden_layers"] == 2 and record["intermediate_size"] == 18
    if case == "gqa4":
        assert record["sliding_window"] is None and record["tie_word_embeddings"]
        assert record["rope_parameters"]["rope_type"] == "llama3"


@pytest.mark.parametrize("case", [case for case, layout in CASES if layout == "heterogeneous"])
def test_a_heterogeneous_folder_is_refused_unless_its_code_is_trusted(case, exported):
    """A loader that ignored config.slim would build another model."""
    folder, _, _, refused = exported[case, "heterogeneous"]
    record = json.loads((folder / "config.json").read_text())
    assert record["model_type"].startswith("slim_") and set(record["auto_map"]) >= {"AutoConfig"}
    assert "hawada" not in (folder / "modeling_slim.py").read_text().lower()
    assert all("trust_remote_code=True" in refused[name] for name in ("unset", "false"))
    assert "ignore_mismatched_sizes" in refused["class"]
