"""The kernels of a decode step against the definition in float64: split-KV attention, and the fused recurrent step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halobench.kernels.attention.naive import attend_where_naive
from halobench.kernels.scalar_decay.fused_step import StepParts, fused_step
from tests.triton_interpreter import INTERPRETED, device, passes_under_the_interpreter  # noqa: F401

gpu = pytest.mark.gpu
# Triton's interpreter computes products of bf16 wrongly; fp16 takes the same paths.
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)


def draw(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + 97 * len(sizes)), dtype=torch.float64)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double().cpu() - expected).norm() / expected.norm())


def skip_bf16(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes products of bf16 wrongly")


def test_the_kernels_pass_under_the_interpreter() -> None:
    passes_under_the_interpreter(__file__)


def expected_attention(q_BHK: Tensor, k_BJRK: Tensor, v_BJRV: Tensor, lengths: list[int], **more: object) -> Tensor:
    """Row by row over the keys that there are, in float64."""
    rows = []
    for b, length in enumerate(lengths):
        k_1SJK, v_1SJV = (x[b : b + 1, :, :length].transpose(1, 2) for x in (k_BJRK, v_BJRV))
        seen = torch.ones(1, length, dtype=torch.bool)
        rows.append(attend_where_naive(q_BHK[b : b + 1, None], k_1SJK, v_1SJV, seen, scale=0.2, **more)[:, 0])
    return torch.cat(rows)


@gpu
@dtypes
@pytest.mark.parametrize(("groups", "key", "value"), [(1, 64, 64), (2, 128, 128), (4, 12, 20), (8, 64, 64)])
def test_attention_reads_each_row_to_its_own_length(device, dtype, tolerance, groups, key, value) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    skip_bf16(dtype)
    from halobench.kernels.attention.decode_triton import decode_attention_triton

    lengths, room = [1, 200, 129], 220
    q, k, v = draw(3, 2 * groups, key), draw(3, 2, room, key, seed=1), draw(3, 2, room, value, seed=2)
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    expected = expected_attention(q, k, v, lengths)
    for row, length in enumerate(lengths):  # what stands behind a row's end must not be seen, whatever it is
        k[row, :, length:], v[row, :, length:] = torch.nan, torch.nan
    given = (x.to(device, dtype) for x in (q, k, v))
    got = decode_attention_triton(*given, torch.tensor(lengths, device=device), scale=0.2, parts=3)
    assert error(got, expected) < tolerance


@gpu
@pytest.mark.parametrize("parts", [1, 7, 40])
def test_attention_does_not_depend_on_the_number_of_parts(device, parts) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    from halobench.kernels.attention.decode_triton import decode_attention_triton

    q, k, v = draw(1, 4, 64), draw(1, 2, 400, 64, seed=1), draw(1, 2, 400, 64, seed=2)
    given = (x.to(device, torch.float32) for x in (q, k, v))
    got = decode_attention_triton(*given, torch.tensor([333], device=device), scale=0.2, parts=parts)
    assert error(got, expected_attention(q, k, v, [333])) < 2e-6


@gpu
@pytest.mark.parametrize("size", [256, 40])
def test_attention_with_soft_caps_and_sinks(device, size) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    from halobench.kernels.attention.decode_triton import decode_attention_triton

    q, k, v, sinks = draw(2, 6, size), draw(2, 3, 90, size, seed=1), draw(2, 3, 90, size, seed=2), draw(6)
    for more in ({"soft_cap": 1.5}, {"sinks_H": sinks}, {"soft_cap": 0.7, "sinks_H": sinks}):
        expected = expected_attention(q, k, v, [77, 5], **more)
        given = (x.to(device, torch.float32) for x in (q, k, v))
        there = {name: x.to(device, torch.float32) if isinstance(x, Tensor) else x for name, x in more.items()}
        got = decode_attention_triton(*given, torch.tensor([77, 5], device=device), scale=0.2, **there)
        assert error(got, expected) < 2e-6, more


@gpu
def test_attention_over_buffers_with_strides_of_their_own(device) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    from halobench.kernels.attention.decode_triton import decode_attention_triton

    q, k, v = draw(2, 4, 32), draw(2, 50, 2, 32, seed=1).transpose(1, 2), draw(2, 50, 2, 32, seed=2).transpose(1, 2)
    given = (x.to(device, torch.float32) for x in (q, k, v))
    got = decode_attention_triton(*given, torch.tensor([50, 49], device=device, dtype=torch.int32), scale=0.2)
    assert error(got, expected_attention(q, k, v, [50, 49])) < 2e-6


@gpu
@pytest.mark.skipif(INTERPRETED, reason="as many numbers do not fit beside the interpreter")
def test_attention_beyond_2_to_the_31_elements(device) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    from halobench.kernels.attention.decode_triton import decode_attention_triton

    room = 2**31 // (64 * 8) + 4096
    k = torch.zeros(1, 8, room, 64, dtype=torch.bfloat16, device=device)
    v = torch.zeros_like(k)
    v[0, 7, room - 1] = 1.0
    k[0, 7, room - 1] = 8.0
    q = torch.ones(1, 8, 64, dtype=torch.bfloat16, device=device)
    got = decode_attention_triton(q, k, v, torch.tensor([room], device=device), scale=1.0)
    assert float(got[0, 7].min()) > 0.99 and float(got[0, :7].abs().max()) == 0.0


# The fused step


def rotated(x_BHK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned, rest = x_BHK[..., : 2 * cos.shape[-1]], x_BHK[..., 2 * cos.shape[-1] :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1)


def expected_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, parts: StepParts
) -> tuple[Tensor, Tensor]:
    """The formula in float64; y (B, H * V) and the new state."""

    def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    q = q if parts.q_norm is None else normed(q, parts.q_norm, parts.norm_eps)
    k = k if parts.k_norm is None else normed(k, parts.k_norm, parts.norm_eps)
    if parts.cos is not None:
        q, k = (rotated(x, parts.cos, parts.sin, parts.interleaved) for x in (q, k))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    state = state * decay.exp()[:, None, None] + k[..., :, None] * v[..., None, :]
    y = torch.einsum("bhk,bhkv->bhv", 0.3 * q, state).flatten(1)
    if parts.o_norm is not None:
        y = normed(y.unflatten(1, (parts.o_groups, -1)), parts.o_norm.view(parts.o_groups, -1), parts.o_eps).flatten(1)
    return (y if parts.gate is None else y * parts.gate.sigmoid()), state


def cases(heads: int, kv_heads: int, size: int) -> dict[str, StepParts]:
    flat, angle = heads * size, draw(2, size // 2, seed=9)
    norms = {"q_norm": draw(size), "k_norm": draw(size, seed=3)}
    apart = {"q_norm": draw(heads, size), "k_norm": draw(kv_heads, size, seed=3)}
    turn, some = {"cos": angle.cos(), "sin": angle.sin()}, {"cos": angle[:1, :5].cos(), "sin": angle[:1, :5].sin()}
    output = {"o_norm": draw(flat, seed=4), "o_eps": 1e-5}
    gate = {"gate": draw(2, flat, seed=5)}
    return {
        "as released": StepParts(**norms, **turn, **output, **gate, norm_eps=1e-2),
        "norms of each head": StepParts(**apart, **turn, **output, **gate, o_groups=heads),
        "some features, neighbours turned": StepParts(**some, **output, interleaved=True),
        "no output norm": StepParts(**turn, **gate),
        "bare": StepParts(),
    }


@gpu
@dtypes
@pytest.mark.parametrize(("kv_heads", "size"), [(4, 64), (2, 40)])
def test_the_fused_step_is_the_formula(device, dtype, tolerance, kv_heads, size) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    for name, parts in cases(4, kv_heads, size).items():
        q, k, v = draw(2, 4, size), draw(2, kv_heads, size, seed=1), draw(2, kv_heads, size, seed=2)
        q, k, v = (x.to(dtype).double() for x in (q, k, v))
        decay, state = -draw(4).abs(), draw(2, 4, size, size)
        rounded = {n: x.to(dtype).double() if isinstance(x, Tensor) else x for n, x in vars(parts).items()}
        expected, after = expected_step(q, k, v, decay, state, StepParts(**rounded))
        there = {n: x.to(device, dtype) if isinstance(x, Tensor) else x for n, x in vars(parts).items()}
        held = state.to(device, torch.float32)
        got = fused_step(
            *(x.to(device, dtype) for x in (q, k, v)), decay.to(device, torch.float32), held,
            scale=0.3, parts=StepParts(**there),
        )  # fmt: skip
        assert got.dtype == dtype and error(got, expected) < tolerance, name
        assert error(held, after) < 1e-6, name


@gpu
@pytest.mark.parametrize(
    "options", [{}, {"norm_scope": "head"}, {"expand_kv": False}, {"rope": False, "output_gate": False}]
)
def test_a_lightning_layer_on_a_pinned_cache_is_the_layer_itself(device, options) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    from halobench.mixers.cache import HybridCache
    from halobench.mixers.contract import MixerContext, build_mixer
    from halobench.mixers.lightning import LightningMixer
    from halobench.mixers.view import AttentionView, NormView

    sizes = {"q": 4 * 32, "k": 2 * 32, "v": 2 * 32}
    weights = {f"{name}_weight": draw(size, 48, seed=i) / 7 for i, (name, size) in enumerate(sizes.items())}
    view = AttentionView(
        layer_index=0, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=32, **weights,
        o_weight=draw(48, 4 * 32, seed=8) / 11, q_norm=NormView(weight=draw(32), eps=1e-6),
        k_norm=NormView(weight=draw(32, seed=5), eps=1e-6), norm_eps=1e-6, scaling=32**-0.5, rope=True, rotary_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    mixer = build_mixer(LightningMixer, view, options).eval()
    hidden, angle = draw(1, 9, 48), draw(1, 9, 16, seed=6)
    whole = mixer(hidden, position_embeddings=(angle.cos(), angle.sin()), context=MixerContext.plain(9))

    mixer, cache, given = mixer.to(device, torch.float32), HybridCache(1), []
    with torch.no_grad():
        for start, end in ((0, 5), *((i, i + 1) for i in range(5, 9))):
            if start == 5:
                cache.pin(9, backend="triton", fixed_states=True)
            context = MixerContext(positions_BT=torch.arange(start, end, device=device)[None], cache=cache)
            tables = tuple(x[:, start:end].to(device, torch.float32) for x in (angle.cos(), angle.sin()))
            given.append(
                mixer(hidden[:, start:end].to(device, torch.float32), position_embeddings=tables, context=context)
            )
    assert mixer.used_backend == "triton"
    assert error(torch.cat(given, dim=1), whole.detach()) < 2e-6
