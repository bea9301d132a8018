"""The laws that every mixer obeys, as one import for whoever writes one.

    import pytest
    from halobench.mixers.conformance import LAWS, check_law

    @pytest.mark.parametrize("law", LAWS)
    def test_my_mixer(law):
        check_law(law, MyMixer)

A law builds the mixer from small made-up attention blocks (EXAMPLES) in float64; BrokenLawError says what differed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halobench.errors import HalobenchError, UserError, unknown_name
from halobench.mixers.cache import HybridCache
from halobench.mixers.contract import Mixer, MixerContext, build_mixer
from halobench.mixers.softmax import SoftmaxMixer
from halobench.mixers.view import AttentionView, NormView

TOKENS = 37  # prime, so that no chunk size divides it
LONG = 1024  # tokens at which bf16 may have drifted
TOLERANCE = 1e-7  # of float64 results; wide enough for tables that are fp32 on purpose


class BrokenLawError(HalobenchError):
    """A mixer does not obey a law."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A mixer under test: its class, options, and the attention block it is made from."""

    mixer: type[Mixer]
    options: dict[str, Any]
    view: AttentionView

    def build(self, view: AttentionView | None = None) -> Mixer:
        """The mixer, always with the same random weights."""
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return build_mixer(self.mixer, view or self.view, self.options).eval()

    def noise(self, batch: int, tokens: int) -> Tensor:
        """Hidden states of RMS 1, always the same, in the view's dtype."""
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(batch, tokens, self.view.hidden_size, dtype=torch.float64, generator=generator)
        return hidden.to(self.view.q_weight.dtype)

    def run(self, mixer: Mixer, hidden: Tensor, mask: Tensor | None = None, cache: HybridCache | None = None) -> Tensor:
        """The mixer on a batch that may continue a cache; `mask` covers past and new tokens."""
        past, tokens = (0 if cache is None else cache.get_seq_length()), hidden.shape[1]
        positions = torch.arange(past, past + tokens, device=hidden.device)[None]
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        context = MixerContext(
            positions_BT=positions,
            padding_mask_BT=None if mask is None else mask[:, past:],
            key_padding_mask_BS=mask,
            cache=cache,
        )
        return mixer(hidden, position_embeddings=rotary_tables(positions, self.view), context=context)

    def in_pieces(
        self, mixer: Mixer, hidden: Tensor, bounds: list[int], mask: Tensor | None = None
    ) -> tuple[Tensor, HybridCache]:
        """The mixer on one piece after another, and the cache at the end."""
        cache = HybridCache(self.view.layer_index + 1)
        edges = list(zip(bounds, bounds[1:], strict=False))
        parts = [self.run(mixer, hidden[:, a:b], None if mask is None else mask[:, :b], cache) for a, b in edges]
        return torch.cat(parts, dim=1), cache


