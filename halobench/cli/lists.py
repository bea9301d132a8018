"""`halobench doctor | recipes | mixers | selectors`: what is here and what there is to choose from."""

from __future__ import annotations

from typing import Any


def doctor() -> None:
    """Versions, hardware and what is missing for the fast paths."""
    import torch

    from halobench.provenance import environment

    found = environment()
    for name, version in found["versions"].items():
        print(f"{name:>24}  {version}")
    for name, value in found["hardware"].items():
        print(f"{name:>24}  {value}")
    gpu = torch.cuda.is_available()
    print(f"{'device':>24}  {'cuda' if gpu else 'cpu: torch sees no GPU; tiny models run well, a 1.7B model does not'}")
    from halobench.kernels.backend import explain

    like = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda" if gpu else "cpu")
    for operator in ("scalar_decay", "vector_decay", "delta_rule", "dplr"):
        name, _, reason = explain(operator, like).partition(": ")
        print(f"{name:>24}  {reason}")


def recipes() -> None:
    """The recipes that ship with the package."""
    from halobench.recipe import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name, [])
        print(f"{name:<26}{recipe.summary}")
        print(f"{'':<26}{recipe.tokens()}")


def mixers() -> None:
    """The token mixers a layer can become."""
    from halobench.mixers import MIXERS

    for name in MIXERS.names():
        mixer = MIXERS.get(name)
        print(f"{name:<15} {mixer.label:<20} {mixer.paper}")


def selectors() -> None:
    """The ways to choose the layers that stay softmax: what each reads, its paper and its options."""
    import json
    from dataclasses import fields

    from halobench.surgery.selection import SELECTORS, make_selector

    for name in SELECTORS.names():
        selector: Any = make_selector(name)
        needs = ", ".join(sorted(selector.needs)) or "nothing"
        print(f"{name:<15}{selector.label:<16}needs {needs:<12}  {selector.paper}".rstrip())
        for field in fields(selector):
            default = json.dumps(getattr(selector, field.name)).strip('"')  # as one would write it
            print(f"{'':<15}--option {name}.{field.name}={default}")
