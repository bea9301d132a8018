"""Measures the surgery room on this machine: python benchmarks/surgery.py PART.. [-o FOLDER]

Each part (mixers, transplant, alignment) writes benchmarks/surgery/PART.json, or FOLDER/PART.json, with versions and
machine. Only ratios within a record mean anything; machines differ, and so do their days.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halobench.benchmarking import in_turns, plain, recorded
from halobench.files import write_json

HERE = Path(__file__).resolve().parent / "surgery"
SHAPES = ((4, 32), (8, 64))  # heads x size


def mixers(tokens: int = 4096) -> dict[str, Any]:
    """Every mixer's recurrence and gates in chunks against its definition token by token, forward, in turns."""
    rows = [row for heads, size in SHAPES for row in _forms(heads, size, tokens)]
    return {"tokens": tokens, "dtype": "float32", "rows": rows}


def _forms(heads: int, size: int, tokens: int) -> list[dict[str, Any]]:
    from halobench.mixers import MIXERS
    from halobench.mixers.conformance import Subject, example_view
    from halobench.mixers.linear import LinearMixer

    wide = heads * size
    weights = {name: torch.randn(wide, wide) / wide**0.5 for name in ("q_weight", "k_weight", "v_weight", "o_weight")}
    bare = {"q_bias": None, "k_bias": None, "v_bias": None, "o_bias": None, "q_norm": None, "k_norm": None}
    view = example_view(
        torch.float32, hidden_size=wide, num_heads=heads, num_kv_heads=heads, head_dim=size, rotary_dim=size,
        scaling=size**-0.5, **weights, **bare,
    )  # fmt: skip
    rows = []
    for name in MIXERS.names():
        case = Subject(mixer=MIXERS.get(name), options={}, view=view)
        mixer = case.build()
        if not isinstance(mixer, LinearMixer):
            continue
        q, k, v = (torch.randn(1, tokens, heads, size) for _ in range(3))
        inputs = (q, k, v, case.noise(1, tokens), None, None)

        def run(backend: str, mixer: Any = mixer, inputs: Any = inputs) -> None:
            mixer.backend = backend
            mixer.recur(*inputs)

        forms = {"naive": lambda: run("naive"), "torch": lambda: run("torch")}
        found = plain(in_turns(forms, torch.device("cpu"), seconds=6, rounds=7))
        naive, chunked = found["naive"]["median"], found["torch"]["median"]
        rows.append({"mixer": name, "heads": heads, "head_dim": size, **found, "naive over torch": naive / chunked})
        print(f"{name:>16} {heads} x {size}: naive {naive:.3f} s, in chunks {chunked:.4f} s, {naive / chunked:.0f}x")
    return rows


def transplant() -> dict[str, Any]:
    """Time and memory of turning a model of the 1.7B shape, random bf16 weights, into its released hybrid."""
    from transformers import AutoModelForCausalLM

    from halobench.planning import teacher_config
    from halobench.surgery import SurgeryPlan
    from halobench.surgery import transplant as operate

    config = teacher_config("qwen3-1.7b")
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = time.perf_counter()
    student = operate(teacher, SurgeryPlan.for_model(teacher, keep=[2, 3, 6, 8, 9, 21, 25]))
    seconds = time.perf_counter() - start
    peak = _resident("VmHWM") - before
    print(f"{seconds:.1f} s, {peak / size:.2f} of the teacher's {size / 1e9:.2f} GB at the peak beyond it")
    return {
        "teacher_bytes": size,
        "student_bytes": sum(p.numel() * p.element_size() for p in student.parameters()),
        "seconds": seconds,
        "peak_bytes_beyond_teacher": peak,
        "peak over teacher": peak / size,
    }


def alignment(tokens: int = 60_000) -> dict[str, Any]:
    """Relative error of every mixer after the same alignment of the embedded teacher, layer by layer."""
    import json
    import tempfile

    from halobench.cli import app
    from halobench.mixers import MIXERS

    rows = []
    with tempfile.TemporaryDirectory() as place, torch.enable_grad():
        for name in [name for name in MIXERS.built_in() if name not in ("softmax", "sliding_window")]:
            out = Path(place) / name
            settings = ["--set", f"align.tokens={tokens}"]
            app(
                ["convert", "tiny", "--mixer", name, "--until", "align", "-o", str(out), *settings],
                standalone_mode=False,
            )
            stage = json.loads((out / "align" / "stage.json").read_text())
            errors = list(stage["details"]["relative_error"].values())
            rows.append(
                {"mixer": name, "tokens": stage["tokens"], "seconds": stage["seconds"], "relative_error": errors}
            )
            print(f"{name:>16}: mean {sum(errors) / len(errors):.3f} in {stage['seconds']:.0f} s")
    return {"teacher": "tiny", "recipe": "halo-tiny", "seeds": 1, "rows": rows}


def _resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"mixers": mixers, "transplant": transplant, "alignment": alignment}


def main(given: list[str] | None = None) -> None:
    """Measures the parts asked for, prints, and writes their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--tokens", type=int, help="of mixers: 4096; of alignment, each mixer: 60000")
    parser.add_argument("-o", "--output", type=Path, default=HERE)
    asked = parser.parse_args(given)
    asked.output.mkdir(exist_ok=True)
    for name in asked.parts:
        with torch.no_grad():
            sized = asked.tokens is not None and name != "transplant"
            result = PARTS[name](asked.tokens) if sized else PARTS[name]()
        write_json(asked.output / f"{name}.json", recorded(PARTS[name].__doc__, result))


if __name__ == "__main__":
    main()
