"""Gathers the evidence for layer selection: builds probes from the tasks and runs the sweep they are measured in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.progress import say
from halobench.surgery.selection.contract import Need
from halobench.surgery.selection.evidence import Evidence, read_evidence
from halobench.surgery.selection.sweep import (
    Measured,
    Probe,
    collect_replacements,
    measure_replacements,
    sweep_restorations,
)
from halobench.surgery.transplant import swapped

if TYPE_CHECKING:
    from halobench.pipeline import Conversion

HELD_BACK = 2 * 10**6  # place in the data stream from which no stage of a small recipe draws


class RetrievalProbe:
    """Needles or key-value lists; a sample is a haystack (the mean over its questions)."""

    def __init__(self, name: str, haystacks: list[Any], device: str) -> None:
        self.name, self.haystacks, self.device = name, haystacks, device

    def measure(self, model: Any) -> Measured:
        """See Probe."""
        import numpy as np

        from halobench.tasks.needle import score_haystacks

        scores = score_haystacks(model, self.haystacks, device=self.device)
        groups = [np.asarray(scores.haystack) == i for i in range(len(self.haystacks))]
        samples = {
            "answer_logprob": [float(np.asarray(scores.logprob)[g].mean()) for g in groups],
            "accuracy": [float(np.asarray(scores.correct)[g].mean()) for g in groups],
        }
        return Measured(samples, scores.tokens_processed)


class ContinuationProbe:
    """The four-way choice of the true continuation; a sample is an item."""

    name = "continuation"

    def __init__(self, tokenizer: Any, items: list[Any]) -> None:
        self.tokenizer, self.items = tokenizer, items

    def measure(self, model: Any) -> Measured:
        """See Probe."""
        from halobench.tasks.continuation import score_items
        from halobench.tasks.scoring import TokenCount

        with TokenCount(model) as count:
            scores = score_items(model, self.tokenizer, self.items)
        samples = {
            "margin": [float(x) for x in scores.margin],
            "acc": [float(x) for x in scores.correct],
            "acc_norm": [float(x) for x in scores.correct_norm],
        }
        return Measured(samples, count.tokens)


def probes(tokenizer: Any, *, length: int, haystacks: int, items: int, seed: int, device: str) -> list[Probe]:
    """Recall by needles and by lists, and commonsense by continuation; on items that the evaluation does not use."""
    from halobench.tasks.continuation import load_items
    from halobench.tasks.needle import NeedleConfig, build_haystacks, build_lists
    from halobench.tasks.suites import held_out_filler

    filler = held_out_filler(tokenizer)
    needles = build_haystacks(tokenizer, filler, length, haystacks, seed + 101, NeedleConfig())
    lists = build_lists(tokenizer, filler, length, haystacks, seed + 102)
    return [
        RetrievalProbe("needles", needles, device),
        RetrievalProbe("lists", lists, device),
        ContinuationProbe(tokenizer, load_items(items, seed, "selection")),
    ]


def gather(conversion: Conversion, folder: Path, needs: set[Need]) -> Evidence:
    """The evidence of an aligned run, kept in `folder`/evidence.json; what is there already is not measured again."""
    path = folder / "evidence.json"
    evidence = read_evidence(path) if path.exists() else None
    if evidence is None:
        evidence = _replacements(conversion, folder)
        evidence.save(path)
    if "restored" in needs and not evidence.restored:
        evidence = _restorations(conversion, folder, evidence)
        evidence.save(path)
    return evidence


def _carrier(conversion: Conversion) -> Any:
    from halobench.surgery import SurgeryPlan, transplant

    plan = SurgeryPlan.for_model(conversion.teacher, keep="all")
    carrier: Any = transplant(conversion.teacher, plan)
    return carrier.to(conversion.device).eval()


def measure(conversion: Conversion, folder: Path, layers: list[int | None]) -> None:
    """Measures some of the single replacements (None: the teacher itself) of an aligned run into `folder`."""
    config = conversion.recipe.selection
    tasks = probes(
        conversion.tokenizer,
        length=config.length,
        haystacks=config.haystacks,
        items=config.items,
        seed=conversion.recipe.seed,
        device=conversion.device,
    )
    measure_replacements(_carrier(conversion), conversion.mixers(), tasks, folder / "layers", layers)


def _replacements(conversion: Conversion, folder: Path) -> Evidence:
    config = conversion.recipe.selection
    say(f"select: each of {conversion.layers} layers replaced alone, recall and commonsense measured")
    measure(conversion, folder, [None, *range(conversion.layers)])
    original, samples, replaced, tokens = collect_replacements(folder / "layers", conversion.layers)
    return Evidence(
        teacher=conversion.teacher_name,
        mixer=conversion.recipe.mixer,
        num_layers=conversion.layers,
        csr_metric=config.csr_metric,
        csr_tasks=["continuation"],
        recall_metric=config.recall_metric,
        recall_tasks=["needles", "lists"],
        original=original,
        original_samples=samples,
        replaced=replaced,
        tokens=tokens,
        source="halobench sweep: layer i alone replaced by its aligned mixer",
    )


def _restorations(conversion: Conversion, folder: Path, evidence: Evidence) -> Evidence:
    config = conversion.recipe.selection
    mixers = conversion.mixers()
    budget = config.restore_tokens
    how = f"re-distilled for {budget:,} tokens" if budget else "not retrained"
    say(f"select: the all-linear student with softmax restored in one layer, {how}, KL to the teacher measured")
    carrier = _carrier(conversion)

    @contextmanager
    def restored(layer: int) -> Iterator[Any]:
        if budget:
            yield _redistilled(conversion, mixers, layer, folder / f"restore-{layer}")
            return
        with swapped(carrier, {i: m for i, m in mixers.items() if i != layer}):
            yield carrier

    data = conversion.data(conversion.recipe.distil)
    rows, tokens = sweep_restorations(
        conversion.teacher,
        sorted(mixers),
        restored,
        data,
        sequences=config.kl_sequences,
        length=config.kl_length,
        first=HELD_BACK,
    )
    return replace(evidence, restored=rows, restored_tokens=tokens + budget * len(mixers))


def _redistilled(conversion: Conversion, mixers: dict[int, Any], layer: int, folder: Path) -> Any:
    """The student with softmax in `layer` alone, trained on by KL for the budget; positions stay as in the teacher."""
    from halobench.surgery import SurgeryPlan, transplant
    from halobench.surgery.loop import Loop
    from halobench.surgery.stages.distil import Distillation

    recipe = conversion.recipe
    plan = SurgeryPlan.for_model(
        conversion.teacher, mixer=recipe.mixer, keep=[layer], hype=False, mixer_options=recipe.mixer_options
    )
    student: Any = transplant(conversion.teacher, plan, mixers)
    student.to(conversion.device).float().train().requires_grad_(True)
    objective = Distillation(student, conversion.teacher, f"restore {layer}")
    config = replace(recipe.distil, tokens=recipe.selection.restore_tokens)
    first = conversion.align().sequences
    Loop(folder, objective, conversion.data(config), config, first_sequence=first, device=conversion.device).run()
    return student.eval()
