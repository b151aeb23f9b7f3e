"""Every key of the configuration, declared once: what it means, its unit, its bounds and whether it may be null.

Validation and `docs/configuration.md` come from here; the files in `conf/` hold the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from hawada.config.spellings import STRUCTURED_WEIGHT
from hawada.config.values import Choice, Flag, ListOf, MappingOf, Name, Nested, Node, Number, Target, Text, Value


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        meaning: what it sets, as a sentence without its full stop.
        value: what it may be.
        unit: the unit of a number that has one.
        null: what null means; None where null is refused.
        remedy: what to do about another value; None for "set <key> to one".
    """

    meaning: str
    value: Value
    unit: str = ""
    null: str | None = None
    remedy: str | None = None


KINDS = ("channel", "branch", "head", "kv_head", "query_head", "ffn", "layer", "stream", "attention", "mlp")
RUNTIMES = ("eager", "cudagraph", "compile")
LAYOUTS = ("uniform", "heterogeneous")
PHASES = ("forward", "prefill", "decode", "generate")
DEVICES = ("cpu", "mps", "cuda")

MAX_COUNT = 10**9  # more than there is of anything that is counted
WIDEST = 2**16  # no layer of a known network has more units
COUNT, COUNT_OR_ZERO = Number(1, MAX_COUNT, whole=True), Number(0, MAX_COUNT, whole=True)
TWO_OR_MORE, NONE_OR_SEVERAL = Number(2, MAX_COUNT, whole=True), Number(0, MAX_COUNT, whole=True, alone=True)
FRACTION, POSITIVE_FRACTION = Number(0, 1), Number(0, 1, above=True)
WEIGHT, RATE = Number(0, 10**6), Number(0, 100, above=True)
SECONDS, MILLISECONDS = Number(0, 10**6, above=True), Number(0, 10**7, above=True)
TEMPERATURE = Number(0, 1000, above=True)
PIXELS = Number(8, 8192, whole=True)
MULTIPLE = ListOf(Number(1, 4096, whole=True), or_one=True)
TEXT, FLAG, TARGET = Text(), Flag(), Target()
RATIO = ListOf(POSITIVE_FRACTION, or_one=True)
OF_KIND = "is not checked where model.adapter is a class of your own"


def _under(prefix: str, keys: dict[str, Key]) -> dict[str, Key]:
    """Keys below a node."""
    return {f"{prefix}.{name}": key for name, key in keys.items()}


def _target(what: str) -> Key:
    return Key(f"{what}: the import path of HawAda's class or of your own", TARGET)


def _simulated(low_gbps: Number) -> dict[str, Key]:
    """The keys of a simulated device."""
    return {
        "_target_": _target("The device that times are computed for"),
        "tflops": Key("The peak arithmetic", Number(0, 10**6, above=True), "TFLOP/s"),
        "gbps": Key("The peak memory bandwidth", low_gbps, "GB/s"),
        "launch_us": Key("The time that one kernel launch takes", Number(0, 10**6), "µs"),
        "tile": Key("Widths count as the next multiple of this", Number(1, 4096, whole=True), "units"),
        "noise": Key("The relative standard deviation of the times", FRACTION),
    }


def _architecture(names: str) -> dict[str, Key]:
    """The fields of a transformers config that are shipped; others are the library's to check."""
    known = {
        "model_type": Key("The architecture's name in the transformers library", TEXT),
        "vocab_size": Key("The number of tokens", COUNT),
        "hidden_size": Key("The width of the hidden stream", Number(1, WIDEST, whole=True), "units"),
        "num_hidden_layers": Key("The number of layers", Number(1, 10_000, whole=True)),
        "num_attention_heads": Key("The number of query heads", Number(1, WIDEST, whole=True)),
        "num_key_value_heads": Key("The number of key and value heads", Number(1, WIDEST, whole=True)),
        "intermediate_size": Key("The width of the feed-forward networks", Number(1, 2**20, whole=True), "units"),
        "max_position_embeddings": Key("The longest text", COUNT, "tokens"),
        "tie_word_embeddings": Key("Whether the output layer shares the embeddings' weights", FLAG),
        "attention_bias": Key("Whether attention projections have a bias", FLAG),
        "initializer_range": Key("The standard deviation of the initial weights", FRACTION),
        "bos_token_id": Key("The begin token", COUNT_OR_ZERO, null="there is none"),
        "eos_token_id": Key("The end token", COUNT_OR_ZERO, null="there is none"),
        "pad_token_id": Key("The token that fills batches up", COUNT_OR_ZERO, null="there is none"),
        "image_size": Key("The side of the square images", PIXELS, "pixels"),
        "patch_size": Key("The side of a patch", Number(1, 8192, whole=True), "pixels"),
        "num_labels": Key("The number of classes", COUNT),
    }
    return {name: known[name] for name in names.split()}