def rotary_tables(positions_BT: Tensor, view: AttentionView) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) as a decoder with this attention hands them to its layers."""
    if not view.rope:
        return None
    powers = torch.arange(0, view.rotary_dim, 2, dtype=torch.float64, device=positions_BT.device) / view.rotary_dim
    angles = positions_BT[..., None] * 1e4**-powers
    angles = angles.repeat_interleave(2, -1) if view.rope_table_interleaved else angles.repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def example_view(dtype: torch.dtype = torch.float64, **changes: Any) -> AttentionView:
    """A small attention block with random weights: 4 heads of 12 on 2 key/value heads, norms and biases.

    Args:
        changes: fields of AttentionView to set otherwise.
    """
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int, std: float = 0.2, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(*shape, dtype=torch.float64, generator=generator)).to(dtype)

    heads, kv_heads, size, hidden = 4, 2, 12, 40
    fields: dict[str, Any] = {
        "layer_index": 1,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "q_weight": random(heads * size, hidden),
        "k_weight": random(kv_heads * size, hidden),
        "v_weight": random(kv_heads * size, hidden),
        "o_weight": random(hidden, heads * size),
        "q_bias": random(heads * size),
        "k_bias": random(kv_heads * size),
        "v_bias": random(kv_heads * size),
        "o_bias": random(hidden),
        "q_norm": NormView(weight=random(size, mean=1.0), eps=1e-6),
        "k_norm": NormView(weight=random(size, mean=1.0), eps=1e-6),
        "norm_eps": 1e-6,
        "scaling": size**-0.5,
        "rope": True,
        "rotary_dim": size,
        "init_std": 0.1,
    }
    return AttentionView(**{**fields, **changes})


def _per_head(heads: int, size: int) -> NormView:
    weight = 1 + 0.2 * torch.randn(heads, size, dtype=torch.float64, generator=torch.Generator().manual_seed(heads))
    return NormView(weight=weight, bias=0.1 * weight, eps=1e-5, centred=True)


# Attention blocks that differ where families do.
EXAMPLES: dict[str, Callable[[], AttentionView]] = {
    "norms, biases, grouped heads": example_view,
    "neighbouring pairs rotated, a centred norm of its own for every head": lambda: example_view(
        rope_interleaved=True,
        rope_table_interleaved=True,
        rotary_dim=8,
        q_norm=_per_head(4, 12),
        k_norm=_per_head(2, 12),
    ),
    "no rotation, no norms, sinks, a soft cap": lambda: example_view(
        rope=False, rotary_dim=0, q_norm=None, k_norm=None, soft_cap=3.0, sinks=torch.arange(4.0, dtype=torch.float64)
    ),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenLawError(message)


def _equal(got: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    _require(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    got, expected = got.detach(), expected.detach()
    _require(bool(got.isfinite().all()), f"{what}: not all numbers are finite")
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)) if got.numel() else 0.0
    _require(error <= tolerance, f"{what}: differs by {error:.1e} of the largest number, allowed {tolerance:.0e}")


def _padded(side: str, real: int) -> tuple[Tensor, slice]:
    """A mask of two rows, the second of `real` tokens padded on one side, and where they are."""
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    where = slice(TOKENS - real, TOKENS) if side == "left" else slice(0, real)
    mask[1] = False
    mask[1, where] = True
    return mask, where


@contextmanager
def _form(mixer: Mixer, backend: str) -> Iterator[Mixer]:
    before = mixer.backend
    mixer.backend = backend
    try:
        yield mixer
    finally:
        mixer.backend = before


def law_forms_agree(subject: Subject) -> None:
    """Every form of the recurrence gives the outputs and gradients of the definition."""
    mixer, results = subject.build(), {}
    for backend in mixer.backends:
        hidden = subject.noise(2, TOKENS).requires_grad_()
        with _form(mixer, backend):
            try:
                output = subject.run(mixer, hidden)
            except UserError:
                continue  # says itself what it lacks on this machine
            (gradient,) = torch.autograd.grad(output.square().sum(), hidden)
        results[backend] = (output.detach(), gradient)
    _require(bool(results), f"none of the forms {', '.join(mixer.backends)} runs on this machine")
    first, *others = results
    for other in others:
        _equal(results[other][0], results[first][0], f"output of {other} against {first}")
        _equal(results[other][1], results[first][1], f"gradient of {other} against {first}")


def law_token_by_token(subject: Subject) -> None:
    """Token by token gives what all at once gives."""
    mixer, hidden = subject.build(), subject.noise(2, TOKENS)
    steps, _ = subject.in_pieces(mixer, hidden, list(range(TOKENS + 1)))
    _equal(steps, subject.run(mixer, hidden), "token by token")


def law_any_cut(subject: Subject) -> None:
    """The state is handed over right wherever the text is cut."""
    mixer, hidden = subject.build(), subject.noise(2, TOKENS)
    whole = subject.run(mixer, hidden)
    for cuts in ([1], [16], [TOKENS - 1], [5, 6, 30]):
        parts, _ = subject.in_pieces(mixer, hidden, [0, *cuts, TOKENS])
        _equal(parts, whole, f"cut at {cuts}")


def law_padding(subject: Subject) -> None:
    """Padding on either side, also across calls, leaves the real tokens as they are alone."""
    mixer, hidden = subject.build(), subject.noise(2, TOKENS)
    for side in ("left", "right"):
        mask, real = _padded(side, 21)
        alone = subject.run(mixer, hidden[1:, real])
        _equal(subject.run(mixer, hidden, mask)[1:, real], alone, f"padding on the {side}")
        parts, _ = subject.in_pieces(mixer, hidden, [0, 3, 18, TOKENS], mask)
        _equal(parts[1:, real], alone, f"padding on the {side}, in pieces")
        junk = hidden.masked_fill(~mask[..., None], 50.0)
        _equal(subject.run(mixer, junk, mask)[1:, real], alone, f"other numbers under the padding on the {side}")
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 20:30] = False
    cut, _ = subject.in_pieces(mixer, hidden, [0, 30, 31, TOKENS], mask)
    whole = subject.run(mixer, torch.cat((hidden[1:, :20], hidden[1:, 30:]), dim=1))
    _equal(cut[1:, 30:], whole[:, 20:], "text that goes on after padding on the right")


def law_neighbours(subject: Subject) -> None:
    """A sequence's answer does not depend on its neighbours in the batch."""
    mixer, hidden = subject.build(), subject.noise(3, TOKENS)
    before = subject.run(mixer, hidden)[0]
    hidden[1:] *= 100
    _equal(subject.run(mixer, hidden)[0], before, "a row beside larger neighbours", 1e-12)


