"""Trains the tiny language models that recall facts, where none are given."""

from __future__ import annotations

from omegaconf import DictConfig

from hawada.adapters.huggingface import quietly
from hawada.experiment import MetricsLog, Run
from hawada.experiment.results import InterlinguaLLMsResult, TrainedLLM
from hawada.interlingua.evaluation.answers import answer
from hawada.interlingua.evaluation.baselines import text
from hawada.interlingua.llms.tiny import pretrain_recall
from hawada.interlingua.recall import Recall
from hawada.interlingua.stages.parts import NAMES, InterlinguaParts
from hawada.report import Progress

TEST_CONTEXTS = 256  # contexts


def run(cfg: DictConfig, run: Run) -> InterlinguaLLMsResult:
    """Write one folder a model, in transformers' format, and how well each recalls from text."""
    parts, training = InterlinguaParts(cfg, run), dict(cfg.llms.training)
    least_em = training.pop("text_em")
    found: dict[str, TrainedLLM] = {}
    with run.writing("interlingua-llms") as folder, Progress("llms", len(NAMES)) as progress:
        log = MetricsLog(folder / "metrics.jsonl")
        for name in NAMES:
            llm = parts.untrained_llm(name)
            llm.model.to(parts.device)

            def report(step: int, figures: dict[str, float], name: str = name) -> None:
                log.write({"model": name, "step": step, **figures})
                progress.say(f"{name}: {figures['pairs']:.0f} facts, {figures['right']:.1%} right")

            pretrain_recall(llm, seed=cfg.seed, report=report, **training)
            with quietly():
                llm.model.save_pretrained(folder / name)
            em = {
                str(pairs): float(answer(llm, text(), Recall(pairs, 1).test(TEST_CONTEXTS)).em.mean())
                for pairs in sorted({2, 4, 8, 16, training["pairs"]})
                if pairs <= training["pairs"]
            }
            progress.step(f"{name} is trained")
            parameters = sum(p.numel() for p in llm.model.parameters())
            found[name] = TrainedLLM(parameters=parameters, text_em=em)
        worst = min(em for record in found.values() for em in record.text_em.values())
        if worst < least_em:
            raise RuntimeError(
                f"the tiny models recall {worst:.1%} from text and {least_em:.1%} are asked for; raise "
                "llms.training.steps, take another seed, or set llms.training.text_em lower"
            )
        summary = "; ".join(
            f"{name} recalls {min(record.text_em.values()):.1%} from text" for name, record in found.items()
        )
        return run.finish("interlingua-llms", InterlinguaLLMsResult(summary=summary, **found))
