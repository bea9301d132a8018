"""What every mixer must do: agree with its formula, with itself step by step, and with no neighbour in the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halobench.config import from_dict, to_dict
from halobench.errors import UserError
from halobench.kernels.scalar_decay.slopes import alibi_slopes
from halobench.mixers import MIXERS
from halobench.mixers.cache import HybridCache
from halobench.mixers.contract import Mixer, MixerContext, build_mixer
from halobench.mixers.parts import rotate
from halobench.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from halobench.mixers.view import AttentionView
from halobench.surgery.anatomy import read_attention

EVERY = [
    ("lightning", {}),
    ("lightning", {"expand_kv": False, "qk_norm": False, "rope": False, "norm_scope": "head"}),
    ("lightning", {"output_norm": False, "output_gate": False}),
    ("softmax", {}),
    ("softmax", {"rope": True, "output_gate": False}),
    ("softmax", {"logits_scale_base": 20.0}),
]
every_mixer = pytest.mark.parametrize(("name", "options"), EVERY)


@pytest.fixture
def view(pico) -> AttentionView:
    return read_attention(pico("qwen3", attention_bias=True).double())[1]


def tables(positions_BT: Tensor, view: AttentionView) -> tuple[Tensor, Tensor]:
    frequencies = 1e4 ** -(torch.arange(0, view.rotary_dim, 2, dtype=torch.float64) / view.rotary_dim)
    angles = (positions_BT[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def make(view: AttentionView, name: str, options: dict[str, object]) -> Mixer:
    torch.manual_seed(5)
    return build_mixer(MIXERS.get(name), view, options).eval()


def run(
    mixer: Mixer, view: AttentionView, hidden: Tensor, mask: Tensor | None = None, cache: HybridCache | None = None
) -> Tensor:
    """The mixer on a batch that may continue a cache; `mask` covers past and new tokens."""
    past, tokens = (0 if cache is None else cache.get_seq_length()), hidden.shape[1]
    positions = torch.arange(past, past + tokens)[None]
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    context = MixerContext(
        positions_BT=positions,
        padding_mask_BT=None if mask is None else mask[:, past:],
        key_padding_mask_BS=mask,
        cache=cache,
    )
    return mixer(hidden, position_embeddings=tables(positions, view), context=context)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@every_mixer
def test_token_by_token_equals_all_at_once(view, name, options) -> None:
    mixer, hidden = make(view, name, options), noise(2, 70, view.hidden_size)
    whole = run(mixer, view, hidden)
    cache = HybridCache(4)
    steps = torch.cat([run(mixer, view, hidden[:, t : t + 1], cache=cache) for t in range(70)], dim=1)
    torch.testing.assert_close(steps, whole)


@every_mixer
@pytest.mark.parametrize("cuts", [(1,), (7, 30), (64,)])
def test_the_state_is_handed_over_right_at_any_cut(view, name, options, cuts) -> None:
    mixer, hidden = make(view, name, options), noise(2, 70, view.hidden_size)
    whole, cache = run(mixer, view, hidden), HybridCache(4)
    bounds = [0, *cuts, 70]
    parts = [run(mixer, view, hidden[:, a:b], cache=cache) for a, b in zip(bounds, bounds[1:], strict=False)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@every_mixer
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_real_tokens_as_alone(view, name, options, side) -> None:
    mixer, hidden = make(view, name, options), noise(2, 20, view.hidden_size)
    real = slice(8, 20) if side == "left" else slice(0, 12)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1] = False
    mask[1, real] = True
    alone = run(mixer, view, hidden[1:, real])
    torch.testing.assert_close(run(mixer, view, hidden, mask)[1:, real], alone)
    cache = HybridCache(4)
    parts = [run(mixer, view, hidden[:, a:b], mask[:, :b], cache) for a, b in ((0, 5), (5, 14), (14, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1)[1:, real], alone)


@every_mixer
def test_decoding_after_right_padding_continues_the_real_text(view, name, options) -> None:
    mixer, hidden = make(view, name, options), noise(2, 13, view.hidden_size)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 9:12] = False
    cache = HybridCache(4)
    run(mixer, view, hidden[:, :12], mask[:, :12], cache)
    last = run(mixer, view, hidden[:, 12:], mask, cache)
    unpadded = torch.cat((hidden[1:, :9], hidden[1:, 12:]), dim=1)
    torch.testing.assert_close(last[1:], run(mixer, view, unpadded)[:, -1:])


@every_mixer
def test_a_sequence_does_not_depend_on_its_batch_neighbours(view, name, options) -> None:
    mixer, hidden = make(view, name, options), noise(3, 12, view.hidden_size)
    before = run(mixer, view, hidden)[0]
    hidden[1:] *= 100
    torch.testing.assert_close(run(mixer, view, hidden)[0], before, rtol=0, atol=1e-12)


@every_mixer
def test_every_weight_gets_a_finite_gradient_even_with_padding(view, name, options) -> None:
    mixer, hidden = make(view, name, options), noise(2, 12, view.hidden_size).requires_grad_()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    (run(mixer, view, hidden, mask)[mask] ** 2).sum().backward()
    for label, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().sum() > 0 or label == "k_proj.bias", label
    assert torch.equal(hidden.grad[1, :5], torch.zeros_like(hidden.grad[1, :5]))


@every_mixer
def test_weights_are_copies_and_new_ones_are_told_from_the_teachers(view, name, options) -> None:
    mixer = make(view, name, options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(7)
    assert not (view.q_weight == 7).any() and not (view.o_weight == 7).any()
    fresh = {id(p) for p in mixer.new_parameters()}
    expected = {n for n, _ in mixer.named_parameters() if n.split(".")[0] in {"o_norm", "z_proj", "o_gate"}}
    assert {n for n, p in mixer.named_parameters() if id(p) in fresh} == expected
    assert len(mixer.copied_parameters()) + len(fresh) == len(list(mixer.parameters()))


@every_mixer
def test_declared_state_bytes_are_what_the_cache_holds(view, name, options) -> None:
    mixer, cache = make(view, name, options), HybridCache(4)
    run(mixer, view, noise(2, 50, view.hidden_size), cache=cache)
    size = 8 if name == "softmax" else 4
    declared = mixer.state_bytes(2, 50, bytes_per_element=size)
    assert cache.nbytes(used=True) == declared * (1 if name == "softmax" else 2)  # the state of fp64 inputs is fp64


def test_lightning_follows_the_papers_formulas(view) -> None:
    """An independent, straightforward reference: one sequence, head by head, token by token."""
    view = replace(view, q_bias=None, k_bias=None, v_bias=None, o_bias=None)
    mixer = make(view, "lightning", {})
    x = noise(1, 9, view.hidden_size)
    heads, dim, group = view.num_heads, view.head_dim, view.groups
    cos, sin = tables(torch.arange(9)[None], view)

    def rms(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + view.norm_eps).sqrt() * weight

    def turn(y: Tensor, t: int) -> Tensor:
        half = torch.cat((-y[dim // 2 :], y[: dim // 2]))
        return y * cos[0, t] + half * sin[0, t]

    outputs = torch.zeros(9, heads, dim, dtype=torch.float64)
    for h in range(heads):
        rows, shared = slice(h * dim, (h + 1) * dim), slice(h // group * dim, (h // group + 1) * dim)
        s = torch.zeros(dim, dim, dtype=torch.float64)
        for t in range(9):
            q = turn(rms(view.q_weight[rows] @ x[0, t], view.q_norm_weight), t)
            k = turn(rms(view.k_weight[shared] @ x[0, t], view.k_norm_weight), t)
            s = math.exp(-(2 ** (-8 * (h + 1) / heads))) * s + torch.outer(k, view.v_weight[shared] @ x[0, t])
            outputs[t, h] = q / math.sqrt(dim) @ s
    gate = 1 / (1 + torch.exp(-(x[0] @ mixer.z_proj.weight.T)))
    expected = (rms(outputs.flatten(1), mixer.o_norm.weight) * gate) @ view.o_weight.T
    torch.testing.assert_close(run(mixer, view, x)[0], expected)


def test_hype_follows_the_papers_formulas(view) -> None:
    view = replace(view, q_bias=None, k_bias=None, v_bias=None, o_bias=None)
    mixer = make(view, "softmax", {"logits_scale_base": 30.0})
    x = noise(1, 9, view.hidden_size)
    heads, dim, group = view.num_heads, view.head_dim, view.groups

    def rms(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + view.norm_eps).sqrt() * weight

    outputs = torch.zeros(9, heads, dim, dtype=torch.float64)
    for h in range(heads):
        rows, shared = slice(h * dim, (h + 1) * dim), slice(h // group * dim, (h // group + 1) * dim)
        k = rms(x[0] @ view.k_weight[shared].T, view.k_norm_weight)
        v = x[0] @ view.v_weight[shared].T
        for t in range(9):
            q = rms(view.q_weight[rows] @ x[0, t], view.q_norm_weight) * math.log(t + 30, 30)
            weights = torch.exp(k[: t + 1] @ q / math.sqrt(dim))
            outputs[t, h] = weights @ v[: t + 1] / weights.sum()
    gate = torch.sigmoid(x[0] @ mixer.o_gate.weight.T)
    expected = (outputs.flatten(1) * gate) @ view.o_weight.T
    # s_t is fp32 on purpose, so the agreement is to its digits
    torch.testing.assert_close(run(mixer, view, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_logits_are_scaled_in_evaluation_only(view) -> None:
    plain, scaled = make(view, "softmax", {}), make(view, "softmax", {"logits_scale_base": 20.0})
    x = noise(1, 12, view.hidden_size)
    assert not torch.allclose(run(plain, view, x), run(scaled, view, x))
    assert torch.equal(run(plain, view, x), run(scaled.train(), view, x))


def test_a_neutral_gate_and_rope_make_the_softmax_layer_equal_the_ungated_one(view) -> None:
    x = noise(2, 12, view.hidden_size)
    ungated = run(make(view, "softmax", {"output_gate": False}), view, x)
    torch.testing.assert_close(run(make(view, "softmax", {"gate_init": "neutral"}), view, x), ungated)


def test_a_window_of_the_teacher_is_kept_unless_told_otherwise(view) -> None:
    view = replace(view, sliding_window=3)
    x = noise(1, 12, view.hidden_size)
    far = x.clone()
    far[:, 0] += 1
    narrow, wide = make(view, "softmax", {}), make(view, "softmax", {"sliding_window": False})
    assert torch.equal(run(narrow, view, x)[:, 3:], run(narrow, view, far)[:, 3:])
    assert not torch.allclose(run(wide, view, x)[:, 3:], run(wide, view, far)[:, 3:])


def test_student_key_heads_start_as_the_head_their_query_head_shared(view) -> None:
    mixer = make(view, "lightning", {})
    teacher, student = (w.unflatten(0, (-1, view.head_dim)) for w in (view.k_weight, mixer.k_proj.weight))
    for head in range(view.num_heads):
        assert torch.equal(student[head], teacher[head // view.groups])


def test_expanded_key_heads_change_nothing_at_the_start(view) -> None:
    x = noise(1, 12, view.hidden_size)
    expanded, shared = make(view, "lightning", {}), make(view, "lightning", {"expand_kv": False})
    torch.testing.assert_close(run(expanded, view, x), run(shared, view, x))


def test_a_fresh_lightning_layer_answers_at_the_scale_of_attention(view) -> None:
    x = torch.randn(1, 64, view.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention = run(make(view, "softmax", {"rope": True, "gate_init": "neutral"}), view, x)
    lightning = run(make(view, "lightning", {"gate_init": "neutral"}), view, x)
    assert 0.5 < (lightning.norm() / attention.norm()).item() < 6


def test_a_partial_rotation_leaves_the_rest_of_the_head_alone() -> None:
    x = noise(1, 5, 2, 8)
    angles = torch.arange(5, dtype=torch.float64)[None, :, None].expand(1, 5, 4)
    turned = rotate(x, (angles.cos(), angles.sin()))
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.allclose(turned[:, 1:, :, :4], x[:, 1:, :, :4])
    torch.testing.assert_close(turned[..., :4].norm(dim=-1), x[..., :4].norm(dim=-1))


@every_mixer
def test_bfloat16_drifts_no_more_at_the_end_of_a_long_text_than_at_its_start(pico, name, options) -> None:
    view = read_attention(pico())[1]
    exact, low = make(view, name, options), make(view, name, options).bfloat16()
    hidden = torch.randn(1, 2048, view.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected, got = run(exact, view, hidden.float()), run(low, view, hidden).float()
    drift = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).squeeze(0)
    assert got.isfinite().all()
    assert drift[-256:].mean() < 1.5 * drift[:256].mean() + 0.02
    assert drift.mean() < 0.1


def test_the_first_call_in_inference_mode_does_not_spoil_training(view) -> None:
    mixer, x = make(view, "lightning", {}), noise(1, 6, view.hidden_size)
    with torch.inference_mode():
        run(mixer, view, x)
    run(mixer, view, x.requires_grad_()).sum().backward()


def test_a_cache_filled_in_inference_mode_can_be_continued_outside(view) -> None:
    mixer, x, cache = make(view, "softmax", {}), noise(1, 6, view.hidden_size), HybridCache(4)
    with torch.inference_mode():
        run(mixer, view, x[:, :4], cache=cache)
    with torch.no_grad():
        run(mixer, view, x[:, 4:], cache=cache)
    assert cache.get_seq_length() == 6


def test_options_are_checked_by_name_and_value(view) -> None:
    with pytest.raises(UserError, match="did you mean 'output_gate'"):
        make(view, "lightning", {"output_gates": True})
    with pytest.raises(UserError, match="did you mean 'neutral'"):
        make(view, "lightning", {"gate_init": "netral"})
    with pytest.raises(UserError, match="did you mean 'lightning'"):
        MIXERS.get("lightnin")


def test_options_round_trip_through_plain_data() -> None:
    options = SoftmaxOptions(rope=True, logits_scale_base=500)
    assert from_dict(SoftmaxOptions, to_dict(options), "options") == options


class TestCache:
    """The memory itself."""

    def filled(self, tokens: int = 10) -> tuple[HybridCache, Tensor]:
        cache, x = HybridCache(2, room=4), noise(3, 2, tokens, 5)
        for t in range(tokens):
            keys, values = cache.update(x[:, :, t : t + 1], -x[:, :, t : t + 1], 0)
        assert torch.equal(keys, x) and torch.equal(values, -x)
        cache.set_state(1, (noise(3, 2, 4, 4),), tokens=tokens)
        return cache, x

    def test_buffers_double_and_hold_what_was_written(self) -> None:
        cache, _ = self.filled()
        assert cache.layers[0].keys.shape[2] == 16
        used = 2 * 3 * 2 * 10 * 5 * 8
        state = 3 * 2 * 4 * 4 * 8
        assert cache.nbytes(used=True) == used + state
        assert cache.nbytes() == used * 16 // 10 + state

    def test_room_given_at_the_start_is_never_outgrown_early(self) -> None:
        cache, x = HybridCache(1, room=10), noise(1, 2, 10, 5)
        cache.update(x[:, :, :9], x[:, :, :9], 0)
        first = cache.layers[0].keys.data_ptr()
        cache.update(x[:, :, 9:], x[:, :, 9:], 0)
        assert cache.layers[0].keys.data_ptr() == first

    def test_beams_are_reordered_in_every_layer(self) -> None:
        cache, x = self.filled()
        state = cache.state(1)[0]
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        assert torch.equal(cache.layers[0].keys[:, :, :10], x[[2, 2, 0]])
        assert torch.equal(cache.state(1)[0], state[[2, 2, 0]])

    def test_a_clone_is_independent(self) -> None:
        cache, x = self.filled()
        twin = cache.clone()
        cache.update(x[:, :, :1] + 1, x[:, :, :1], 0)
        cache.layers[0].keys.zero_()
        cache.state(1)[0].zero_()
        assert twin.get_seq_length() == 10 and torch.equal(twin.layers[0].keys[:, :, :10], x)
        assert twin.state(1)[0].abs().sum() > 0

    def test_sequences_can_be_repeated_and_selected(self) -> None:
        cache, x = self.filled()
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 6
        cache.batch_select_indices(torch.tensor([3]))
        assert torch.equal(cache.layers[0].keys[:, :, :10], x[1:2]) and cache.state(1)[0].shape[0] == 1

    def test_a_recurrent_state_refuses_to_take_tokens_back(self) -> None:
        cache, _ = self.filled()
        assert not cache.is_croppable
        with pytest.raises(UserError, match="cannot take back tokens"):
            cache.crop(-1)

    def test_an_all_recurrent_cache_counts_its_tokens(self) -> None:
        cache = HybridCache(1)
        assert cache.get_seq_length() == 0 and cache.batch_size == -1
        cache.set_state(0, (noise(1, 2, 4, 4),), tokens=7)
        assert cache.get_seq_length() == 7 and cache.get_mask_sizes(2, 0) == (9, 0)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.state(0) is None


def test_slopes_follow_the_heads_of_the_student(view) -> None:
    mixer = make(view, "lightning", {})
    assert torch.allclose(-mixer._log_decay(torch.zeros(1)), torch.tensor(alibi_slopes(view.num_heads)))


def test_a_soft_cap_of_the_teacher_is_kept(view) -> None:
    capped = SoftmaxMixer.from_attention(replace(view, soft_cap=0.1), SoftmaxOptions()).eval()
    x = noise(1, 12, view.hidden_size)
    torch.manual_seed(5)
    plain = SoftmaxMixer.from_attention(view, SoftmaxOptions()).eval()
    capped.load_state_dict(plain.state_dict())
    assert not torch.allclose(run(capped, view, x), run(plain, view, x))