_ADAPTER = {
    "_target_": _target("The model family"),
    "arch": Key("The network's name in torchvision, or a kind of block (`basic`)", TEXT, null="`factory` is used"),
    "factory": Key("The import path of a function or class that returns the model", TARGET, null="`arch` is used"),
    "arguments": Key("The arguments of the factory, or of torchvision's builder", MappingOf(), null="there are none"),
    "num_classes": Key(
        "The number of classes",
        COUNT,
        null="that of the folders in `data.root`, where the factory takes it; else the network's own",
    ),
    "image_size": Key(
        "The side of the square images that latency is optimised for, or the size along each axis behind the channels",
        ListOf(Number(1, 8192, whole=True), or_one=True),
        "pixels",
        null="the size that the photos in `data.root` share, else 224",
    ),
    "weights": Key("The name of torchvision's weights", TEXT, null="`path` is used"),
    "path": Key(
        "A repository on the Hub, a folder with config.json and safetensors or one that a run saved, or a file with a "
        "state dict: .safetensors, .pth, .pt, .bin or .ckpt",
        TEXT,
        null="`weights` are used, or those that the factory's model has",
    ),
}

KEYS: dict[str, Key] = {
    "name": Key("The name of the experiment; its results go to `<output_dir>/<name>/<stage>`", Name()),
    "output_dir": Key("The folder that experiments are written to", TEXT),
    "overwrite": Key("Whether stages whose results came from another configuration are done again", FLAG),
    "seed": Key("The seed of everything that is drawn", Number(0, 2**32 - 1, whole=True)),
    "latency_target_ms": Key("The same as `budget.target_ms`", MILLISECONDS, "ms", null="those of `budget`"),
    **_under(
        "budget",
        {
            "target_ms": Key("The latency to reach", MILLISECONDS, "ms", null="`target_ratio` is used"),
            "target_ratio": Key(
                "The latency to reach as a fraction of the measured teacher's; several for one `stage=export`",
                RATIO,
                null="there is no target: a fixed lambda traces the latency-quality trade-off",
            ),
            "tolerance": Key(
                "How far below the target a latency still counts as on target, as a fraction of the target",
                Number(0, 0.5, above=True),
                null="0.03 on CUDA, 0.06 elsewhere",
            ),
            "phase": Key(
                "What is timed: `forward`, or of a language model `prefill` (the prompt), `decode` (one further token) "
                "or `generate` (all of it)",
                Choice(PHASES),
            ),
            "batch": Key("The batch size whose latency is optimised", COUNT, null="that of `model.batch`"),
            "prompt": Key("The length of the prompt, for language models", COUNT, "tokens"),
            "new_tokens": Key("How many tokens follow the prompt", TWO_OR_MORE, "tokens"),
        },
    ),
    "kd._target_": _target("The distillation loss"),
    "kd.temperature": Key("The temperature of distillation", TEMPERATURE),
    "kd.mse_weight": Key("The weight of the squared difference of the logits", WEIGHT),
    "distill.chunk": Key(
        "Losses are computed for so many tokens at a time, without all logits at once (512 is a good number)",
        COUNT,
        "tokens",
        null="all at once",
    ),
    "distill.hidden_weight": Key(
        "The weight of the squared difference of hidden states (of a convolutional network: of the outputs of its "
        "residual blocks)",
        WEIGHT,
    ),
    "distill.teacher": Key(
        "Another, larger model whose outputs are learned (`teacher=...`); it must have the same classes or tokenizer, "
        "of which only the number is checked",
        Node(),
        null="the model itself",
    ),
    **_under("distill.teacher", {name: key for name, key in _ADAPTER.items()}),
    "lambda.init": Key("The multiplier of the latency gap at the start of training", WEIGHT),
    "lambda.lr": Key("The rate of the multiplier's dual ascent; 0 keeps it fixed", WEIGHT),
    "penalties.l1": Key("The weight of the mean gate", WEIGHT),
    "penalties.structured": Key(
        "The weight of the spread among the gates of a branch and its units, which makes them live or go together; "
        f"`true` stands for {STRUCTURED_WEIGHT:g}, `false` for 0",
        WEIGHT,
    ),
    "penalties.polarization": Key("The weight of the penalty that drives gates to 0 or 1", WEIGHT),
    "penalties.floor": Key("The smallest fraction of a group that should stay", FRACTION),
    "penalties.ceiling": Key("The largest fraction of a group that should stay", FRACTION),
    "penalties.bounds": Key("The weight of what lies outside floor and ceiling", WEIGHT),
    "penalty": Key("The penalties on gates; add one of your own as `+penalty.mine={_target_: ...}`", MappingOf(Node())),
    **{f"penalty.{name}._target_": _target("A penalty") for name in ("l1", "structured", "polarization", "bounds")},
    **{
        f"penalty.{name}.weight": Key(f"Follows `penalties.{name}`", WEIGHT)
        for name in ("l1", "structured", "polarization", "bounds")
    },
    "penalty.bounds.floor": Key("Follows `penalties.floor`", FRACTION),
    "penalty.bounds.ceiling": Key("Follows `penalties.ceiling`", FRACTION),
    "groups.name": Key("Which groups are gated: shell patterns of their names", ListOf(TEXT, or_one=True), null="all"),
    "groups.kind": Key(f"Which groups are gated, by kind: {', '.join(KINDS)}", ListOf(TEXT, or_one=True), null="all"),
    **_under(
        "measure",
        {
            "_target_": _target("How long interleaved rounds go on"),
            "precision": Key(
                "Measuring ends once the interval of every ratio is at most this much above and below it",
                POSITIVE_FRACTION,
                null="0.005 on CUDA, 0.006 elsewhere",
            ),
            "min_rounds": Key("The fewest rounds", TWO_OR_MORE),
            "max_rounds": Key("The most rounds", TWO_OR_MORE, null="400"),
            "max_seconds": Key("No further round begins after this time, once there are `min_rounds`", SECONDS, "s"),
            "patience_s": Key("The longest time that is waited for a disturbed device", Number(0, 10**6), "s"),
        },
    ),
    "evaluate.batch_size": Key("The batch size of scoring on test data", COUNT),
    "evaluate.prompt_steps": Key(
        "The training steps of the blind prompt that the interlingua's latents are compared with; 0 leaves it out",
        COUNT_OR_ZERO,
        null="as many as the latents had",
    ),
    "calibration.samples": Key(
        "How many training samples importance, sensitivity and reconstruction read; 0 does without all three",
        NONE_OR_SEVERAL,
        "samples",
    ),
    "calibration.batch_size": Key("The batch size that calibration data are read in", COUNT),
    "runtime.mode": Key("How models are run while they are timed, and will be run afterwards", Choice(RUNTIMES)),
    "runtime.threads": Key("The CPU threads that models are run with", Number(1, 4096, whole=True), null="every CPU"),
    "compute.mixed_precision": Key(
        "The precision of training; what is timed is not touched", Choice(("no", "bf16", "fp16"))
    ),
    "compute.channels_last": Key(
        "Whether convolutions are trained with channels innermost, which is faster for some networks", FLAG
    ),
    **_under(
        "data",
        {
            "_target_": _target("The data set"),
            "root": Key("The folder that holds the data", TEXT),
            "path": Key(
                "Local files instead of the Hub: a file, a folder or a glob; files with dev or test in "
                "their names are tested on",
                TEXT,
                null="the Hub",
            ),
            "samples": Key("How many training samples are used", TWO_OR_MORE, "samples", null="all"),
            "augment": Key(
                "Whether training images are shifted, cropped and mirrored; `false` shows the same in every epoch, and "
                "the teacher's logits of them are remembered where memory allows",
                FLAG,
            ),
            "image_size": Key(
                "The side of the square images, or their height and width",
                ListOf(PIXELS, or_one=True),
                "pixels",
                null="the model's",
            ),
            "mean": Key(
                "The mean of each channel, of images scaled to [0, 1]",
                ListOf(FRACTION, length=3),
                null="the model's, or ImageNet's",
            ),
            "std": Key(
                "The standard deviation of each channel, of images scaled to [0, 1]",
                ListOf(POSITIVE_FRACTION, length=3),
                null="the model's, or ImageNet's",
            ),
            "test_samples": Key("How many of the 1,797 digits are tested on", Number(10, 1787, whole=True), "samples"),
            "test_fraction": Key(
                "The fraction of documents, contexts or each class's photos that is tested on, where no file or folder "
                "is for testing",
                Number(0, 0.9, above=True),
            ),
            "workers": Key("The processes that load images, one for every CPU at most", Number(0, 1024, whole=True)),
            "pairs": Key("The facts in a context", COUNT),
            "questions": Key("The questions on each context", COUNT),
            "seed": Key("The seed of the contexts", Number(0, 2**32 - 1, whole=True)),
            "sequence_length": Key("The length of a training sequence", Number(2, 2**20, whole=True), "tokens"),
            "streaming": Key("Whether no more is read than samples need", FLAG),
            "version": Key(
                "The version of SQuAD; 2.0 has questions without an answer, too", Choice(("1.1", "2.0"), True)
            ),
            "unanswerable": Key("Whether questions without an answer are kept", FLAG),
            "limit_bytes": Key("How much text is read", Number(1000, 10**12, whole=True), "bytes"),
            "column": Key("The column of .jsonl and .parquet files that holds the text", TEXT),
        },
    ),
    "doctor.runtimes": Key(
        "Which runtimes `stage=doctor` compares", ListOf(Choice(RUNTIMES)), null="the run's own, and on CUDA cudagraph"
    ),
    "doctor.points": Key("The widths in a staircase; fewer where the time runs out", Number(8, 10_000, whole=True)),
    "doctor.max_seconds": Key(
        "The time for the rounds of each comparison, and for each staircase's preparation and rounds", SECONDS, "s"
    ),
    **_under(
        "export",
        {
            "layout": Key(
                "`uniform`: all layers alike, so that stock tools load the folder; `heterogeneous`: each layer has its "
                "own widths, and the folder carries one modelling file, loaded with trust_remote_code=True (ResNets "
                "have no other)",
                Choice(LAYOUTS),
            ),
            "widths": Key(
                "`allocation`: the best widths for the milliseconds; `gates`: read from the gates, then corrected",
                Choice(("allocation", "gates")),
            ),
            "threshold": Key(
                "A gate of at least this keeps its unit, where widths are read from gates", POSITIVE_FRACTION
            ),
            "minimum": Key(
                f"The smallest width of a group of a kind; for layers and branches, how many stay. A kind {OF_KIND}",
                MappingOf(Number(0, WIDEST, whole=True)),
                remedy="set it to one",
            ),
            **{
                f"minimum.{kind}": Key(f"The fewest that stay of kind {kind}", Number(0, WIDEST, whole=True), "units")
                for kind in ("channel", "ffn", "stream", "layer", "attention")
            },
            "importance._target_": _target("What ranks the units of a group (`importance=...`)"),
            "sensitivity": Key(
                "The output divergence at each width of a group: `measured` on calibration data, with the rest of the "
                "model whole, or read from the `gates`",
                Choice(("measured", "gates")),
            ),
            "reconstruct": Key(
                "Whether layers that lost inputs are refitted to the teacher's outputs by least squares", FLAG
            ),
            "points": Key("The widths of a group at which its sensitivity is measured", Number(2, 1000, whole=True)),
            "max_measurements": Key("The most sliced models that a search measures", Number(1, 10_000, whole=True)),
            "formats": Key(
                "What is written: `hf` (the folder that `hawada.load` reads), `onnx` (`hawada[onnx]`), `pt2`; "
                "each is compared with the model once it is written",
                ListOf(Choice(("hf", "onnx", "pt2"))),
                remedy="write a list such as [hf,onnx]",
            ),
            "push_to": Key(
                "The repository on the Hub that the model is pushed to, made private if it is new", TEXT, null="none"
            ),
            "push": Key(
                "What is pushed: the `slim` model, or `gated`: the teacher with its trained gates",
                Choice(("slim", "gated")),
            ),
        },
    ),
    **_under(
        "finetune",
        {
            "batch_size": Key("The batch size of finetuning", COUNT),
            "recalibration_samples": Key(
                "How many training images BatchNorm statistics are computed on again; 0 leaves them", NONE_OR_SEVERAL
            ),
            "trainer._target_": _target("What finetunes the slim model"),
            "trainer.epochs": Key("The epochs of finetuning", COUNT_OR_ZERO, "epochs"),
            "trainer.lr": Key("The peak learning rate", RATE),
            "trainer.weight_decay": Key("The weight decay", FRACTION),
            "trainer.label_weight": Key("The weight of the loss on labels beside distillation", WEIGHT),
        },
    ),
    "gate._target_": _target("The gate"),
    "gate.init": Key("The value of theta at the start; large opens", Number(-100, 100)),
    "gate.temperature": Key("The temperature of the gate's sigmoid", TEMPERATURE),
    "gate.start_temperature": Key(
        "The temperature at the start of training, from which it falls to `gate.temperature`",
        TEMPERATURE,
        null="the same throughout",
    ),
    **_under(
        "gpu",
        {
            "name": Key("The name of this choice", Name()),
            "device": Key("The kind of device that models are timed on", Choice(("auto", *DEVICES))),
            "match": Key("A regular expression that the GPU's product name must contain", TEXT, null="any"),
            "dtype": Key(
                "The type of the weights of models that are timed", Choice(("float32", "bfloat16", "float16"))
            ),
            "multiple": Key(
                f"Widths of a kind are multiples of this; several are tried and measured. A kind {OF_KIND}",
                MappingOf(MULTIPLE),
                remedy="use 1 for no rounding",
            ),
            **{
                f"multiple.{kind}": Key(
                    f"Widths of kind {kind} are multiples of one of these",
                    MULTIPLE,
                    "units",
                    remedy="use 1 for no rounding",
                )
                for kind in ("channel", "ffn", "stream")
            },
            "prompt": Key("The default of `budget.prompt`", COUNT, "tokens"),
            "new_tokens": Key("The default of `budget.new_tokens`", TWO_OR_MORE, "tokens"),
            "timing": Key(
                "Where times come from: `measured` here; `simulated`: a rehearsal; `table`: a table measured elsewhere",
                Choice(("measured", "simulated", "table")),
            ),
            "table": Key("The latency_table.json to train by, for `gpu.timing=table`", TEXT, null="none"),
            "clock._target_": _target("What times models here"),
            "clock.runtime": Key("Follows `runtime.mode`", Choice(RUNTIMES)),
        },
    ),
    **_under("gpu.simulated", _simulated(Number(0, 10**6, above=True))),
    **_under(
        "interlingua",
        {
            "llama_id": Key("The first of `llms=pretrained`: a repository on the Hub or a local folder", TEXT),
            "qwen_id": Key("The second of `llms=pretrained`", TEXT),
            "samples": Key("How many questions are trained on", COUNT, "samples", null="all"),
            "epochs": Key(
                "How often all questions are seen, instead of `schedule.steps`", COUNT, null="`schedule.steps`"
            ),
            "seed": Key("The seed of encoder, adapters and data", Number(0, 2**32 - 1, whole=True)),
            "latent_len": Key("The latents that each model reads", Number(0, 2**16, whole=True)),
            "private_len": Key("How many of the latents are a model's own", Number(0, 2**16, whole=True)),
            "d_z": Key("The width of a latent", Number(1, WIDEST, whole=True)),
            "encoder_type": Key(
                "What the encoder sees: `bytes` (also `byte`), `tokens` (the first model's frozen embeddings) or "
                "`states` (its frozen hidden states)",
                Choice(("bytes", "tokens", "states")),
            ),
            "pooling._target_": _target("How the encoder's states become latents"),
            "encoder.width": Key("The width of the encoder", Number(1, WIDEST, whole=True)),
            "encoder.layers": Key("The layers of the encoder", Number(1, 1000, whole=True)),
            "encoder.heads": Key("The heads of the encoder; they divide its width", Number(1, 1000, whole=True)),
            "injection": Key(
                "How a model reads latents: as `soft` tokens, or as `keys` and values of every layer",
                Choice(("soft", "keys")),
            ),
            "adapter.hidden": Key("The inner width of the adapters", Number(1, WIDEST, whole=True)),
            "scale": Key(
                "The scale of soft tokens: each example's is that of the embeddings (`embed_rms`) or `fixed`; that of "
                "training (`train_stats`); or as it comes (`none`)",
                Choice(("none", "embed_rms", "fixed", "train_stats")),
            ),
            "fixed_rms": Key("The root mean square of soft tokens, for `scale=fixed`", RATE),
            "query_aware": Key(
                "Whether the encoder sees the question, too; without it latents carry whatever may be asked", FLAG
            ),
            "max_source_tokens": Key("The most tokens that the encoder sees; a question is never cut", COUNT, "tokens"),
            "max_new_tokens": Key("The most tokens that a model generates", COUNT, "tokens"),
            "sequential_models": Key("Whether one model is read at a time: less memory, the same gradients", FLAG),
            "objective._target_": _target("The losses"),
            "objective.answer_ce_weight": Key("The weight of the answer's cross-entropy", WEIGHT),
            "objective.k_token_ce_weight": Key(
                "The weight of the cross-entropy of the answer's first k tokens", WEIGHT
            ),
            "objective.first_token_ce_weight": Key(
                "The weight of the cross-entropy of the answer's first token", WEIGHT
            ),
            "objective.kd_first_k_weight": Key("The weight of distilling the first k tokens from the text", WEIGHT),
            "objective.kd_answer_weight": Key("The weight of distilling the whole answer from the text", WEIGHT),
            "objective.kd_hidden_weight": Key("The weight of distilling hidden states at the first k tokens", WEIGHT),
            "objective.scale_weight": Key("The weight of the scale of soft tokens against the embeddings'", WEIGHT),
            "objective.k": Key("How many tokens are the first", COUNT, "tokens"),
            "objective.kd_temperature": Key("The temperature of distillation", TEMPERATURE),
            "schedule._target_": _target("How long and how fast encoder and adapters are trained"),
            "schedule.steps": Key("The training steps", COUNT, "steps"),
            "schedule.contexts": Key("The contexts in a step", COUNT),
            "schedule.lr": Key("The peak learning rate", RATE),
            "schedule.weight_decay": Key("The weight decay", FRACTION),
            "schedule.warm_up": Key("The fraction of the steps over which the learning rate rises", FRACTION),
            "schedule.clip": Key("The largest norm of the gradient", Number(0, 10**6, above=True)),
            "schedule.curriculum": Key(
                "The fraction of the steps over which contexts grow; 0: they are whole", FRACTION
            ),
            "schedule.shortest": Key("The fraction of their length that contexts start with", POSITIVE_FRACTION),
            "features": Key(
                "What is trained along (`feature=lora`, `deep_prefix`, `reconstruction`, `text_alignment`, your own); "
                "`deep_prefix` and `text_alignment` are for `injection=soft`",
                MappingOf(Node()),
            ),
            "save_every": Key("The steps between two checkpoints", COUNT, "steps"),
            "test_contexts": Key("The contexts that are tested on", TWO_OR_MORE),
        },
    ),
    **_under(
        "interlingua.features",
        {
            **{
                f"{name}._target_": _target("A feature")
                for name in ("deep_prefix", "lora", "reconstruction", "text_alignment")
            },
            "deep_prefix.hidden": Key("The inner width of the network that makes keys and values", COUNT),
            "lora.rank": Key("The rank of the changes", Number(1, WIDEST, whole=True)),
            "lora.alpha": Key("The scale of the changes, times the rank", Number(0, 10**6, above=True)),
            "lora.targets": Key("The names of the layers that are changed", ListOf(TEXT)),
            "reconstruction.weight": Key("The weight of writing out the text", WEIGHT),
            "reconstruction.until": Key("How long the text is written out", COUNT_OR_ZERO, "steps"),
            "reconstruction.ask": Key("The question that asks for the text", Text(free=True)),
            "reconstruction.max_tokens": Key("The most tokens that are written out", COUNT, "tokens"),
            "text_alignment.weight": Key("The weight of the embeddings' means", WEIGHT),
            "text_alignment.until": Key(
                "How long soft tokens are held to the embeddings' means", COUNT_OR_ZERO, "steps"
            ),
        },
    ),
    **_under(
        "llms",
        {
            "bos": Key("Whether the begin token stands before the prefix", Choice(("auto", "yes", "no", True, False))),
            "chat": Key(
                "Whether the tokenizer's chat header stands before the prefix and its turn before the answer", FLAG
            ),
            "question": Key("The question as it is put, with `{question}` in it", Text(free=True)),
            "warm_anchor_text": Key("The text just before the answer", Text(free=True)),
            "stop": Key("The text that an answer ends at, beside the end token", Text(free=True), null="none"),
            "dtype": Key("The type of the weights", Choice(("auto", "float32", "bfloat16", "float16"))),
            "training": Key("How the tiny models are trained", MappingOf(), null="they come trained"),
            "training.pairs": Key("The most facts in a context", TWO_OR_MORE),
            "training.steps": Key("The training steps", COUNT, "steps"),
            "training.lr": Key("The peak learning rate", RATE),
            "training.contexts": Key("The contexts in a step", COUNT),
            "training.questions": Key("The questions on each context", COUNT),
            "training.text_em": Key("The exact match from text below which training has failed", FRACTION),
        },
    ),
    **{
        f"llms.{name}.{field}": key
        for name, own in (("llama", "attention_bias"), ("qwen", ""))
        for field, key in {
            "source": Key("A repository on the Hub or a local folder", TEXT, null="the model is trained here"),
            "tokenizer": Key(
                "The tiny model's tokenizer: `word` (one token a key and a value) or `syllable` (two of each)",
                Choice(("word", "syllable")),
                null="the source's",
            ),
            "config": Key("The fields of the transformers config", MappingOf(), null="the source's"),
            **_under(
                "config",
                _architecture(
                    "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
                    f"intermediate_size max_position_embeddings initializer_range {own}"
                ),
            ),
        }.items()
    },
    **_under(
        "model",
        {
            "name": Key("The name of this choice", Name()),
            "pretrain": Key("Whether the teacher is trained here, by `stage=pretrain`", FLAG),
            "phase": Key("The default of `budget.phase`", Choice(PHASES)),
            "layout": Key("The default of `export.layout`", Choice(LAYOUTS)),
            "path": Key(
                "A local folder or a repository of the unpruned model, of a slim one, or of one with "
                "gates.safetensors, which is then exported without training",
                TEXT,
                null="`adapter.weights` are used, or the teacher is trained here",
            ),
            **{f"batch.{device}": Key(f"The default of `budget.batch` on {device}", COUNT) for device in DEVICES},
            "precheck._target_": _target("What is asked for before torch is loaded"),
            "precheck.source": Key("Follows `model.adapter.path`", TEXT),
        },
    ),
    **_under(
        "model.adapter",
        {
            **_ADAPTER,
            "layers": Key("The blocks in each of the four stages", ListOf(Number(1, 1000, whole=True), length=4)),
            "channels": Key("The channels of an image", Number(1, 4096, whole=True)),
            "example": Key(
                "What forward takes, where that is not one image: shapes without the batch by the names of parameters, "
                "`{image: [3, 64, 64], age: [1]}`, or the path of a function of the batch size",
                Nested(),
                null="one image of `image_size`",
            ),
            "stream": Key(
                "Whether the hidden stream (of a convolutional network, the channels that residual blocks add into) is "
                "pruned, too; the table takes longer",
                FLAG,
            ),
            "branches": Key("Whether whole attentions and MLPs are pruned, too (`export.layout=heterogeneous`)", FLAG),
            "config": Key("The fields of the transformers config", MappingOf()),
        },
    ),
    **_under(
        "model.adapter.config",
        _architecture(
            "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
            "intermediate_size max_position_embeddings tie_word_embeddings bos_token_id eos_token_id pad_token_id "
            "image_size patch_size num_labels"
        ),
    ),
    "pretrain.batch_size": Key("The batch size of pretraining", COUNT),
    "pretrain.trainer._target_": _target("What trains a teacher from labels"),
    "pretrain.trainer.epochs": Key("The epochs of pretraining", COUNT_OR_ZERO, "epochs"),
    "pretrain.trainer.lr": Key("The peak learning rate", RATE),
    "pretrain.trainer.weight_decay": Key("The weight decay", FRACTION),
    "profile.points": Key(
        "The widths of a group in a site's table; fewer where several groups touch a site", Number(2, 1000, whole=True)
    ),
    "profile.fitted_models": Key(
        "The whole sliced models that the proxy is fitted on, besides the teacher and the smallest",
        Number(0, 10_000, whole=True),
    ),
    "profile.held_out_models": Key(
        "The unseen models that the proxy's fidelity is computed on", Number(2, 10_000, whole=True)
    ),
    "proxy._target_": _target("The latency proxy"),
    "proxy.pull": Key("How firmly the scales of different kinds of sites are held together", WEIGHT),
    "proxy.clock": Key("What sites are timed with", Node(), null="the device's own clock"),
    **_under("proxy.clock", _simulated(Number(0, 10**6, above=True, infinite=True))),
    **_under(
        "schedule",
        {
            "pretrain": Key("The epochs of pretraining", COUNT_OR_ZERO, "epochs"),
            "pretrain_lr": Key("The peak learning rate of pretraining", RATE),
            "train": Key("The epochs of gate training", COUNT_OR_ZERO, "epochs"),
            "finetune": Key("The epochs of finetuning", COUNT_OR_ZERO, "epochs"),
            "finetune_lr": Key("The peak learning rate of finetuning", RATE),
            "batch_size": Key("The batch size of all training", COUNT),
            "steps_per_epoch": Key("The steps in an epoch of gate training", COUNT, "steps", null="all the data"),
            "calibration": Key("The default of `calibration.samples`", NONE_OR_SEVERAL, "samples"),
        },
    ),
    "stage.name": Key("The stage that is run", TEXT),
    "task._target_": _target("What the outputs of the model mean"),
    "task.output": Key("The key of the output that is distilled, where a model returns a dictionary", TEXT),
    "task.score": Key(
        "The import path of a function of (output, labels) that scores a batch, larger is better",
        TARGET,
        null="how far the outputs are from the teacher's",
    ),
    "task.learn_labels": Key("Whether labels are learned too, by the mean squared error", FLAG),
    **_under(
        "train",
        {
            "epochs": Key("The epochs of gate training", COUNT_OR_ZERO, "epochs"),
            "steps_per_epoch": Key("The steps in an epoch", COUNT, "steps", null="all the data"),
            "batch_size": Key("The batch size of gate training", COUNT),
            "gate_optimizer._target_": Key("The optimiser of the gates", TARGET),
            "gate_optimizer.lr": Key("The learning rate of the gates", RATE),
            "weight_optimizer": Key(
                "The optimiser of the weights, which then train along (`train=two_phase`)",
                Node(),
                null="only gates train",
            ),
            "weight_optimizer._target_": Key("The optimiser of the weights", TARGET),
            "weight_optimizer.lr": Key("The learning rate of the weights", RATE),
            "minimum_fraction": Key("The fraction of its units that every group keeps in expectation", FRACTION),
            "probe_every": Key(
                "The epochs between two measurements of a sliced student; 0: never", COUNT_OR_ZERO, "epochs"
            ),
            "patience": Key(
                "The epochs on target without a better distillation loss after which training stops; 0: never",
                COUNT_OR_ZERO,
                "epochs",
            ),
            "importance.samples": Key(
                "The training samples by whose Fisher information gates start; 0: all start alike",
                COUNT_OR_ZERO,
                "samples",
            ),
            "importance.spread": Key("How far apart gates start, in standard deviations of theta", Number(0, 100)),
        },
    ),
}
