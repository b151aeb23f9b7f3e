"""A small result of every stage, as JSON and as the typed value."""

from __future__ import annotations

from typing import Any

from hawada.experiment.results import RESULTS, DecidedByProfile, FinalResult, InfeasibleExport, StageResult, from_json

INTERVAL = {"median": 0.1 + 0.2, "low": 0.1, "high": 1 / 3}
LATENCY = {**INTERVAL, "p95": 0.7, "samples": 5}
COMPARISON = {
    "baseline": LATENCY,
    "candidate": LATENCY,
    "ratio": INTERVAL,
    "source": "measured",
    "notes": ["a note"],
    "noisy": None,
}
TIMED_AS = {"device": "cpu", "dtype": "float32", "runtime": "eager", "phase": "forward", "batch": 2}
ENVIRONMENT = {
    "fingerprint": {"device": "cpu", "name": "a CPU", "threads": 1, "torch": "2", "tf32_conv": True},
    "platform": "Linux",
    "python": "3.11",
    "cpus": None,
    "versions": {"torch": "2", "peft": None},
}
CANDIDATE = {"level": 0, "predicted_ratio": 0.5, "ratio": INTERVAL, "value": -0.25, "widths": {"conv1": 8}}
OUTCOME = {"summary": "on target", "status": "on_target", "measured": COMPARISON, "candidates": [CANDIDATE]}
DIFFERENCE = {"max_abs_diff": 1e-7, "max_abs_logit": 2.0}
EXPORTED = {
    "widths": {"conv1": 8},
    "equivalence": DIFFERENCE,
    "refitted": 1,
    "nats": {"sliced": 0.5, "refitted": 0.25},
}
SENSITIVITY = {"conv1": {"8": 0.5, "16": 0.0}}
FIDELITY = {"mape": 0.01, "kendall_tau": None, "samples": 1}
TIMED = {"latency_ms": LATENCY, "ratio": INTERVAL}
STAIRS = {
    "site": "layer1.0",
    "kind": "layer1",
    "group": "layer1.0.conv1",
    "unit": "channel",
    "widths": [8, 9],
    "ms": [1.0, 2.0],
    "half_widths": [0.01, 0.01],
    "ends": [8],
}
SCORES = {"em": 1.0, "f1": 1.0, "nll": 0.5, "top1": 1.0, "top5": 1.0, "tokens": 8.5, "different_answers": 3}
PREFILL = {"text_ms": LATENCY, "latency_ms": LATENCY, "ratio": INTERVAL, "noisy": None}
MODEL = {"params": 8, "macs": 16, "accuracy": 0.5, "latency_ms": {**INTERVAL, "p95": 0.7}, "path": "/out/teacher"}

