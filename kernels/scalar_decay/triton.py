"""The recurrence in Triton: the sequence is cut into segments, which run side by side on all of a GPU's processors.

A batch of 1 with 16 heads would keep 16 of an H200's 132 processors busy. So a sequence is cut into segments of up to
4,096 tokens; what each adds to the state is summed, a scan over the segments gives the state before each, and then
every segment is one program: it walks its chunks of 64 tokens with the state in registers, reads q, k and v once and
writes o once. The transition is a scalar, so the scan is exact, for decays of each token too; and decay bounds how far
back a segment's sum must look, so that the first pass reads little. Gradients are the same passes the other way round.

Bytes moved, as an estimate for 16 heads x 128 in bf16 and 128K tokens, one tensor being 0.54 GB (0.125 ms at 4.3 TB/s):

    forward    q, k, v read, o written: 4 tensors. The sums read on average 0.26 of k and v at the ALiBi slopes (all of
               them where nothing decays); 512 states of 64 KB are written, scanned and read: 0.13 GB. 0.60 ms in all,
               where 0.50 ms is the floor.
    backward   dq reads 3 tensors and writes 1, dk and dv read 4 and write 2; sums and states as forward. 1.4 ms, where
               0.87 ms is the floor. Decays of each token read 4 more for their gradient.

Shapes: N segments, S sequences; others as in the folder's docstring. All states are fp32, all exponents sums of fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from halobench.kernels.aot import CompileCase
from halobench.kernels.backend import TRITON, compute_dtype
from halobench.kernels.decays import bounded_decay
from halobench.kernels.scalar_decay.triton_backward import decay_gradients, key_value_gradients, query_gradients
from halobench.kernels.scalar_decay.triton_forward import outputs, segment_scan, segment_sums

SEGMENTS = (512, 1024, 2048, 4096)
PROGRAMS_PER_PROCESSOR = 2
SCAN_BLOCK = 512
LARGEST = TRITON["scalar_decay"].largest or 0


def scalar_decay_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    segment_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, on an NVIDIA GPU (or in Triton's interpreter).

    Gradients reach every tensor given, and come from both results. K and V are at most 128.

    Args:
        log_decay: g, at most 0: (H,) the same at every token, or (B, T, H) for each token. Computed in fp32.
        scale: factor on the output, usually 1 / sqrt(K).
        initial_state_BHKV: the state before the first token of each sequence; zeros by default.
        cu_seqlens: (S + 1,) integers on the same device, 0 first and T last: S sequences packed one after the other on
            the one row of q, k and v (B = 1); states are then (S, H, K, V). A sequence may be empty.
        chunk_size, segment_size: tokens that are one matrix product, and one program; powers of two, chosen by default.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token of each sequence, fp32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if max(k_BTHK.shape[-1], v_BTHV.shape[-1]) > LARGEST:
        raise ValueError(f"key and value sizes are at most {LARGEST}, got {k_BTHK.shape[-1]} and {v_BTHV.shape[-1]}")
    dtype = compute_dtype(q_BTHK) if q_BTHK.is_cuda else torch.float32  # the interpreter has no products in bf16
    batch, tokens, heads, _ = q_BTHK.shape
    if cu_seqlens is not None and (batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point()):
        raise ValueError(
            f"packed sequences are one row and cu_seqlens a list of integers; got {batch} rows and cu_seqlens "
            f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        )
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state_shape = (sequences, heads, k_BTHK.shape[-1], v_BTHV.shape[-1])
    if initial_state_BHKV is not None and initial_state_BHKV.shape != state_shape:
        raise ValueError(f"initial state of shape {tuple(initial_state_BHKV.shape)}, expected {state_shape}")
    log_decay = bounded_decay(log_decay, torch.float32)
    if log_decay.ndim == 1 and log_decay.requires_grad:
        log_decay = log_decay.expand(batch, tokens, heads)
    chunk = chunk_size or (16 if dtype == torch.float32 else 64)
    segment = segment_size or _segment_size(q_BTHK, batch * tokens)
    cut = _Cut.of(batch, tokens, cu_seqlens, chunk=chunk, segment=segment)
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float().contiguous()
    inputs = (x.to(dtype).contiguous() for x in (q_BTHK, k_BTHK, v_BTHV))
    with _on(q_BTHK):
        o_BTHV, state = _ScalarDecay.apply(*inputs, log_decay.contiguous(), initial, float(scale), cut)
    return o_BTHV.to(q_BTHK.dtype), state


def _on(like: Tensor) -> AbstractContextManager[object]:
    """The tensor's GPU as the current one: Triton launches there."""
    return torch.cuda.device_of(like) if like.is_cuda else nullcontext()


