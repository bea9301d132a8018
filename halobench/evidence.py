"""Gathers what layers are chosen by: the sweep over layers, candidates trained by KL, the workbench of searches."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import to_dict
from halobench.errors import UserError
from halobench.files import read_json, write_json
from halobench.probes import CSR, RECALL, TASKS, TEXT, make_probe
from halobench.progress import say
from halobench.surgery.selection.contract import Need, Prices, Question
from halobench.surgery.selection.evidence import Changed, Evidence
from halobench.surgery.selection.sweep import (
    Found,
    State,
    Sweep,
    SweptPart,
    checked,
    cut,
    means,
    sweep_folder,
    weights_hash,
)

if TYPE_CHECKING:
    from halobench.mixers.contract import Mixer
    from halobench.pipeline import Conversion
    from halobench.surgery.loop import LoopConfig

# What can be measured with one layer changed, and what of it each need asks for.
SWEPT: dict[SweptPart, tuple[str, ...]] = {"replaced": TASKS, "restored": TEXT}
ASKED: dict[Need, tuple[SweptPart, tuple[str, ...]]] = {
    "recall": ("replaced", RECALL),
    "csr": ("replaced", CSR),
    "text": ("replaced", TEXT),
    "restored": ("restored", TEXT),
}


def question(
    conversion: Conversion, needs: Collection[Need], keep: int, given: tuple[int, ...] | None = None
) -> Question:
    """The question of which `keep` layers stay, with all that selectors with these needs read; measures what lacks."""
    from halobench.workbench import Bench

    folder = conversion.base.path / "select"
    return Question(
        layers=conversion.layers,
        keep=keep,
        seed=conversion.recipe.seed,
        evidence=gather(conversion, folder, needs) if set(needs) - {"workbench"} else None,
        given=given,
        workbench=Bench(conversion, folder) if "workbench" in needs else None,
    )


def prices(conversion: Conversion) -> Prices:
    """Tokens that evidence will cost, known before any model runs: the tasks are made, and counted."""
    config = conversion.recipe.selection
    sizes = {task: sum(make_probe(conversion, task).sizes) for task in (*RECALL, *CSR)}
    training = _training(conversion)
    return Prices(
        layers=conversion.layers,
        keep=conversion.recipe.kept_count(conversion.layers),
        recall=sum(sizes[task] for task in RECALL),
        csr=sum(sizes[task] for task in CSR),
        text=config.kl_sequences * config.kl_length,
        restore=training.trained_tokens if config.restore_tokens else 0,
        prompt=config.length,
    )


def gather(conversion: Conversion, folder: Path, needs: Collection[Need]) -> Evidence:
    """The evidence of an aligned run; what is in `folder` already is not measured again.

    Processes that train together share the work. All that was ever measured in this way is left in
    `folder`/evidence.json.
    """
    sweep = measure(conversion, folder, needs, conversion.team.rank, conversion.team.size)
    conversion.team.wait()
    config = conversion.recipe.selection
    found: dict[str, Found] = {part: entry for part in SWEPT if (entry := sweep.collect(part)) is not None}
    replaced, restored = found.get("replaced"), found.get("restored")
    costs = {part: entry.tokens for part, entry in found.items()}
    seconds = {part: entry.seconds for part, entry in found.items()}
    redistilled: list[Changed] = []
    trained = _redistilled(conversion, folder, sweep.mixers)
    if trained is not None:
        redistilled, tokens, taken = trained
        costs["redistilled"], seconds["redistilled"] = {TEXT[0]: tokens}, {TEXT[0]: taken}
    evidence = Evidence(
        teacher=conversion.teacher_name,
        mixer=conversion.recipe.mixer,
        num_layers=conversion.layers,
        csr_metric=config.csr_metric,
        csr_tasks=list(CSR),
        recall_metric=config.recall_metric,
        recall_tasks=list(RECALL),
        original=replaced.base if replaced else {},
        original_samples=replaced.base_samples if replaced else None,
        replaced=replaced.entries if replaced else [],
        linear=restored.base if restored else {},
        linear_samples=restored.base_samples if restored else None,
        restored=restored.entries if restored else [],
        redistilled=redistilled,
        costs=costs,
        seconds=seconds,
        layer_forwards={
            "run": sum(entry.meter.run for entry in found.values()),
            "one_by_one": sum(entry.meter.one_by_one for entry in found.values()),
        },
        source="halobench sweep: one layer changed at a time, by its aligned mixer",
    )
    if conversion.team.leads:
        evidence.save(folder / "evidence.json")
    return evidence


def measure(conversion: Conversion, folder: Path, needs: Collection[Need], rank: int = 0, size: int = 1) -> Sweep:
    """This process's share of the measurements behind `gather`: of `size` processes it is the `rank`-th.

    Candidates are shared out too, unless the processes train together: then they share each candidate's batches.
    """
    sweep = _sweep(conversion, folder)
    home = _redistilled_folder(conversion, folder, sweep.mixers) if "redistilled" in needs else None
    asked: dict[SweptPart, list[str]] = {}
    for part, tasks in (ASKED[need] for need in ASKED if need in needs):
        asked.setdefault(part, []).extend(tasks)
    if asked and rank == 0:
        story = "; ".join(f"{part} alone, on {', '.join(tasks)}" for part, tasks in asked.items())
        say(f"select: each of {conversion.layers} layers {story}")
    sweep.measure(asked, rank, size)
    if home is not None:
        together = conversion.team.size > 1
        for layer in range(conversion.layers) if together else range(rank, conversion.layers, size):
            _redistil(conversion, home, layer)
    return sweep


def _sweep(conversion: Conversion, folder: Path) -> Sweep:
    mixers = conversion.mixers()
    tasks = {task: make_probe(conversion, task) for task in TASKS}
    probes = {part: [tasks[task] for task in names] for part, names in SWEPT.items()}
    size = conversion.recipe.selection.unit_tokens
    decides = {**identity(conversion, mixers), "unit_tokens": size}
    return Sweep(carrier(conversion), mixers, probes, sweep_folder(folder, "sweep", decides), size)


def carrier(conversion: Conversion) -> Any:
    """A hybrid of the teacher's weights that changes nothing, for mixers to be put into."""
    from halobench.surgery import SurgeryPlan, transplant

    plan = SurgeryPlan.for_model(conversion.teacher, keep="all")
    hybrid: Any = transplant(conversion.teacher, plan)
    return hybrid.to(conversion.device).eval().requires_grad_(False)


