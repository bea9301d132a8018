"""`halobench recipes | mixers | selectors`: what there is to choose from."""

from __future__ import annotations

from typing import Any


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
