"""`halobench doctor | recipes | mixers | selectors`: what is here and what there is to choose from."""

from __future__ import annotations


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
    from halobench.units import format_count

    for name in recipe_names():
        recipe = load_recipe(name, [])
        print(f"{name:<20} {recipe.mixer}, {recipe.keep:g} by {recipe.select}, {format_count(recipe.tokens())} tokens")


def mixers() -> None:
    """The token mixers a layer can become."""
    from halobench.mixers import MIXERS

    for name in MIXERS.names():
        mixer = MIXERS.get(name)
        print(f"{name:<15} {mixer.label:<20} {mixer.paper}")


def selectors() -> None:
    """The ways to choose the layers that stay softmax."""
    from halobench.surgery.selection import SELECTORS

    for name in SELECTORS.names():
        selector = SELECTORS.get(name)
        print(f"{name:<14} {selector.label}  {selector.paper}".rstrip())
