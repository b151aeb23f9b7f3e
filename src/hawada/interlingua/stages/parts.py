"""What the stages of the interlingua work with, made from their configuration when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from hawada.adapters.huggingface import check_source, fetch, load_checked, quietly
from hawada.config import build
from hawada.data import QAData
from hawada.experiment import Run
from hawada.interlingua.adapter import SCALES, Adapter, PrefixAdapter
from hawada.interlingua.encoder import ByteFeatures, FrozenFeatures, InterlinguaEncoder, LearnedPrompt
from hawada.interlingua.examples import Task
from hawada.interlingua.features import Feature
from hawada.interlingua.llms.llm import LMWrapper, Template
from hawada.interlingua.llms.tiny import small_causal_lm
from hawada.interlingua.llms.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer
from hawada.interlingua.messenger import Messenger, SourceText
from hawada.interlingua.questions import Questions
from hawada.interlingua.recall import KEYS, Recall, syllable_tokenizer, word_tokenizer
from hawada.interlingua.trainer import Schedule
from hawada.workspace import Stopwatch, Store, configured_device, prepare

QUESTION_DATA = ("hawada.data.squad", "hawada.data.hotpotqa")
NAMES = ("llama", "qwen")
ENCODERS, INJECTIONS = ("bytes", "tokens", "states"), ("soft", "keys")
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "word": word_tokenizer,
    "syllable": syllable_tokenizer,
    "byte": ByteTokenizer,
}


class InterlinguaParts:
    """Models, task and messenger of one stage.

    Args:
        cfg: the part of the configuration that the stage reads.
        run: the run directory.
        dry: shapes alone, on the meta device: no weights are loaded, and any tokenizer is taken for one of bytes.
    """

    def __init__(self, cfg: DictConfig, run: Run, *, dry: bool = False) -> None:
        self.cfg, self.run, self.dry = cfg, run, dry
        prepare(cfg)
        self.store = Store(cfg, run)
        self.watch = Stopwatch(cfg, self.store)

    @cached_property
    def device(self) -> torch.device:
        """Where everything is computed; where it is timed too, the device must be the one that `gpu` names."""
        return torch.device("meta") if self.dry else configured_device(self.cfg.gpu)

    def check(self) -> None:
        """Check what can be checked before any work.

        Raises:
            ValueError: one sentence with the key and the remedy.
        """
        sources = [self.cfg.llms[name].source for name in NAMES]
        if None in sources and any(sources):
            raise ValueError("llms: one model has a source and the other has none; set llms=tiny or llms=pretrained")
        if not self.dry:
            for name, source in zip(NAMES, sources, strict=True):
                if source is not None:
                    check_source(source, key=f"interlingua.{name}_id")
        training = self.cfg.llms.training
        if training is not None and not 2 <= training.pairs <= len(KEYS):
            raise ValueError(
                f"llms.training.pairs: {training.pairs} is not between 2 and the number of keys, {len(KEYS)}; set it so"
            )
        if "interlingua" not in self.cfg:
            if any(sources):
                raise ValueError(
                    "stage=interlingua-llms: these models come trained; leave the stage out, or set llms=tiny"
                )
            return
        runtime = self.cfg.runtime.get("mode", "eager")
        if runtime != "eager":
            raise ValueError(f"runtime.mode: prompts are timed eagerly, not by {runtime}; set runtime.mode=eager")
        if self.cfg.gpu.get("timing") == "table":
            raise ValueError(
                "gpu.timing: no latency table holds the prompts of language models; set gpu.timing=measured, or "
                "gpu.timing=simulated to rehearse"
            )
        if "data" in self.cfg:
            self.task  # noqa: B018
        self._check_interlingua()

    def _check_interlingua(self) -> None:
        node = self.cfg.interlingua
        if node.private_len > node.latent_len:
            raise ValueError(
                f"interlingua.private_len: {node.private_len} is not between 0 and interlingua.latent_len="
                f"{node.latent_len}"
            )
        build(node.objective)
        self.schedule  # noqa: B018
        for feature in node.features.values():
            build(feature).check(node.injection)
        if node.encoder.width % node.encoder.heads:
            raise ValueError(
                f"interlingua.encoder.heads: {node.encoder.heads} do not divide interlingua.encoder.width="
                f"{node.encoder.width}; set one of them to fit"
            )
        for key, allowed in (("encoder_type", ENCODERS), ("injection", INJECTIONS), ("scale", SCALES)):
            value = node[key]
            if value not in allowed:
                raise ValueError(f"interlingua.{key}: {value!r} is not one of {', '.join(allowed)}; set it to one")

    @property
    def latents_sent(self) -> int:
        """For one context, to all models together: the latents that they share, and each one's own."""
        node = self.cfg.interlingua
        return int(node.latent_len + node.private_len * (len(NAMES) - 1))

    @cached_property
    def task(self) -> Task:
        """Where examples come from.

        Raises:
            ValueError: when the data are no questions, or the tiny models cannot read them.
        """
        node = self.cfg.data
        target = str(node["_target_"])
        if target.startswith("hawada.data.") and target not in QUESTION_DATA:
            raise ValueError(f"data: {target} has no questions; choose data=recall, squad or hotpotqa")
        if target == "hawada.interlingua.Recall":
            task: Recall = build(node)
            trained = self.cfg.llms.training
            if trained is not None and task.pairs > trained.pairs:
                raise ValueError(
                    f"data.pairs: {task.pairs} is more than the {trained.pairs} that the models are trained to recall; "
                    "set llms.training.pairs as high"
                )
            return task
        if any(self.cfg.llms[name].source is None for name in NAMES):
            raise ValueError("llms: the tiny models only know data=recall; set llms=pretrained for real texts")
        samples = {} if self.cfg.interlingua.samples is None else {"samples": self.cfg.interlingua.samples}
        found: QAData | Task = build(node, **samples)
        if not isinstance(found, QAData):
            return found
        return Questions(found.train, found.test, seed=self.cfg.interlingua.seed)

    @cached_property
    def schedule(self) -> Schedule:
        """As configured, or so many epochs of data that have an end.

        Raises:
            ValueError: when the data have none.
        """
        node = self.cfg.interlingua
        schedule: Schedule = build(node.schedule)
        if node.epochs is None:
            return schedule
        if not isinstance(self.task, Questions):
            raise ValueError("interlingua.epochs: data=recall has no end; set interlingua.schedule.steps instead")
        return replace(schedule, steps=node.epochs * self.task.steps_per_epoch(schedule.contexts))

    def template(self, tokenizer: Tokenizer) -> Template:
        """How questions are put.

        Raises:
            ValueError: when a chat header is asked of a tokenizer without one.
        """
        node = self.cfg.llms
        if not node.chat:
            return Template(node.question, node.warm_anchor_text)
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise ValueError("llms.chat: the tiny models know no chat; set llms.chat=false")
        return Template(node.question, node.warm_anchor_text, *tokenizer.chat())

    def _wrapped(self, name: str, model: nn.Module, tokenizer: Tokenizer) -> LMWrapper:
        bos = {True: "yes", False: "no"}.get(self.cfg.llms.bos, self.cfg.llms.bos)  # what YAML makes of a bare word
        return LMWrapper(
            name, model, tokenizer, template=self.template(tokenizer), bos=bos, stop=self.cfg.llms.stop or ""
        )

    def untrained_llm(self, name: str) -> LMWrapper:
        """A tiny model of the configuration."""
        node = self.cfg.llms[name]
        tokenizer: Tokenizer = TOKENIZERS[node.tokenizer]()
        sizes: dict[str, Any] = OmegaConf.to_container(node.config, resolve=True)  # type: ignore[assignment]  # a mapping, by the schema
        model = small_causal_lm(sizes.pop("model_type"), tokenizer.vocabulary, **sizes)
        return self._wrapped(name, model, tokenizer)

    @cached_property
    def llms(self) -> dict[str, LMWrapper]:
        """The frozen models, on the device."""
        found = {name: self._llm(name) for name in NAMES}
        for llm in found.values():
            llm.model.to(self.device)
        return found

    def _llm(self, name: str) -> LMWrapper:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        node = self.cfg.llms[name]
        if self.dry:
            return self._weightless(name)
        if node.source is None:
            llm = self.untrained_llm(name)
            folder = self.run.folder("interlingua-llms") / name
            with quietly():
                trained = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            return self._wrapped(name, trained, llm.tokenizer)
        folder = fetch(node.source, key=f"interlingua.{name}_id")
        tokenizer = PretrainedTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        self.template(tokenizer)  # may be refused, before weights are loaded
        return self._wrapped(name, load_checked(AutoModelForCausalLM, folder, dtype=self.cfg.llms.dtype), tokenizer)

    def _weightless(self, name: str) -> LMWrapper:
        """A model on the meta device; of a checkpoint, only config.json is read.

        Raises:
            ValueError: when there is none.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        source = self.cfg.llms[name].source
        with torch.device("meta"):
            if source is None:
                llm = self.untrained_llm(name)
                llm.model.set_attn_implementation("eager")
                return llm
            try:
                config = AutoConfig.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"interlingua.{name}_id: {source} has no configuration here or on the Hub "
                    f"({str(error).splitlines()[0]}); give a local folder with config.json"
                ) from error
            # Other attentions look into masks, which have no values here; the library does not annotate the method.
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
            return self._wrapped(name, model, ByteTokenizer())

    def new_prompt(self) -> Messenger:
        """A learned prompt in the encoder's place, blind to the text, untrained, on the device."""
        node, llms = self.cfg.interlingua, self.llms
        torch.manual_seed(node.seed)
        encoder = LearnedPrompt(NAMES, node.latent_len, node.d_z)
        adapters = {name: self._adapter(llm) for name, llm in llms.items()}
        return Messenger(encoder, adapters, SourceText(ByteTokenizer(), node.max_source_tokens)).to(self.device)

    def new_messenger(self) -> Messenger:
        """Encoder, adapters and features, untrained, on the device; features change the models."""
        node, llms = self.cfg.interlingua, self.llms
        torch.manual_seed(node.seed)
        encoder = InterlinguaEncoder(
            self._features(node.encoder.width),
            lambda latents, width: build(node.pooling, latents=latents, width=width),
            NAMES,
            latent_len=node.latent_len,
            d_z=node.d_z,
            private_len=node.private_len,
            **node.encoder,
        )
        adapters = {name: self._adapter(llm) for name, llm in llms.items()}
        tokenizer = ByteTokenizer() if node.encoder_type == "bytes" else self.llms[NAMES[0]].tokenizer
        source = SourceText(tokenizer, node.max_source_tokens, node.query_aware)
        features: dict[str, Feature] = {name: build(feature) for name, feature in node.features.items()}
        messenger = Messenger(encoder, adapters, source, features)
        for feature in features.values():
            feature.attach(encoder, llms)
        return messenger.to(self.device)

    def _features(self, width: int) -> nn.Module:
        """What the encoder sees of a token."""
        kind, llm = self.cfg.interlingua.encoder_type, self.llms[NAMES[0]]
        if kind == "bytes":
            return ByteFeatures(width)
        if kind == "tokens":
            return FrozenFeatures(lambda ids, mask: llm.embed(ids), llm.width, width)

        def states(ids: Tensor, mask: Tensor) -> Tensor:
            with llm.as_pretrained():
                out = llm.model(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    output_hidden_states=True,
                    use_cache=False,
                    logits_to_keep=1,
                )
            middle: Tensor = out.hidden_states[len(out.hidden_states) // 2]
            return middle

        return FrozenFeatures(states, llm.width, width)

    def _adapter(self, llm: LMWrapper) -> nn.Module:
        node = self.cfg.interlingua
        if node.injection == "soft":
            return Adapter(
                node.d_z,
                node.latent_len,
                llm.width,
                llm.embedding_rms,
                hidden=node.adapter.hidden,
                scale=node.scale,
                value=node.fixed_rms,
            )
        return PrefixAdapter(node.d_z, node.latent_len, *llm.cache_shape, hidden=node.adapter.hidden)
