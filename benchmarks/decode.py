"""Measures a decode step behind a long context, teacher against hybrid: python benchmarks/decode.py [-o RECORD.json]

Both run on the decode engine and as Hugging Face's generate() runs them (the model's forward on its own cache), in
turns in one process. Nothing is prefilled: keys and values are random numbers, on which speed does not depend. A time
is the median over the rounds; the floor is the bytes a step must read at the bandwidth measured here. By default the
embedded teacher and a hybrid made from it with untrained mixers on a CPU, and on a GPU Qwen3-1.7B's shape and
HypeNet-2B's with random weights. "of the bytes" is the speed-up over the ratio of key/value bytes: 0.7 is asked for on
a CPU at 64K.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from halobench.benchmarking import in_turns, open_pair, parse_pair, plain, ratio, run_script, script_parser
from halobench.errors import is_out_of_memory
from halobench.floors import sizes_of, theory_of
from halobench.progress import say
from halobench.surgery.engine import DecodeEngine
from halobench.tasks.machine import measure_machine
from halobench.units import format_length, parse_length, parse_lengths

SPARE = 8  # steps that are tried before any is timed


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is left out depends on the device."""
    parser = script_parser(__doc__)
    parser.add_argument("--kernels", default="auto", choices=("auto", "torch", "triton"))
    parser.add_argument("--contexts", help="tokens: 4k to 64k on a CPU, 4k to 1m on a GPU")
    parser.add_argument("--generate-up-to", default="128k", help="longest context of Hugging Face's own path")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a context, after which no further round begins")
    found = parse_pair(parser, given)
    found.contexts = found.contexts or ("4k,16k,64k" if found.device == "cpu" else "4k,32k,128k,512k,1m")
    return found


def engine_step(model: Any, context: int, given: argparse.Namespace) -> tuple[Callable[[], object], DecodeEngine]:
    """A step of the engine behind `context` random tokens."""
    engine = DecodeEngine(model, room=context + given.rounds + SPARE, kernels=given.kernels)
    token = torch.zeros(given.batch, 1, dtype=torch.long, device=model.device)
    engine.prefill(token)
    for layer in engine.cache.layers:
        layer.length = context
        if layer.is_initialized:
            layer.held = min(context, layer.keys.shape[2])
            layer.keys.normal_(), layer.values.normal_()
    engine.prepare(token)
    return lambda: engine.step(engine.token), engine


def generate_step(model: Any, context: int, given: argparse.Namespace) -> Callable[[], object]:
    """A step as generate() makes it behind `context` random tokens: forward, and the most likely token to the host."""
    token = torch.zeros(given.batch, 1, dtype=torch.long, device=model.device)
    hybrid = hasattr(model, "new_cache")
    cache = model.new_cache(room=context + given.rounds + SPARE) if hybrid else DynamicCache(config=model.config)
    model(token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if not hybrid:
            layer.keys, layer.values = (
                torch.randn(*x.shape[:2], context, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (layer.keys, layer.values)
            )
            continue
        layer.length = context
        if layer.is_initialized:
            layer.held = min(context, layer.keys.shape[2])
            layer.keys.normal_(), layer.values.normal_()
    mask = torch.ones(given.batch, context, dtype=torch.long, device=model.device)

    def step() -> object:
        nonlocal token, mask
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        places = (mask.cumsum(-1) - 1)[:, -1:]
        output = model(token, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        return token.tolist()

    return step


def row(models: dict[str, Any], context: int, given: argparse.Namespace, machine: Any) -> dict[str, Any]:
    """All forms at one context."""
    device, failed = torch.device(given.device), {}
    steps: dict[str, Callable[[], object]] = {}
    engines: dict[str, DecodeEngine] = {}
    made: dict[str, Callable[[], Callable[[], object]]] = {}
    for name, model in reversed(models.items()):  # the smaller first: it is measured where the other finds no memory

        def by_engine(name: str = name, model: Any = model) -> Callable[[], object]:
            step, engines[name] = engine_step(model, context, given)
            return step

        made[name] = by_engine
    if context <= parse_length(given.generate_up_to):
        made |= {f"{n}, generate": partial(generate_step, m, context, given) for n, m in reversed(models.items())}
    for name, make in made.items():
        try:
            steps[name] = make()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failed[name] = "out of memory"
    found = in_turns(steps, device, seconds=given.seconds, rounds=given.rounds)
    theory = {n: theory_of(sizes_of(m), machine, context, given.batch, 1) for n, m in models.items()}
    faster, fewer = ratio(found.get("teacher"), found.get("hybrid")), None
    if theory["hybrid"].kv_bytes:
        fewer = theory["teacher"].kv_bytes / theory["hybrid"].kv_bytes
    floors = {name: t.tpot_floor_ms / 1000 for name, t in theory.items()}
    share = None if faster is None or fewer is None else faster / fewer
    told = [f"{name} {t.error or f'{1000 * t.median:.2f}'}" for name, t in found.items()]
    told.append(f"floors {' '.join(f'{1000 * floor:.2f}' for floor in floors.values())} ms")
    told += [] if faster is None else [f"{faster:.2f}x"]
    told += [] if share is None else [f"{share:.2f} of the bytes"]
    say(f"{format_length(context):>6}  {'  '.join(told)}")
    return {
        "context": context, "seconds": plain(found), "failed": failed, "floor": floors,
        "kv_bytes": {name: t.kv_bytes for name, t in theory.items()}, "teacher over hybrid": faster,
        "of the bytes": share, "backends": {name: engine.backends for name, engine in engines.items()},
    }  # fmt: skip


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """A row for each context."""
    device = torch.device(given.device)
    teacher, hybrid = open_pair(given)
    models = {"teacher": teacher, "hybrid": hybrid}
    machine, rows = measure_machine(device, teacher.dtype), []
    with torch.inference_mode():
        for context in sorted(parse_lengths(given.contexts)):
            rows.append(row(models, context, given, machine))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {
        "device": given.device, "teacher": given.teacher, "hybrid": given.hybrid, "dtype": str(teacher.dtype)[6:],
        "keep": sum(part.name == "softmax" for part in hybrid.mixer_modules().values()), "batch": given.batch,
        "layers": teacher.config.num_hidden_layers, "kernels": given.kernels, "threads": torch.get_num_threads(),
        "machine": asdict(machine), "rows": rows,
    }  # fmt: skip


def main(given: list[str] | None = None) -> None:
    """Measures, prints, and writes the record where one is asked for."""
    run_script(__doc__, arguments(given), measure)


if __name__ == "__main__":
    main()