def law_reordering(subject: Subject) -> None:
    """The state follows its sequence when a batch is reordered, repeated or cloned, as beam search does."""
    mixer, hidden = subject.build(), subject.noise(3, TOKENS)
    whole = subject.run(mixer, hidden)
    _, cache = subject.in_pieces(mixer, hidden, [0, 20])
    kept = cache.clone()
    cache.reorder_cache(torch.LongTensor([2, 0, 0]))
    got = subject.run(mixer, hidden[[2, 0, 0], 20:], cache=cache)
    _equal(got, whole[[2, 0, 0], 20:], "after reordering")
    kept.batch_repeat_interleave(2)
    got = subject.run(mixer, hidden[:, 20:].repeat_interleave(2, dim=0), cache=kept)
    _equal(got, whole[:, 20:].repeat_interleave(2, dim=0), "a clone, repeated")


def law_gradients(subject: Subject) -> None:
    """Every weight gets a finite gradient, and padding gets none."""
    mixer, hidden = subject.build(), subject.noise(2, TOKENS).requires_grad_()
    mask, _ = _padded("left", 21)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        target = torch.randn_like(hidden)
    ((subject.run(mixer, hidden, mask) - target)[mask] ** 2).sum().backward()
    for name, parameter in mixer.named_parameters():
        gradient = parameter.grad
        _require(gradient is not None, f"{name} gets no gradient")
        assert gradient is not None
        _require(bool(gradient.isfinite().all()), f"{name}: its gradient is not finite")
        # A bias of the keys moves all scores of a query alike: under plain softmax its gradient is zero.
        _require(bool((gradient != 0).any()) or name == "k_proj.bias", f"{name}: its gradient is all zeros")
    assert hidden.grad is not None
    _require(bool((hidden.grad[~mask] == 0).all()), "a padded token gets a gradient")


def law_bfloat16(subject: Subject) -> None:
    """bf16 drifts no more at the end of a long text than at its start."""
    exact = subject.build(_as(subject.view, torch.float32))
    low = copy.deepcopy(exact).bfloat16()
    hidden = subject.noise(1, LONG).to(torch.bfloat16)
    with torch.no_grad():
        expected, got = subject.run(exact, hidden.float()), subject.run(low, hidden).float()
    drift = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).squeeze(0)
    _require(bool(drift.isfinite().all()), "bf16 gives numbers that are not finite")
    quarter = LONG // 4
    start, end = float(drift[:quarter].mean()), float(drift[-quarter:].mean())
    _require(start < 0.1, f"bf16 is off by {start:.2f} of the output's size from the start, allowed 0.1")
    _require(
        end < max(0.05, 2 * start), f"bf16 is off by {end:.3f} at the end of {LONG} tokens, {start:.3f} at the start"
    )


