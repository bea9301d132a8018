"""Measures training, tokens a second of stage 1 and stage 2: python benchmarks/training.py [-o RECORD.json]

A step is all that the loop does for one: the teacher's forward, the student's forward and backward (in bf16 by
autocast), clipping and the optimizer. Stage 1 (align) trains a mixer beside every attention layer; stage 2 (distil)
the whole hybrid by KL to the teacher. On a GPU the forms that `auto` picks and those of torch take turns in one
process. By default the embedded teacher on a CPU, and on a GPU Qwen3-1.7B's shape with random weights: speed does not
depend on weights. On two idle cores it takes two minutes; records are committed as benchmarks/training-cpu.json and
benchmarks/training-cuda.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from halobench.benchmarking import in_turns, opened, plain, run_script, script_parser
from halobench.mixers.forms import ask_for, used
from halobench.progress import say
from halobench.surgery import SurgeryPlan, transplant
from halobench.surgery.objective import Objective
from halobench.surgery.optim import OptimConfig, Optimizer
from halobench.surgery.stages.align import Alignment
from halobench.surgery.stages.distil import Distillation
from halobench.surgery.transplant import build_mixers
from halobench.tasks.memory import peak, release, reset_peak


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is left out depends on the device."""
    parser = script_parser(__doc__)
    parser.add_argument("--teacher", help="a model, or preset:SHAPE; tiny on a CPU, preset:qwen3-1.7b on a GPU")
    parser.add_argument("--mixer", default="lightning")
    parser.add_argument("--keep", type=int, help="softmax layers: 2 on a CPU, 7 on a GPU")
    parser.add_argument("--length", type=int, help="tokens of a sequence: 512 on a CPU, 4096 on a GPU")
    parser.add_argument("--batch", type=int, help="sequences of a step: 4 on a CPU, 2 on a GPU")
    parser.add_argument("--stages", default="align,distil")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=40.0, help="of a stage, after which no further round begins")
    found = parser.parse_args(given)
    cpu = found.device == "cpu"
    found.teacher = found.teacher or ("tiny" if cpu else "preset:qwen3-1.7b")
    found.keep, found.length = found.keep or (2 if cpu else 7), found.length or (512 if cpu else 4096)
    found.batch = found.batch or (4 if cpu else 2)
    return found


def objective_of(stage: str, teacher: Any, given: argparse.Namespace, device: torch.device) -> Objective:
    """The stage's objective, whose module trains in fp32."""
    if stage == "align":
        mixers = build_mixers(teacher, given.mixer)
        for mixer in mixers.values():
            mixer.to(device).float().train()
        return Alignment(teacher, mixers, relative=True)
    student: Any = transplant(teacher, SurgeryPlan.for_model(teacher, mixer=given.mixer, keep=given.keep))
    return Distillation(student.to(device).float().train().requires_grad_(True), teacher)


def stepping(
    objective: Objective, optimizer: Optimizer, tokens_BT: torch.Tensor, form: str
) -> Callable[[], dict[str, str]]:
    """A call that takes one training step with mixers and loss in `form`, and gives the forms that mixers ran in."""
    parameters, weights = list(objective.module.parameters()), torch.ones_like(tokens_BT, dtype=torch.float32)

    def step() -> dict[str, str]:
        ask_for(objective.module, form)
        if isinstance(objective, Distillation):
            objective.backend = form
        with torch.autocast(tokens_BT.device.type, torch.bfloat16):
            total, count = objective.loss(tokens_BT, weights)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(1.0)
        return used(objective.module)

    return step


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """A row for each stage."""
    device = torch.device(given.device)
    teacher = opened(given.teacher, device).requires_grad_(False)
    tokens = torch.randint(0, teacher.config.vocab_size, (given.batch, given.length + 1), device=device)
    rows = []
    for stage in given.stages.split(","):
        torch.manual_seed(0)  # of the new weights
        objective = objective_of(stage, teacher, given, device)
        names = ("auto",) if device.type == "cpu" else ("auto", "torch")
        backends: dict[str, dict[str, str]] = {}

        def run(form: str, step: Callable[[], dict[str, str]], ran: dict[str, dict[str, str]] = backends) -> None:
            ran[form] = step()

        optimizer = Optimizer(objective.module.named_parameters(), OptimConfig(rate=1e-4), objective.module)
        forms = {form: partial(run, form, stepping(objective, optimizer, tokens, form)) for form in names}
        reset_peak(device)
        found = in_turns(forms, device, seconds=given.seconds, rounds=given.rounds)
        of_step = given.batch * given.length
        speeds = {n: None if t.median is None else of_step / t.median for n, t in found.items()}
        trains = sum(p.numel() for p in objective.module.parameters() if p.requires_grad)
        rows.append(
            {
                "stage": stage, "tokens a step": of_step, "tokens a second": speeds, "seconds": plain(found),
                "parameters": trains, "backends": backends, "peak_bytes": peak(device),
            }
        )  # fmt: skip
        told = "  ".join(f"{n} {found[n].error or f'{v:,.0f} tokens/s'}" for n, v in speeds.items())
        say(f"{stage:>8}  {trains:,} parameters train, {of_step:,} tokens a step  {told}")
        del objective, optimizer, forms
        release()
    return {
        "device": given.device, "teacher": given.teacher, "mixer": given.mixer, "keep": given.keep,
        "layers": teacher.config.num_hidden_layers, "length": given.length, "batch": given.batch, "rows": rows,
    }  # fmt: skip


def main(given: list[str] | None = None) -> None:
    """Measures, prints, and writes the record where one is asked for."""
    run_script(__doc__, arguments(given), measure)


if __name__ == "__main__":
    main()
