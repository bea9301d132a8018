"""Both ends of a decoder's last step: the hidden states after the final norm, and the logits they give.

Losses ask for these apart, so that logits are only ever made a chunk at a time. What a family does to its logits after
the matrix product stands in no common place of its code or config: it is listed here, and `check_head` compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halobench.errors import UserError
from halobench.kernels.chunked_loss import Bend, Head

Operation = Literal["times", "over", "cap"]

CAP: tuple[str, Operation] = ("final_logit_softcapping", "cap")
# What families do to their logits besides the matrix product: model_type -> (field of the text's config, operation).
# Others leave them alone, whatever their config says: mpt has a logit_scale and gemma3 with images a cap, both unused.
AFTER: dict[str, tuple[str, Operation]] = {
    "cohere": ("logit_scale", "times"),
    "cohere2": ("logit_scale", "times"),
    "cohere2_moe": ("logit_scale", "times"),
    "cohere_compass_text": ("logit_scale", "times"),
    "falcon_h1": ("lm_head_multiplier", "times"),
    "hyperclovax": ("logits_scaling", "times"),
    "granite": ("logits_scaling", "over"),
    "granite_swa": ("logits_scaling", "over"),
    "granitemoe": ("logits_scaling", "over"),
    "granitemoe_swa": ("logits_scaling", "over"),
    "granitemoehybrid": ("logits_scaling", "over"),
    "granitemoeshared": ("logits_scaling", "over"),
    "minicpm3": ("logits_scaling", "over"),
    "beam": CAP,
    "gemma2": CAP,
    "gemma3_text": CAP,
    "gemma3n": CAP,
    "gemma3n_text": CAP,
    "gemma4": CAP,
    "gemma4_text": CAP,
    "gemma4_unified": CAP,
    "gemma4_unified_text": CAP,
    "nanochat": CAP,
    "vaultgemma": CAP,
    "recurrent_gemma": ("logits_soft_cap", "cap"),
}

CHECKED_TOKENS = 16
STRETCH = 100.0  # to which `check_head` brings the largest product, where a soft cap cannot go unseen


def final_hidden(model: Any, tokens_BT: Tensor) -> Tensor:
    """Hidden states (B, T, D) after the last norm, without a cache; for any Hugging Face decoder and for hybrids."""
    if hasattr(model, "final_hidden"):
        return model.final_hidden(tokens_BT)
    return model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state


def unembed(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the family's own scaling or soft cap."""
    if hasattr(model, "unembed"):
        return model.unembed(hidden)
    products = model.get_output_embeddings()(hidden)
    match _after(model):
        case "times", value:
            return products * value
        case "over", value:
            return products / value
        case "cap", value:
            return value * torch.tanh(products / value)
    return products


def head(model: Any) -> Head:
    """The unembedding taken apart: matrix, bias and what `unembed` does to their product.

    Raises:
        UserError: the unembedding is no plain linear layer: quantised, adapted, or of another kind.
    """
    source = _source(model)
    last = source.get_output_embeddings()
    plain = isinstance(last, nn.Linear) and type(last).forward is nn.Linear.forward
    if not plain or last.weight.ndim != 2 or not last.weight.is_floating_point():
        kind, dtype = type(last), getattr(getattr(last, "weight", None), "dtype", "no dtype")
        raise UserError(
            f"the unembedding is a {kind.__module__}.{kind.__qualname__} with weights of {dtype}; distillation needs "
            "a plain torch.nn.Linear with floating-point weights: load the model unquantised, and merge its adapters"
        )
    bend = Bend()
    match _after(source):
        case "times", value:
            bend = Bend(scale=value)
        case "over", value:
            bend = Bend(scale=1 / value)
        case "cap", value:
            bend = Bend(cap=value)
    return Head(weight_VD=last.weight, bias_V=last.bias, bend=bend)


def keep_logits(model: Any, count: int) -> dict[str, int]:
    """The argument of forward that limits logits to the last `count` positions, for models that know it."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def head_parameters(model: Any) -> list[nn.Parameter]:
    """The unembedding's parameters that train."""
    return [p for p in model.get_output_embeddings().parameters() if p.requires_grad]


def check_head(model: Any) -> None:
    """Compares the logits that `unembed` and `head` give with the model's own, on a few tokens; before sharding.

    The products are stretched to 100 on both sides, by a hook behind the unembedding, for a soft cap does next to
    nothing to small ones. The model leaves as it came.

    Raises:
        UserError: they differ by more than rounding in the model's dtype, or cannot be computed; or as `head` does.
    """
    family, taken, last = _source(model).config.model_type, head(model), model.get_output_embeddings()
    weight = taken.weight_VD
    ids = torch.arange(3, 3 + CHECKED_TOKENS, device=weight.device)[None] % len(weight)
    with _evaluating(model), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        hidden = final_hidden(model, ids)
        if hidden.dtype != weight.dtype:
            raise UserError(
                f"{family}: its hidden states are {hidden.dtype} and its unembedding {weight.dtype}, which are not "
                "multiplied here; load the model in float32"
            )
        products = taken.products(hidden[0])
        stretch = STRETCH / float(products.abs().max().clamp(min=1e-6))
        hook = last.register_forward_hook(lambda module, inputs, output: output * stretch)
        try:
            wanted = model(input_ids=ids, use_cache=False).logits[0].float()
            found = unembed(model, hidden[0]).float(), taken.bend.logits((products * stretch).float())
        finally:
            hook.remove()
    if not torch.isfinite(wanted).all():
        return  # a broken model and not a wrong head: training names the place
    worst = max(_difference(logits, wanted) for logits in found)
    if not worst <= max(1e-3, 4 * torch.finfo(weight.dtype).eps):
        raise UserError(
            f"{family}: its logits are not those computed here from its hidden states (relative difference "
            f"{worst:.3g}), so losses would be wrong; list what this family does to its logits in AFTER of "
            "surgery/heads.py, or use a teacher of another family"
        )


def _source(model: Any) -> Any:
    """The decoder of a hybrid, or the model itself; some families have a `backbone` of their own."""
    return model.backbone if hasattr(model, "unembed") else model


def _after(source: Any) -> tuple[Operation, float] | None:
    """What follows the product; None is nothing, which a family's config may say too."""
    listed = AFTER.get(source.config.model_type)
    if listed is None:
        return None
    value = getattr(source.config.get_text_config(decoder=True), listed[0])
    return None if value is None else (listed[1], value)


def _difference(logits: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of what is wanted; infinite where even shapes differ."""
    if logits.shape != wanted.shape:
        return float("inf")
    return float((logits - wanted).norm() / wanted.norm().clamp(min=1e-6))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