def _segment_size(like: Tensor, tokens: int) -> int:
    """The largest segment that still gives every processor of the GPU a few programs."""
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 1
    fitting = [s for s in SEGMENTS if tokens // s * like.shape[2] >= PROGRAMS_PER_PROCESSOR * processors]
    return max(fitting, default=SEGMENTS[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """How the row of tokens is cut: S sequences, their N segments, chunks.

    Packed sequences have their segments in a table made on the device: their lengths are never waited for, and N is
    the most that there can be; segments that there are not are empty.
    """

    sequences: int
    tokens: int  # of a sequence; of all where packed
    segments: int
    per_sequence: int  # segments; 0 where packed
    alone: bool  # every sequence is one segment
    chunk: int
    segment: int
    table_NC: Tensor | None = None
    firsts_S1: Tensor | None = None  # the first segment of each sequence, and N

    @classmethod
    def of(cls, batch: int, tokens: int, cu_seqlens: Tensor | None, *, chunk: int, segment: int) -> _Cut:
        """The cut of a batch, or of packed sequences."""
        if cu_seqlens is None:
            per = max(1, triton.cdiv(tokens, segment))
            return cls(
                sequences=batch, tokens=tokens, segments=batch * per, per_sequence=per, alone=per == 1,
                chunk=chunk, segment=segment,
            )  # fmt: skip
        sequences = len(cu_seqlens) - 1
        segments = tokens // segment + sequences
        table, firsts = _table(cu_seqlens.long(), segments, segment)
        return cls(
            sequences=sequences, tokens=tokens, segments=segments, per_sequence=0, alone=segments == sequences,
            chunk=chunk, segment=segment, table_NC=table, firsts_S1=firsts,
        )  # fmt: skip

    @property
    def packed(self) -> bool:
        return self.table_NC is not None


def _table(bounds_S1: Tensor, segments: int, segment: int) -> tuple[Tensor, Tensor]:
    """The table of segments, as `segment_at` reads it, and the first segment of each sequence; int64, on the device."""
    counts = ((bounds_S1.diff() + segment - 1) // segment).clamp(min=1)  # an empty sequence still has a state
    firsts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    n = torch.arange(segments, device=bounds_S1.device)
    sequence = torch.searchsorted(firsts[1:], n, right=True)
    exists = sequence < len(counts)
    sequence = sequence.clamp(max=len(counts) - 1)
    place = n - firsts[sequence]
    begin = bounds_S1[sequence] + place * segment
    end = torch.minimum(begin + segment, bounds_S1[sequence + 1])
    columns = (begin, end, sequence, place == 0, place == counts[sequence] - 1)
    return torch.stack([c * exists for c in columns], dim=1), firsts


@dataclass(frozen=True, kw_only=True, eq=False)
class _Launch:
    """The kernels on one set of inputs: sizes, flags, and numbers of warps and stages."""

    cut: _Cut
    heads: int
    key: int
    value: int
    scale: float
    per_token: bool

    @classmethod
    def of(cls, q: Tensor, v: Tensor, log_decay: Tensor, scale: float, cut: _Cut) -> _Launch:
        return cls(
            cut=cut, heads=q.shape[2], key=q.shape[3], value=v.shape[3], scale=scale,
            per_token=log_decay.ndim == 3,
        )  # fmt: skip

    def new_states(self, like: Tensor, count: int) -> Tensor:
        return torch.empty(count, self.heads, self.key, self.value, dtype=torch.float32, device=like.device)

    def over_segments(self, kernel: Any, *given: Any, **flags: bool) -> None:
        """A kernel of one program a segment and head; `given` are its own tensors."""
        cut = self.cut
        kernel[(cut.segments * self.heads,)](
            *given, cut.table_NC, cut.tokens, cut.per_sequence, self.heads, self.scale,
            **_sizes(self.key, self.value, cut.chunk, cut.segment), PACKED=cut.packed, PER_TOKEN=self.per_token,
            **flags, **_options(kernel, given[0].dtype, self.key * self.value, self.per_token),
        )  # fmt: skip

    def borders(
        self, left: Tensor, right: Tensor, log_decay: Tensor, given: Tensor | None, ending: Tensor | None, reverse: bool
    ) -> Tensor:
        """The state before each segment, or (reverse) the gradient in the state after each: (N, H, K, V).

        `ending`, if given, is filled with what the scan ends with: (S, H, K, V).
        """
        cut, numbers = self.cut, self.key * self.value
        states = self.new_states(left, cut.segments)
        totals = states.new_empty(cut.segments, self.heads)
        flags = {"REVERSE": reverse, "ENDING": ending is not None}
        self.over_segments(segment_sums, left, right, log_decay, states, totals, **flags)
        segment_scan[(cut.sequences * self.heads, triton.cdiv(numbers, SCAN_BLOCK))](
            states, totals, given, ending, cut.firsts_S1, cut.per_sequence, self.heads, STATE=numbers, BLOCK=SCAN_BLOCK,
            PACKED=cut.packed, GIVEN=given is not None, **flags,
            **_options(segment_scan, left.dtype, numbers, self.per_token),
        )  # fmt: skip
        return states


class _ScalarDecay(torch.autograd.Function):
    """q, k, v (B, T, H, .) and decays, contiguous, fp32 initial states: outputs and last states."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None, scale: float, cut: _Cut
    ) -> tuple[Tensor, Tensor]:
        launch = _Launch.of(q, v, log_decay, scale, cut)
        starts = initial if cut.alone else launch.borders(k, v, log_decay, initial, None, reverse=False)
        o, finals = torch.empty_like(v), launch.new_states(q, cut.sequences)
        launch.over_segments(
            outputs, q, k, v, log_decay, starts, o, finals,
            STARTED=starts is not None,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, log_decay, starts, finals)
        ctx.launch, ctx.initial = launch, initial is not None
        ctx.set_materialize_grads(False)
        return o, finals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_finals: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, starts, finals = ctx.saved_tensors
        launch: _Launch = ctx.launch
        cut = launch.cut
        do = torch.zeros_like(v) if do is None else do.contiguous()
        d_ends = None if d_finals is None else d_finals.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dg = torch.empty_like(log_decay) if ctx.needs_input_grad[3] else None
        crossings = dg.new_empty(cut.segments, cut.segment // cut.chunk, launch.heads) if dg is not None else None
        wanted = ctx.initial and ctx.needs_input_grad[4]
        d_initial = launch.new_states(q, cut.sequences) if wanted else None
        with _on(q):
            if wanted or not cut.alone:
                d_ends = launch.borders(q, do, log_decay, d_ends, d_initial, reverse=True)
            launch.over_segments(
                query_gradients, q, k, v, do, log_decay, starts, dq, dg, crossings, STARTED=starts is not None,
                DECAYS=dg is not None,
            )  # fmt: skip
            launch.over_segments(
                key_value_gradients, q, k, v, do, log_decay, d_ends, dk, dv, ENDED=d_ends is not None,
            )  # fmt: skip
            if dg is not None:
                launch.over_segments(
                    decay_gradients, q, k, v, do, log_decay, starts, finals, d_ends, dg, crossings,
                    STARTED=starts is not None, ENDED=d_ends is not None,
                )  # fmt: skip
        return dq, dk, dv, dg, d_initial, None, None


def _sizes(key: int, value: int, chunk: int, segment: int) -> dict[str, int]:
    """The kernels' constants for these sizes; a matrix product takes at least 16 numbers."""
    block_key, block_value = (max(16, triton.next_power_of_2(size)) for size in (key, value))
    return {"K": key, "V": value, "BK": block_key, "BV": block_value, "CHUNK": chunk, "SEGMENT": segment}


def _options(kernel: Any, dtype: torch.dtype, numbers: int, per_token: bool) -> dict[str, int]:
    """Warps and stages of a kernel whose state of `numbers` fills the registers: one program a processor at 128 x 128.

    Chosen by what spills least, compiled for Hopper: nothing where decays are constant.
    """
    if kernel is segment_scan:
        return {"num_warps": 4, "num_stages": 1}
    warps = 8 if numbers > 64 * 64 or (per_token and kernel is key_value_gradients) else 4
    deep = kernel is outputs or (per_token and kernel is query_gradients)
    return {"num_warps": warps, "num_stages": 1 if dtype == torch.float32 else 3 if deep else 2}


def compile_cases() -> list[CompileCase]:
    """The kernels as they run on heads of 64 and 128 in bf16: Lightning Attention, and decays of each token."""
    cases = []
    for size in (64, 128):
        for per_token in (False, True):
            flags = {"PACKED": False, "PER_TOKEN": per_token}
            more: dict[Any, list[dict[str, bool]]] = {
                segment_sums: [{"REVERSE": reverse, "ENDING": reverse} for reverse in (False, True)],
                outputs: [{"STARTED": True}],
                query_gradients: [{"STARTED": True, "DECAYS": decays} for decays in sorted({False, per_token})],
                key_value_gradients: [{"ENDED": True}],
                decay_gradients: [{"STARTED": True, "ENDED": True}] if per_token else [],
            }
            constants = {**_sizes(size, size, 64, SEGMENTS[-1]), **flags}
            cases += [
                _case(kernel, {**constants, **own}, _options(kernel, torch.bfloat16, size * size, per_token))
                for kernel, several in more.items() for own in several
            ]  # fmt: skip
    scan = {"STATE": 128 * 128, "BLOCK": SCAN_BLOCK, "PACKED": True, "REVERSE": True, "GIVEN": True, "ENDING": True}
    packed = {**_sizes(128, 128, 64, SEGMENTS[-1]), "PACKED": True, "PER_TOKEN": False, "STARTED": True}
    cases.append(_case(segment_scan, scan, _options(segment_scan, torch.bfloat16, 128 * 128, False)))
    cases.append(_case(outputs, packed, _options(outputs, torch.bfloat16, 128 * 128, False)))
    return cases


FLOATS = frozenset(["log_decay", "sums", "totals", "given", "ending", "starts", "finals", "d_ends", "dg", "crossings"])
INTEGERS = frozenset(["tokens", "per_sequence", "heads"])


def _case(kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> CompileCase:
    """A case with the types of the arguments, by their names."""
    given = dict(constants)
    if not constants["PACKED"]:
        given["table"] = None
    if "DECAYS" in constants and not constants["DECAYS"]:
        given |= dict.fromkeys({"dg", "crossings"} & set(kernel.arg_names))
    signature = {
        name: "fp32" if name == "scale" else "i32" if name in INTEGERS else "*fp32" if name in FLOATS
        else "*i64" if name in ("table", "firsts") else "*bf16"
        for name in kernel.arg_names if name not in given
    }  # fmt: skip
    return CompileCase(kernel, signature, given, **options)
