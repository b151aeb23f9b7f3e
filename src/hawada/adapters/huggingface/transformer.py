"""What the families of the transformers library share: groups of a layer, loading, slim models, stock formats."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hawada.adapters.base import Adapter
from hawada.adapters.huggingface import hub, pretrained
from hawada.adapters.huggingface.slim_model import (
    build_empty,
    build_filled,
    build_module,
    read_config,
    save_folder,
    slim_classes,
    slim_name,
    slim_shapes,
    slim_state,
    stock_class,
)
from hawada.core.distill import Alignment, Outputs
from hawada.core.gates import Student
from hawada.core.structure import Cut, Edits, GatePoint, Group, Keep, Norm, Removal, Site, plan_edits

# The program that `Adapter.stock_reload` describes; the property below fills in `auto` and `generates`.
STOCK_RELOAD = """
import json, pathlib, sys
sys.modules["hawada"] = None  # importing it fails from here on
import torch, transformers
from safetensors.torch import load_file, save_file
folder, inputs, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
config = json.loads((pathlib.Path(folder) / "config.json").read_text())
model = transformers.{auto}.from_pretrained(
    folder, trust_remote_code="slim" in config, local_files_only=True, use_safetensors=True, dtype=torch.float32
).eval()
given = load_file(inputs)["000"]
with torch.no_grad():
    outputs = {{"logits": model(given).logits.contiguous()}}
    if {generates}:
        tokens = model.generate(given, max_new_tokens=32, min_new_tokens=32, do_sample=False, num_beams=1,
                                attention_mask=torch.ones_like(given), pad_token_id=0)
        outputs["tokens"] = tokens[:, given.shape[1]:].contiguous()