AS_JSON: dict[str, dict[str, Any]] = {
    "inspect": {
        "summary": "1 groups",
        "params": 7,
        "macs": 9,
        "trained": False,
        "groups": [
            {
                "name": "conv1",
                "kind": "channel",
                "units": 8,
                "parent": "",
                "gated_at": ["conv2"],
                "least": 0.1,
                "mean": 1 / 3,
                "most": 0.9,
                "open": 4,
            }
        ],
        "kept_whole": [{"module": "fc", "class": "Linear", "units": 3, "reason": "are outputs", "remedy": ""}],
        "half": {"params": 0.25, "macs": 1 / 3},
    },
    "doctor": {
        "summary": "launch-bound",
        "words": ["It is launch-bound."],
        "bottleneck": {
            "kind": "launch",
            "launch_ms": 9.0,
            "memory_ms": 1.0,
            "compute_ms": 0.5,
            "measured_ms": 10.0,
            "operators": 3,
            "flops": 30,
            "bytes": 300,
            "shares": {"launch": 0.9, "memory": 0.1, "compute": 0.05},
            "impossible": False,
        },
        "peaks": {"launch_us": 5.0, "gbps": [{"bytes": 8, "gbps": 1.5}], "tflops": 0.1},
        "teacher": TIMED,
        "slices": {"half": {**TIMED, "removed": 0.5, "widths": {"conv1": 8}}},
        "runtimes": {
            "cudagraph": {**TIMED, "against": "eager", "half": INTERVAL},
            "compile": {"refused": "no compiler"},
        },
        "stairs": [STAIRS],
        "target": {"ratio": [0.25, 0.5], "ms": [2.5, 5.0]},
        "timed_as": TIMED_AS,
        "units": {"width": ["channel"], "depth": ["branch"]},
        "simulated": False,
        "environment": ENVIRONMENT,
    },
    "profile": {
        "summary": "teacher 0.3 ms",
        "teacher_ms": 0.1 + 0.2,
        "teacher": LATENCY,
        "fastest_ratio": INTERVAL,
        "fastest_ms": 0.1,
        "fidelity": FIDELITY,
        "held_out": [{"predicted_ms": 1.0, "measured_ms": 1.1}],
        "models": [{"widths": {"conv1": 8}, **TIMED}],
        "timed_as": {**TIMED_AS, "prompt": 128, "new_tokens": 32},
        "handover_us": 0.1,
        "noisy": None,
        "simulated": True,
        "environment": ENVIRONMENT,
    },
    "pretrain": {"summary": "test perplexity 8", "perplexity": 8.0, "bits_per_byte": {"model": 3.0, "ngram": 2.5}},
    "train": {
        "summary": "2 epochs",
        "stopped": "finished",
        "epochs": 2,
        "kd": 0.1,
        "penalty": 0.0,
        "proxy_ms": 1.0,
        "gap": -0.1,
        "measured_ms": 1.1,
        "lambda": 14.3,
        "target_ms": None,
        "open_units": {"conv1": 8},
    },
    "export": {**OUTCOME, **EXPORTED, "sensitivity": SENSITIVITY},
    "front": {
        "summary": "1 of 2 targets reached",
        "points": [
            {**OUTCOME, "target_ratio": 0.5, "value": -0.25, **EXPORTED, "path": "/out/front/0.5/slim"},
            {**OUTCOME, "status": "infeasible", "target_ratio": 0.1, "value": -1.0},
        ],
        "sensitivity": SENSITIVITY,
        "seconds": {"all": 2.0, "measuring": 1.0},
        "teacher_ms": 0.3,
        "timed_as": TIMED_AS,
        "environment": ENVIRONMENT,
    },
    "finetune": {"summary": "1 epochs", "epochs": 1, "losses": {"kd": 0.4, "label": 0.15}},
    "evaluate": {
        "summary": "met: ratio 0.3",
        "verdict": "met",
        "reason": "ratio 0.3",
        "target_ms": 0.6,
        "target_ratio": 0.6,
        "timed_as": TIMED_AS,
        "latency_ratio": INTERVAL,
        "metric": "accuracy",
        "agreement": 0.9,
        "teacher": MODEL,
        "slim": {**MODEL, "loads_with": "import hawada"},
        "phases": {"forward": {"teacher_ms": INTERVAL, "slim_ms": INTERVAL, "ratio": INTERVAL}},
        "kd": None,
        "proxy": FIDELITY,
        "equivalence": {**DIFFERENCE, "reload": {**DIFFERENCE, "stock": False, "same_tokens": True}},
        "environment": ENVIRONMENT,
        "measured": COMPARISON,
        "verification": {"repeat_1": INTERVAL},
    },
    "publish": {"summary": "onnx differs by 1e-7", "formats": {"onnx": DIFFERENCE}, "address": None},
    "interlingua-dry": {
        "summary": "32 latents",
        "trainable": 10,
        "models": {
            "llama": {
                "parameters": 5,
                "trainable": 2,
                "latents": [1, 4, 8],
                "prefix": {"soft": [1, 4, 16]},
                "logits": [1, 3, 100],
                "cache_bytes_per_token": 64.0,
            }
        },
        "payload_bytes": {"fp16": 64},
    },
    "interlingua-llms": {
        "summary": "both recall",
        "llama": {"parameters": 5, "text_em": {"2": 1.0}},
        "qwen": {"parameters": 5, "text_em": {"2": 0.5}},
    },
    "interlingua": {"summary": "4 latents", "scores": {"llama": SCORES}, "seconds": 1.5, "parameters": 10},
    "interlingua-eval": {
        "summary": "exact match",
        "query_aware": False,
        "questions": 3,
        "guessing": {"no knowledge": 0.01},
        "models": {
            "llama": {
                "rows": {"latents": SCORES},
                "latents_minus": {"text": {"mean": 0.1, "low": 0.0, "high": 0.2}},
                "context_tokens": 8.5,
                "cache_bytes_saved": 100.0,
                "prefill": {"batch": 3, "latents": PREFILL, "latents with encoding": PREFILL},
            }
        },
        "together": {"em": 1.0, "f1": 1.0, "agreement": 1.0, "any_right": 1.0},
        "answers_shown_to_encoder": 1.0,
        "payload_bytes": {"fp16": 64},
        "environment": ENVIRONMENT,
    },
}
ENDED_EARLY: dict[type, dict[str, Any]] = {
    DecidedByProfile: {
        "summary": "already_met: fast",
        "verdict": "already_met",
        "reason": "fast",
        "target_ms": 1.0,
        "teacher": {"latency_ms": LATENCY},
        "environment": ENVIRONMENT,
    },
    InfeasibleExport: {
        **OUTCOME,
        "verdict": "infeasible",
        "reason": "the fastest is 1.250 ms",
        "target_ms": 0.1,
    },
}


def typed(kind: Any, plain: dict[str, Any]) -> Any:
    """The value of a type that JSON stands for."""
    return from_json(kind, plain, place="the example", remedy="mend the test")


def example(stage: str, **changes: Any) -> StageResult:
    """A result of a stage, with other values of some fields."""
    result: StageResult = typed(RESULTS[stage], {**AS_JSON[stage], **changes})
    return result


def final(**changes: Any) -> Any:
    """A run's final result, with other values of some fields."""
    return typed(FinalResult, {**AS_JSON["evaluate"], **changes})