def identity(conversion: Conversion, mixers: dict[int, Mixer]) -> dict[str, Any]:
    """What decides every measurement."""
    from halobench.provenance import versions

    config = conversion.recipe.selection
    asked = ("length", "haystacks", "items", "kl_sequences", "kl_length")
    return {
        "teacher": conversion.teacher_hash,
        "mixers": weights_hash(mixers),
        "settings": {name: getattr(config, name) for name in asked},
        "data": conversion.recipe.data,
        "seed": conversion.recipe.seed,
        "halobench": versions()["halobench"],
    }


# Candidates trained by KL: kl-ls as in its paper ----------------------------------------------------------------------


def _training(conversion: Conversion) -> LoopConfig:
    """As distillation trains; the candidates are measured on held-out text by the task, and not again by the loop."""
    return replace(conversion.recipe.distil, tokens=conversion.recipe.selection.restore_tokens, held_out_sequences=0)


def _redistilled_folder(conversion: Conversion, folder: Path, mixers: dict[int, Mixer]) -> Path:
    training = _training(conversion)
    if training.tokens < 1:
        raise UserError(
            "candidates cannot be re-distilled with selection.restore_tokens 0; set it (the paper has 200M or more), "
            "or choose by candidates that are not trained"
        )
    return sweep_folder(folder, "redistilled", {**identity(conversion, mixers), "training": to_dict(training)})


def _redistil(conversion: Conversion, home: Path, layer: int) -> None:
    """Trains the student with softmax in `layer` alone, and measures its KL to the teacher on held-out text."""
    path, working = home / f"layer-{layer}.json", home / f"training-{layer}"
    if path.exists():
        shutil.rmtree(working, ignore_errors=True)  # left by a run that was killed right here
        return
    student, result = _trained(conversion, layer, working)
    student.eval()
    probe = make_probe(conversion, TEXT[0])
    values: list[float] = []
    for place in cut(probe, conversion.recipe.selection.unit_tokens):
        unit = probe.unit(place.first, place.stop)
        values += checked(probe.name, unit, student, State("redistilled", layer))["kl"]
    if conversion.team.leads:
        tokens = result.tokens + sum(probe.sizes)
        write_json(path, {"kl": values, "train_kl": result.last_loss, "tokens": tokens, "seconds": result.seconds})
        shutil.rmtree(working, ignore_errors=True)  # a whole model and its optimiser's moments
    conversion.team.wait()


def _trained(conversion: Conversion, layer: int, folder: Path) -> tuple[Any, Any]:
    """The student with softmax in `layer` alone after its training, and the result of that.

    Positions stay as in the teacher.
    """
    import torch

    from halobench.surgery import SurgeryPlan, transplant
    from halobench.surgery.loop import Loop

    recipe, config = conversion.recipe, _training(conversion)
    plan = SurgeryPlan.for_model(
        conversion.teacher, mixer=recipe.mixer, keep=[layer], hype=False, mixer_options=recipe.mixer_options
    )
    student: Any = transplant(conversion.teacher, plan, conversion.mixers(torch.float32))
    student.to(conversion.device).float().train().requires_grad_(True)
    name = f"restore {layer}"
    objective = recipe.distil.objective(student, conversion.teacher, name, kernels=conversion.kernels)
    before = conversion.align()
    loop = Loop(
        folder,
        objective,
        conversion.data(config),
        config,
        first_sequence=before.sequences,
        first_position=before.position,
        device=conversion.device,
        team=conversion.team,
    )
    return student, loop.run()


def _redistilled(
    conversion: Conversion, folder: Path, mixers: dict[int, Mixer]
) -> tuple[list[Changed], int, float] | None:
    """(one entry a layer, tokens trained and measured, seconds of training); None unless every layer is there."""
    if not conversion.recipe.selection.restore_tokens:
        return None
    home = _redistilled_folder(conversion, folder, mixers)
    paths = [home / f"layer-{layer}.json" for layer in range(conversion.layers)]
    if not all(path.exists() for path in paths):
        return None
    found = [read_json(path) for path in paths]
    entries = []
    for layer, answer in enumerate(found):
        samples = {TEXT[0]: {"kl": answer["kl"]}}
        scores = means(samples)
        scores[TEXT[0]]["train_kl"] = answer["train_kl"]
        entries.append(Changed(layer=layer, scores=scores, samples=samples))
    return entries, sum(answer["tokens"] for answer in found), sum(answer["seconds"] for answer in found)