save_file(outputs, output)
"""


class TransformerAdapter(Adapter):
    """Base of the families: residual layers of one attention and one MLP, each behind a norm.

    Each family is a subclass whose attributes name these modules and the tensors that show their widths; the
    configuration of a slim model is derived from the shapes of the sliced tensors.

    Args:
        path: repository on the Hub, or a local folder with config.json and safetensors.
        config: instead of a path, the configuration of an untrained model, with `model_type`.
        branches: whether single attentions and MLPs may be removed (heterogeneous layout only).
        stream: whether the hidden stream may become narrower.

    Attributes:
        auto: name of the transformers class that loads the family.
        model_types: the values of `model_type` in config.json that belong to the family.
        layers: path of the list of layers.
        branches: by kind of branch, `attention` or `mlp` (its group has the same kind): the name of its module in a
            layer, that of the norm in front of it, and how many values the module returns.
        writers: by kind of branch, the projection whose output is added to the hidden stream.
        into_ffn: names of the projections from the stream to the FFN neurons.
        layer_widths: by config attribute that differs between slim layers: the tensor of a layer that shows it, the
            tensor's axis, and whether the attribute counts heads instead of elements.
        embedding: path of the module whose output is the stream before the first layer.
        stream_tensors: for each tensor outside the layers that has the stream's units on an axis, that axis; the first
            tensor shows the stream's width.
        head: path of the output layer if it is large enough to be timed, else None.
        last_norm: path of the norm behind the last layer.
        norm: kind of the norms (see `Norm`) and the config attribute of their eps.
    """

    auto: str
    model_types: tuple[str, ...]
    layers: str
    branches: ClassVar[dict[str, tuple[str, str, int]]]
    writers: ClassVar[dict[str, str]]
    into_ffn: tuple[str, ...]
    layer_widths: ClassVar[dict[str, tuple[str, int, bool]]]
    embedding: str
    stream_tensors: ClassVar[dict[str, int]]
    head: str | None = None
    last_norm: str
    norm: tuple[str, str]
    layouts = ("uniform", "heterogeneous")

    def __init__(
        self,
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        branches: bool = False,
        stream: bool = False,
    ) -> None:
        self.path = path
        self.config = None if config is None else dict(config)
        self.with_branches, self.with_stream = branches, stream

    # Groups

    @abstractmethod
    def head_groups(self, model: PreTrainedModel, path: str, parent: str) -> list[Group]:
        """Return the groups of heads of the attention at `path`, inside the group `parent`."""

    def groups(self, model: nn.Module) -> list[Group]:
        groups: list[Group] = []
        for path in self._layer_paths(model):
            kinds = self._branches_of(model, path)
            writers = {kind: f"{path}.{self.branches[kind][0]}.{self.writers[kind]}" for kind in kinds}
            points = tuple(GatePoint(writer, dim=-1) for writer in writers.values())
            groups.append(Group(path, "layer", 1, points, removes=(Removal(path),)))
            parents = dict.fromkeys(kinds, path)
            if self.with_branches and len(kinds) > 1:
                groups += [self._branch_group(path, kind, writers[kind]) for kind in kinds]
                parents = {kind: f"{path}.{kind}" for kind in kinds}
            if "attention" in kinds:
                attention = f"{path}.{self.branches['attention'][0]}"
                groups += self.head_groups(model, attention, parents["attention"])  # type: ignore[arg-type]  # a model of transformers
            if "mlp" in kinds:
                groups.append(self._ffn_group(model, path, parents["mlp"]))
        return [*groups, self._stream_group(model)] if self.with_stream else groups

    def sites(self, model: nn.Module) -> list[Site]:
        groups = self.groups(model)
        sites = []
        for path in self._layer_paths(model):
            for kind in self._branches_of(model, path):
                module = f"{path}.{self.branches[kind][0]}"
                touching = [g.name for g in groups if any(cut.tensor.startswith(f"{module}.") for cut in g.cuts)]
                outer = [name for name in (path, f"{path}.{kind}") if any(g.name == name and g.removes for g in groups)]
                reads = "stream" if "stream" in touching else None
                sites.append(Site(module, (*outer, *touching), self.branches[kind][0], reads))
        if self.with_stream and self.head is not None:
            sites.append(Site(self.head, ("stream",), "head", "stream"))
        return sites

    def _layer_paths(self, model: nn.Module) -> list[str]:
        return [f"{self.layers}.{index}" for index in range(len(model.get_submodule(self.layers)))]  # type: ignore[arg-type]  # a list

    def _branches_of(self, model: nn.Module, path: str) -> list[str]:
        """The kinds of the branches that a layer has; a layer of a slim model may have lost one."""
        layer = model.get_submodule(path)
        return [kind for kind, (module, _, _) in self.branches.items() if list(getattr(layer, module).parameters())]

    def _branch_group(self, path: str, kind: str, writer: str) -> Group:
        """The group of an attention or MLP, which is removed together with the norm in front of it."""
        module, norm, _ = self.branches[kind]
        removes = (Removal(f"{path}.{module}"), Removal(f"{path}.{norm}"))
        return Group(f"{path}.{kind}", kind, 1, (GatePoint(writer, dim=-1),), removes=removes, parent=path)

    def _ffn_group(self, model: nn.Module, path: str, parent: str) -> Group:
        """The group of FFN neurons: rows of the projections into them, and columns of the one back to the stream."""
        mlp = f"{path}.{self.branches['mlp'][0]}"
        out = f"{mlp}.{self.writers['mlp']}"
        rows = [cut for name in self.into_ffn for cut in cut_linear(model, f"{mlp}.{name}", 0)]
        units = linear(model, out).in_features
        points = (GatePoint(out, side="input", dim=-1),)
        return Group(f"{path}.ffn", "ffn", units, points, (*rows, *cut_linear(model, out, 1)), parent=parent)

    def _stream_group(self, model: nn.Module) -> Group:
        """The group of the hidden stream: the embedding and each branch write it, other projections and norms read it.

        It is gated where it is written; it is cut where it is written and where it is read.
        """
        points, norms, cuts = [GatePoint(self.embedding, dim=-1)], [self.last_norm], []
        for path in self._layer_paths(model):
            for kind in self._branches_of(model, path):
                module, norm, _ = self.branches[kind]
                norms.append(f"{path}.{norm}")
                for name, child in model.get_submodule(f"{path}.{module}").named_children():
                    if isinstance(child, nn.Linear):
                        writes = name == self.writers[kind]
                        points += [GatePoint(f"{path}.{module}.{name}", dim=-1)] if writes else []
                        cuts += cut_linear(model, f"{path}.{module}.{name}", 0 if writes else 1)
        kind, eps = self.norm
        cuts += [Cut(name, dim) for name, dim in self.stream_tensors.items()]
        for norm in norms:
            cuts += [Cut(f"{norm}.{name}", 0) for name, _ in model.get_submodule(norm).named_parameters()]
        return Group(
            name="stream",
            kind="stream",
            units=model.config.hidden_size,  # type: ignore[union-attr, arg-type]  # a model of transformers
            gated_at=tuple(points),
            cuts=tuple(cuts),
            norms=tuple(Norm(norm, kind, getattr(model.config, eps)) for norm in norms),
        )

    def check_layout(self, layout: str, groups: Sequence[Group]) -> None:
        super().check_layout(layout, groups)
        branches = [group.name for group in groups if group.kind in self.branches]
        if layout == "uniform" and branches:
            raise ValueError(
                f"export.layout: uniform cannot leave out single branches ({branches[0]} …); "
                "set model.adapter.branches=false or export.layout=heterogeneous"
            )

    # Models

    def pretrained_config(self) -> PreTrainedConfig:
        """The configuration of the unpruned model.

        Raises:
            ValueError: when the model is of another family.
        """
        if self.config is None:
            config = read_config(hub.fetch(self._source()))
        else:
            settings = dict(self.config)
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        kind = stock_class(config).model_type
        if kind not in self.model_types:
            raise ValueError(
                f"model: {self.path or 'the configuration'} is a {kind}, which {type(self).__name__} does not know; it "
                f"knows {', '.join(self.model_types)}; choose another model= or write an adapter"
            )
        return config

    def skeleton(self) -> nn.Module:
        return build_empty(self.pretrained_config(), self.auto)

    def check_teacher(self) -> None:
        hub.check_source(self._source())

    def teacher(self) -> nn.Module:
        self.pretrained_config()
        return self._load(hub.fetch(self._source()))

    def saved_gates(self) -> Path | None:
        gates = None if self.path is None else hub.fetch(self.path) / "gates.safetensors"
        return gates if gates is not None and gates.is_file() else None

    def slim(self, model: nn.Module, groups: Sequence[Group], keep: Keep) -> nn.Module:
        """Build the slim architecture from its configuration, then give it the kept elements of every tensor."""
        assert isinstance(model, PreTrainedModel)
        edits = plan_edits(model, groups, keep)
        state = slim_state(model, edits, self._layer_paths(model))
        return build_filled(self._slim_config(model, edits), self.auto, state, model)

    def slice_site(self, model: nn.Module, groups: Sequence[Group], keep: Keep, path: str) -> nn.Module:
        """The site of the model that `slim` builds; of that model, only the site's tensors are cut and filled."""
        assert isinstance(model, PreTrainedModel)
        edits, layers = plan_edits(model, groups, keep), self._layer_paths(model)
        slim_path = slim_name(path, edits, layers)
        if slim_path is None:
            return nn.Identity()
        state = slim_state(model, edits, layers, path)
        return build_module(self._slim_config(model, edits), self.auto, state, slim_path)

    def _slim_config(self, model: PreTrainedModel, edits: Edits) -> PreTrainedConfig:
        """The configuration that fits the shapes of the slim tensors: a stock one where all layers are alike."""
        paths = self._layer_paths(model)
        shapes = slim_shapes(model, edits, paths)
        kept = [index for index, path in enumerate(paths) if not edits.removes(path)]
        settings, head_dim = model.config.to_dict(), self.head_dim(model)
        for key, value in settings.items():
            if isinstance(value, list) and "layer" in key and len(value) >= model.config.num_hidden_layers:
                settings[key] = [value[index] for index in kept]
        for key in ("architectures", "transformers_version", "auto_map", "slim"):
            settings.pop(key, None)
        width_tensor, dim = next(iter(self.stream_tensors.items()))
        settings |= {"num_hidden_layers": len(kept), "head_dim": head_dim, "hidden_size": shapes[width_tensor][dim]}
        layers = [self._layer_settings(f"{self.layers}.{index}", shapes, head_dim) for index in range(len(kept))]
        attending = [index for index, layer in enumerate(layers) if layer.get("attention", True)]
        # A layer without attention does not use its cache entry; it takes the type of the first layer with attention.
        if settings.get("layer_types") and attending:
            first = settings["layer_types"][attending[0]]
            settings["layer_types"] = [t if i in attending else first for i, t in enumerate(settings["layer_types"])]
        stock = stock_class(model.config)
        config = None
        if all(layer == layers[0] and False not in layer.values() for layer in layers):
            config = self.uniform_config(stock, {**settings, **layers[0]})
        if config is None:
            branches = {kind: list(branch) for kind, branch in self.branches.items()}
            slim = {"auto": self.auto, "layers": self.layers, "branches": branches, "widths": layers}
            settings["model_type"] = f"slim_{stock.model_type}"
            # A stock class that is pointed at the folder must fail, not fill what is gone with random numbers.
            settings |= dict.fromkeys(self.layer_widths, 1)
            config = slim_classes(stock, self.auto)[0](**settings, slim=slim)  # type: ignore[call-arg]  # a configuration takes any key
        config._attn_implementation = model.config._attn_implementation
        return config

    def uniform_config(self, stock: type[PreTrainedConfig], settings: Mapping[str, Any]) -> PreTrainedConfig | None:
        """The stock configuration of a slim model whose layers are alike; None where the family has none that fits."""
        return stock(**settings)

    def head_dim(self, model: nn.Module) -> int:
        """The number of elements per head, which pruning never changes."""
        config: Any = model.config
        size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return size

    def _layer_settings(self, path: str, shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> dict[str, Any]:
        """A layer's own config attributes by name, and False under the kind of each branch that it has lost."""
        settings: dict[str, Any] = {}
        for key, (name, dim, heads) in self.layer_widths.items():
            shape = shapes.get(f"{path}.{name}")
            if shape is not None:
                settings[key] = shape[dim] // (head_dim if heads else 1)
        for kind, (module, _, _) in self.branches.items():
            if not any(name.startswith(f"{path}.{module}.") for name in shapes):
                settings[kind] = False
        return settings

    # Running

    def logits(self, output: Any) -> Tensor:
        logits: Tensor = output.logits
        return logits

    def outputs(self, model: nn.Module, inputs: Tensor, *, features: bool = False, hidden: bool = False) -> Outputs:
        if not features:
            output = model(inputs, output_hidden_states=hidden)
            return Outputs(output.logits, hidden=tuple(output.hidden_states) if hidden else ())
        self.check_outputs(features=features, hidden=hidden)
        output = model(inputs, output_hidden_states=True, logits_to_keep=1)  # its logits are not used
        states = tuple(output.hidden_states)
        inner: Any = getattr(model, "module", model)  # the wrapper of data-parallel training
        inner = inner.model if isinstance(inner, Student) else inner
        return Outputs(None, states[-1], inner.get_output_embeddings(), states if hidden else ())

    def check_outputs(self, *, features: bool, hidden: bool) -> None:
        if features and self.modality != "text":
            raise ValueError("distill.chunk: only language models are computed in chunks of tokens; set it to null")

    def alignment(self, groups: Sequence[Group], keep: Keep) -> Alignment:
        layers = [group for group in groups if group.kind == "layer"]
        states = (0, *(index + 1 for index, group in enumerate(layers) if keep[group.name]))
        # The head reads the last state, which some families pass through a norm first.
        states = (*states[:-1], len(layers))
        units = next((tuple(keep[group.name]) for group in groups if group.kind == "stream"), None)
        return Alignment(states, units)

    # Files

    @property
    def stock_reload(self) -> str:  # type: ignore[override]  # read only
        return STOCK_RELOAD.format(auto=self.auto, generates=self.modality == "text")

    def loads_with(self, path: str, model: nn.Module) -> str:
        trust = ", trust_remote_code=True" if hasattr(model.config, "slim") else ""
        return f"from transformers import {self.auto}\n\nmodel = {self.auto}.from_pretrained({path!r}{trust})"

    def write(self, path: Path, model: nn.Module, edits: Edits) -> dict[str, Any]:
        """Save as transformers does, and copy the tokenizer or image processor that lies beside the checkpoint."""
        save_folder(path, model, self._saved_dtype())  # type: ignore[arg-type]  # a model of transformers
        self.write_companions(path)
        return {}

    def as_saved(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).cpu().to(self._saved_dtype()).float()

    def _saved_dtype(self) -> torch.dtype:
        """The dtype of the unpruned checkpoint; float32 for a model that is trained here."""
        named = None if self.path is None else self.pretrained_config().dtype
        dtype: torch.dtype = getattr(torch, str(named or torch.float32).removeprefix("torch."))
        return dtype

    def write_companions(self, path: Path) -> None:
        """Copy the tokenizer, image processor and the like from the checkpoint to the folder of a saved model."""
        if self.path is not None:
            pretrained.copy_companions(hub.fetch(self.path), path)

    def read(self, path: Path, manifest: Mapping[str, Any]) -> nn.Module:
        return self._load(path)

    def _load(self, folder: Path) -> nn.Module:
        """Load a checkpoint in float32 and check it tensor by tensor."""
        config = read_config(folder)
        model_class = getattr(type(config), "slim_model", None) or getattr(transformers, self.auto)
        return pretrained.load_checked(model_class, folder, config=config, dtype=torch.float32)

    def _source(self) -> str:
        if self.path is None:
            raise ValueError("model.path: no checkpoint is given; set model.path to a repository or a local folder")
        return self.path


def linear(model: nn.Module, path: str) -> nn.Linear:
    """Return the Linear at a path."""
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear), path
    return module


def cut_linear(model: nn.Module, path: str, dim: int, per_unit: int = 1) -> list[Cut]:
    """Return the cuts of a Linear's rows (dim 0, its bias included) or columns (dim 1)."""
    cuts = [Cut(f"{path}.weight", dim, per_unit, follows="out_features" if dim == 0 else "in_features")]
    if dim == 0 and linear(model, path).bias is not None:
        cuts.append(Cut(f"{path}.bias", 0, per_unit))
    return cuts