def law_save_and_load(subject: Subject) -> None:
    """What state_dict holds, put into a mixer built without weights (as from_pretrained does), answers the same."""
    mixer, hidden = subject.build(), subject.noise(1, TOKENS)
    expected = subject.run(mixer, hidden)
    saved = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    with torch.device("meta"):
        empty = subject.build(_as(subject.view, device="meta"))
    missing, unexpected = empty.load_state_dict(saved, strict=False, assign=True)
    _require(not missing and not unexpected, f"lacks {missing}, has too much {unexpected}")
    left = [name for name, buffer in empty.named_buffers() if buffer.device.type == "meta"]
    _require(not left, f"buffers {left} are not saved: make them on first use, or persistent")
    _equal(subject.run(empty.eval(), hidden), expected, "after saving and loading", 0.0)


def law_state_size(subject: Subject) -> None:
    """The cache holds what `state_bytes` declares, at every length."""
    mixer = subject.build()
    for tokens in (5, TOKENS):
        _, cache = subject.in_pieces(mixer, subject.noise(2, tokens), [0, tokens])
        size = subject.view.q_weight.element_size()
        declared, held = mixer.state_bytes(2, tokens, bytes_per_element=size), cache.nbytes(used=True)
        _require(declared == held, f"declares {declared} bytes after {tokens} tokens, the cache holds {held}")


def law_copies(subject: Subject) -> None:
    """The teacher's weights are copied and not shared, and every parameter is counted once as copied or new."""
    view = replace(subject.view, q_weight=subject.view.q_weight.clone())
    before = {name: value.clone() for name, value in vars(view).items() if isinstance(value, Tensor)}
    mixer = subject.build(view)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(7)
    changed = [name for name, value in before.items() if not torch.equal(value, getattr(view, name))]
    _require(not changed, f"shares {', '.join(changed)} with the teacher")
    copied, fresh = mixer.copied_parameters(), mixer.new_parameters()
    together = sorted(id(parameter) for parameter in (*copied, *fresh))
    _require(together == sorted(id(p) for p in mixer.parameters()), "parameters are not each copied or new, once")
    _require(sum(p.numel() for p in copied) > 0, "nothing is copied from the teacher")


def law_start(subject: Subject) -> None:
    """At the start the mixer answers with finite numbers at the scale of the attention it replaces."""
    attention = build_mixer(SoftmaxMixer, subject.view, {"rope": True, "output_gate": False}).eval()
    mixer, hidden = subject.build(), subject.noise(2, TOKENS)
    with torch.no_grad():
        ratio = float(subject.run(mixer, hidden).norm() / subject.run(attention, hidden).norm())
    _require(0.1 < ratio < 10, f"starts at {ratio:.2g} times the size of the teacher's attention, allowed 0.1 to 10")


LAWS: dict[str, Callable[[Subject], None]] = {
    name.removeprefix("law_").replace("_", " "): law for name, law in list(globals().items()) if name.startswith("law_")
}


def check_law(law: str, mixer: type[Mixer], options: dict[str, Any] | None = None) -> None:
    """Raises BrokenLawError unless `mixer` with `options` obeys the law on every example of attention.

    Args:
        law: a key of LAWS.
    """
    if law not in LAWS:
        raise unknown_name("law", law, list(LAWS))
    for title, make in EXAMPLES.items():
        try:
            LAWS[law](Subject(mixer=mixer, options=options or {}, view=make()))
        except BrokenLawError as error:
            raise BrokenLawError(
                f"{mixer.name} breaks the law {law!r} ({LAWS[law].__doc__}) on {title}: {error}"
            ) from error


def check_mixer(mixer: type[Mixer], options: dict[str, Any] | None = None) -> None:
    """Raises BrokenLawError at the first law that `mixer` breaks."""
    for law in LAWS:
        check_law(law, mixer, options)


def _as(view: AttentionView, dtype: torch.dtype | None = None, device: str | None = None) -> AttentionView:
    """The view with every tensor on another device or of another dtype."""

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device=device, dtype=dtype)
        return replace(x, **{n: moved(v) for n, v in vars(x).items()}) if isinstance(x, NormView) else x

    return replace(view, **{name: moved(value) for name, value in vars(view).items()})
