"""Layer selection: which layers stay softmax. One table of selectors, one form of evidence for all."""

from typing import Any

from halobench.config import from_dict
from halobench.registry import Registry
from halobench.surgery.selection.contract import Prices, Question, Ranking, Selector

SELECTORS: Registry[type[Selector]] = Registry(
    "selector",
    {
        "halo": "halobench.surgery.selection.halo:Halo",
        "jet-nemotron": "halobench.surgery.selection.halo:RecallDrop",
        "nll": "halobench.surgery.selection.likelihood:AnswerLikelihood",
        "kl-drop": "halobench.surgery.selection.likelihood:KlDrop",
        "kl-ls": "halobench.surgery.selection.kl_ls:KlRestore",
        "smart": "halobench.surgery.selection.smart:Smart",
        "lighttransfer": "halobench.surgery.selection.lazy:LightTransfer",
        "flashmorph": "halobench.surgery.selection.flashmorph:FlashMorph",
        "postnas": "halobench.surgery.selection.postnas:PostNas",
        "joint": "halobench.surgery.selection.joint:Joint",
        "even": "halobench.surgery.selection.fixed:Even",
        "latter-half": "halobench.surgery.selection.fixed:LatterHalf",
        "first-last": "halobench.surgery.selection.fixed:FirstLast",
        "random": "halobench.surgery.selection.fixed:Random",
        "given": "halobench.surgery.selection.fixed:Given",
    },
    group="halobench.selectors",
)


def make_selector(name: str, options: dict[str, Any] | None = None) -> Selector:
    """The selector called `name` with these options; a wrong name or option is an error that names the one meant."""
    return from_dict(SELECTORS.get(name), options or {}, f"the options of {name}")


__all__ = ["SELECTORS", "Prices", "Question", "Ranking", "Selector", "make_selector"]
