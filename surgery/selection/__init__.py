"""Layer selection: which layers stay softmax. One table of selectors, one form of evidence for all."""

from halobench.registry import Registry
from halobench.surgery.selection.contract import Question, Ranking, Selector

SELECTORS: Registry[type[Selector]] = Registry(
    "selector",
    {
        "halo": "halobench.surgery.selection.halo:Halo",
        "jet-nemotron": "halobench.surgery.selection.halo:RecallDrop",
        "kl-ls": "halobench.surgery.selection.kl_ls:KlRestore",
        "even": "halobench.surgery.selection.fixed:Even",
        "random": "halobench.surgery.selection.fixed:Random",
        "given": "halobench.surgery.selection.fixed:Given",
    },
    group="halobench.selectors",
)

__all__ = ["SELECTORS", "Question", "Ranking", "Selector"]
