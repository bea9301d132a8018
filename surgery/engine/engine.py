"""Greedy and sampled decoding of hybrids and their teachers, one token a step, by the model's own forward.

Keys and values lie in buffers of their final size, states are updated in place, and where the next token goes is a
number on the device. So the whole step, from the embedding to the most likely token, is noted once and replayed while
the text grows: as a CUDA graph on a GPU, as a list of operations on a CPU. `backends` says what really ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from halobench.errors import HalobenchError, UserError, reason_of
from halobench.kernels.attention.decode import decode_form, explain_decode
from halobench.mixers.cache import HybridCache, Steps
from halobench.mixers.contract import MixerContext
from halobench.mixers.linear import LinearMixer
from halobench.mixers.softmax import AttentionMixer
from halobench.surgery.anatomy import attention_modules, source_windows
from halobench.surgery.batch import carrying
from halobench.surgery.engine.attention import NotTakenOverError, asks_the_interface, decoding
from halobench.surgery.engine.graph import capture, put_back
from halobench.surgery.engine.tape import Tape, UnfitError
from halobench.surgery.heads import keep_logits
from halobench.surgery.hybrid import HybridForCausalLM, MixerAdapter

SAME = 64  # what is replayed may be so many rounding errors of its dtype away from the model's own,
MOST = 1e-3  # but no more than this part of the largest


def hears_steps(hook: Callable[..., None]) -> Callable[..., None]:
    """Marks a forward pre-hook (with kwargs) that only looks at `input_ids`: on the model itself, `step` calls it."""
    hook.hears_steps = True  # type: ignore[attr-defined]
    return hook


def refusal(model: Any) -> str | None:
    """Why the engine cannot decode with this model, or None."""
    source = _source(model)
    try:
        modules = attention_modules(source)
    except UserError as error:
        return str(error)
    own = [module for module in modules.values() if not isinstance(module, MixerAdapter)]
    deaf = {type(module).__name__ for module in own if not asks_the_interface(module)}
    if deaf:
        return f"{', '.join(sorted(deaf))} does not look its attention kernel up by name"
    if model.training:
        return "the model is in training mode"
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    if hooks > len(_listeners(model)):
        return "it has forward hooks, which a replayed step would not call"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if devices == ["meta"] or len(devices) > 1:
        return f"its parameters are on {' and '.join(devices)}, and not on one device"
    if _autocasts(model.device):
        return "autocast is on, under which keys and states change their dtype"
    special = [name for module in own for name in ("attn_logit_softcapping", "sinks") if hasattr(module, name)]
    if own and not special and source.config.get_text_config(decoder=True)._attn_implementation == "eager":
        return "its attention is set to 'eager', which is another than the engine's"
    return None


class DecodeEngine:
    """Decodes with one model for rows of equal length, without padding.

    A step that is replayed knows weights and settings as they were when it was noted: `prefill` or `release` after
    changing them.

    Args:
        model: a hybrid, or a decoder of transformers with softmax attention; in evaluation mode.
        room: tokens of prompt and answer together.
        kernels: "auto", "torch" or "triton", as in `kernels.attention.decode`; of attention and of fused steps. By
            default what the mixers were asked for, if that is one thing, else "auto".
        replay: note a step and replay it; False runs the model's forward at every step.

    Attributes:
        cache: what the model remembers; tokens may be read into it by any forward between steps.
        backends: what "attention", "recurrence" and "replay" ("cuda graph", "operations", or why not) are; see `step`.

    Raises:
        UserError: the model cannot be decoded with so; `refusal` has the reason.
    """

    def __init__(self, model: Any, *, room: int, kernels: str | None = None, replay: bool = True) -> None:
        reason = refusal(model)
        if reason is not None:
            raise UserError(f"the decode engine cannot run {model.config.model_type}: {reason}; use generate()")
        self.model, self.room, self._may_replay = model, room, replay
        source = _source(model)
        self._config = source.config.get_text_config(decoder=True)
        mixed = model.mixer_modules() if isinstance(model, HybridForCausalLM) else {}
        asked = {mixer.backend for mixer in mixed.values()}
        self.kernels = kernels or (asked.pop() if len(asked) == 1 else "auto")
        windows = [None if layer in mixed else window for layer, window in enumerate(source_windows(source))]
        self._mixers, self._attending = mixed, len(windows) - len(mixed)
        self._attending += sum(isinstance(m, AttentionMixer) and m.window is None for m in mixed.values())
        decode_form(self.kernels, *self._like())  # an error now where it would be one later
        self.cache = HybridCache(len(windows), room, windows=windows)
        self.backends: dict[str, str] = {}
        self._steps: Steps | None = None
        self._begun = False  # a first step was made since the cache was pinned
        self._replayed: Any = None  # a CUDA graph, or a tape
        self._trial: Any = None  # one that has not been held against the model's own forward yet

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, sizes: Iterable[int] | None = None) -> Tensor:
        """Reads tokens behind what was read, in pieces of `sizes`; the logits (B, vocabulary) of the last position.

        Raises:
            UserError: the room does not suffice.
        """
        self._require(ids_BT.shape[1])
        self.release()
        last = None
        for piece in ids_BT.split(list(sizes) if sizes is not None else ids_BT.shape[1], dim=1):
            last = self.model(input_ids=piece, past_key_values=self.cache, use_cache=True, **keep_logits(self.model, 1))
        if last is None:
            raise ValueError("there is nothing to read: the prompt has no tokens")
        return last.logits[:, -1]

    @torch.no_grad()
    def step(self, ids_B1: Tensor, *, heard: bool = False) -> Tensor:
        """Reads one token a row and returns the logits (B, vocabulary) behind it.

        They are in a buffer that the next step writes over.

        Args:
            heard: the hooks that hear of steps were called already.

        Raises:
            UserError: the room is used up, or `ids_B1` is not one token for each row.
            NotTakenOverError: at the first step: the model can only be decoded with plain forwards on the cache, which
                is as it was.
            HalobenchError: at a later step: the model does not attend to the cache any more.
        """
        self._require(1)
        rows = self.cache.batch_size
        if rows > 0 and ids_B1.shape != (rows, 1):
            raise UserError(f"a step was given ids of shape {tuple(ids_B1.shape)}; give one token a row: ({rows}, 1)")
        with _on(ids_B1.device):
            if not self._ready():
                self._begin(ids_B1)
            elif ids_B1 is not self._token:
                self._token.copy_(ids_B1)
            self._run()
        self.cache.advance()
        for hook in () if heard else _listeners(self.model):
            hook(self.model, (), {"input_ids": ids_B1})
        return self._logits

    def release(self) -> None:
        """Forgets the noted step; the cache takes any number of tokens again, and the next step notes anew."""
        self.cache.unpin()
        self._steps = self._replayed = self._trial = None

    def _require(self, tokens: int) -> None:
        """Raises UserError unless `tokens` more can be read now."""
        seen = self.cache.get_seq_length()
        if seen + tokens > self.room:
            raise UserError(
                f"the decode engine has room for {self.room} tokens, {seen} of them read, and was given {tokens} more; "
                "give more `room`"
            )
        if _autocasts(self.model.device):
            raise UserError("the decode engine cannot run under autocast; use it outside, or generate()")

    def continues(self, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None) -> bool:
        """Whether a forward's arguments are one more token of each row, without padding, as `step` takes it."""
        seen = self.cache.get_seq_length()
        if ids is None or ids.shape[1] != 1 or not 0 < seen < self.room or ids.shape[0] != self.cache.batch_size:
            return False
        if torch.is_grad_enabled() or self.model.training or _autocasts(ids.device):
            return False
        if mask is not None and not bool(mask.all()):
            return False
        return positions is None or bool((positions == seen).all())

    @property
    def token(self) -> Tensor:
        """The most likely next token of each row, (B, 1), after a step; `step` takes it as it is."""
        return self._token

    @torch.no_grad()
    def prepare(self, ids_B1: Tensor) -> None:
        """Does beforehand what the first steps would: captures or notes a step and tries it. Reads no token."""
        self._require(1)
        with _on(ids_B1.device):
            self._begin(ids_B1)
            layers, written = self.cache.layers, self._written()
            rings = [x for layer in layers if layer.window and layer.is_initialized for x in (layer.keys, layer.values)]
            before, held_before = ([tensor.clone() for tensor in tensors] for tensors in (written, rings))
            counts = [(layer.length, layer.held) for layer in layers]
            self._run()
            put_back(written, before)
            if self._trial is not None and self.cache.get_seq_length() + 1 < self.room:
                # At another place than it was noted at, or nobody would see what Python counts.
                self.cache.advance()
                self._written()[1].add_(1)
                self._run()
                put_back(written, before)
                for layer, (length, held) in zip(layers, counts, strict=True):
                    layer.length, layer.held = length, held
            put_back(rings, held_before)

    def _ready(self) -> bool:
        """Whether the cache is as the last step left it and may be written as the noted step does."""
        pinned = self._steps is not None and self.cache.steps is self._steps
        return pinned and self._mode == torch.is_inference_mode_enabled()

    def _begin(self, ids_B1: Tensor) -> None:
        """Pins the cache and makes the buffers that a step reads and writes."""
        self.release()
        self._mode = torch.is_inference_mode_enabled()
        steps = self.cache.pin(self.room, backend=self.kernels, fixed_states=True)
        with torch.inference_mode(False):
            self._token = ids_B1.to(torch.int64, copy=True)
            self._logits: Tensor = torch.empty(0)
        positions = steps.seen_1[None]
        context = MixerContext(positions_BT=positions, cache=self.cache)
        self._given = {"past_key_values": self.cache, "use_cache": True, "position_ids": positions}
        if self._mixers:
            self._given |= {"position_ids": carrying(positions, context), "mixer_context": context}
        self._steps, self._begun = steps, False
        self.backends = self._forms()

    def _written(self) -> list[Tensor]:
        """What a step changes and a second run of the same step must find unchanged."""
        assert self._steps is not None
        states = [state for layer in self.cache.layers for state in layer.states or ()]
        return [self._token, self._steps.seen_1, *states]

    def _run(self) -> None:
        """One step, by replay or by forward."""
        if not self._begun:
            self._first()
        elif self._replayed is not None:
            self._replayed.replay()
        else:
            try:
                self._attend_all() if self._trial is None else self._check()
            except NotTakenOverError as error:  # states are a step ahead of keys and values, or not: nobody knows
                raise HalobenchError(f"{error}; it changed while it decoded: read the prompt again") from error

    def _attend_all(self) -> None:
        """The step by the model's forward; NotTakenOverError if a layer attended to something else than the cache."""
        assert self._steps is not None
        places = self._steps.places.values()
        before = sum(place.attended for place in places)
        self._forward()
        attended = sum(place.attended for place in places) - before
        if attended != self._attending:
            raise NotTakenOverError(
                f"{attended} of {self._attending} layers of {self._config.model_type} attended to the cache: its "
                "decoding cannot be taken over"
            )

    def _first(self) -> None:
        """The first step, noted or captured if it can be; nothing has changed where the model cannot be stepped."""
        before = [tensor.clone() for tensor in self._written()]
        try:
            if not self._may_replay:
                self.backends["replay"] = "no: not asked for"
                self._attend_all()
            elif self._token.device.type == "cpu":
                self._note(before)
            else:
                self._trial, said = capture(self._attend_all, self._written(), self._token.device)
                self.backends["replay"] = said
                self._attend_all()
        except Exception:
            put_back(self._written(), before)
            self.release()
            raise
        self._begun = True

    def _note(self, before: list[Tensor]) -> None:
        """A step whose operations are noted."""
        tape = Tape(self._written())
        try:
            with tape:
                self._attend_all()
            self._trial, self.backends["replay"] = tape, "operations"
        except UnfitError as error:
            put_back(self._written(), before)
            self.backends["replay"] = f"no: {error}"
            self._attend_all()

    def _check(self) -> None:
        """A step by replay and by forward: only if both leave the same is it replayed from here on."""
        trial, self._trial = self._trial, None
        before = [tensor.clone() for tensor in self._written()]
        replayed, failed = [], ""
        try:
            trial.replay()
            replayed = [tensor.clone() for tensor in (self._logits, *self._written()[1:])]
        except Exception as error:  # of an operation that does not take what it was noted with
            failed = f"no: {reason_of(error)}"
        put_back(self._written(), before)
        self._attend_all()
        own = (self._logits, *self._written()[1:])
        apart = [_apart(a, b) for a, b in zip(replayed, own, strict=not failed)]
        if failed or any(apart):
            self.backends["replay"] = failed or f"no: what was replayed was {max(apart):.0e} apart from the model's"
        else:
            self._replayed = trial

    def _forward(self) -> None:
        """The step itself: fixed tensors in and out, so that it can be captured."""
        assert self._steps is not None
        self._steps.begin()
        with decoding(self._config):
            # not by a call, for the hooks that hear of steps are told of tokens, however often this runs for one
            output = _source(self.model).forward(input_ids=self._token, **self._given)
        logits_BV = output.logits[:, -1]
        if self._logits.shape != logits_BV.shape:
            with torch.inference_mode(False):
                self._logits = torch.empty_like(logits_BV)
        self._logits.copy_(logits_BV)
        torch.argmax(logits_BV, dim=-1, keepdim=True, out=self._token)
        self._steps.end()

    def _like(self) -> tuple[Tensor, int]:
        """A tensor like those that attention gets, and the size of a head."""
        weight = next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())
        head = getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
        return weight, head

    def _forms(self) -> dict[str, str]:
        """What attends and what steps the recurrences, with the reasons."""
        weight, head = self._like()
        found = {}
        if self._attending:
            form = explain_decode(self.kernels, weight, head)
            found["attention"] = form.replace("triton", "triton split-kv", 1) if form.startswith("triton") else form
        steps: dict[str, list[int]] = {}
        for layer, mixer in self._mixers.items():
            if isinstance(mixer, LinearMixer):
                reason = mixer.step_obstacle(weight, self.kernels)
                steps.setdefault("fused triton" if reason is None else f"torch ({reason})", []).append(layer)
        if steps:
            found["recurrence"] = "; ".join(f"{what}: {len(layers)} layers" for what, layers in steps.items())
        return found


def _source(model: Any) -> Any:
    """The decoder of transformers inside, which knows nothing of the cache's class."""
    return model.backbone if isinstance(model, HybridForCausalLM) else model


def _listeners(model: Any) -> list[Any]:
    """The hooks on the model itself that hear of steps."""
    return [hook for hook in model._forward_pre_hooks.values() if getattr(hook, "hears_steps", False)]


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The device that kernels and graphs are made for."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _apart(replayed: Tensor, own: Tensor) -> float:
    """How far two results are apart for the largest number of them; 0 where that is rounding.

    The infinite and the lowest numbers, with which tokens are ruled out, must be the same and are no measure.
    """
    unlike = replayed != own
    if not bool(unlike.any()):
        return 0.0
    if not own.is_floating_point():
        return math.inf
    size = own.abs()
    largest = size[size < torch.finfo(own.dtype).max / 2].amax() if own.numel() else size.sum()
    apart = float((replayed - own)[unlike].abs().amax() / largest)
    return 0.0 if apart <= min(SAME * torch.finfo(own.dtype).eps, MOST) else apart
