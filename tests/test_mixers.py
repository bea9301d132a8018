"""Every mixer against the laws, and against its paper's formulas written out for one head and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halobench.config import to_dict
from halobench.errors import UserError
from halobench.kernels.scalar_decay.slopes import alibi_slopes
from halobench.mixers import MIXERS
from halobench.mixers.conformance import LAWS, Subject, check_law, example_view, rotary_tables
from halobench.mixers.contract import Mixer, build_mixer
from halobench.mixers.convolution import ShortConvolution
from halobench.mixers.linear import LinearMixer
from halobench.mixers.parts import Rotation
from halobench.mixers.softmax import SoftmaxOptions
from halobench.mixers.view import AttentionView

LINEAR = [name for name in MIXERS.names() if issubclass(MIXERS.get(name), LinearMixer)]
BARE = {"expand_kv": False, "qk_norm": False, "rope": False, "norm_scope": "all", "gate_init": "neutral"}
VARIANTS = [
    *[(name, {}) for name in MIXERS.names()],
    *[(name, BARE) for name in LINEAR],
    *[(name, {"short_conv": 4, "output_gate": False}) for name in LINEAR],
    ("rwkv7", {"token_shift": True, "short_conv": 3}),
    ("softmax", {"rope": True, "output_gate": False}),
    ("softmax", {"logits_scale_base": 20.0}),
    ("sliding_window", {"window": 8, "sinks": 2}),
    ("sliding_window", {"window": 1, "sinks": 0, "output_gate": True, "rope": False}),
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_law(name, options, law) -> None:
    check_law(law, MIXERS.get(name), options)


@pytest.fixture
def view() -> AttentionView:
    return example_view(q_bias=None, k_bias=None, v_bias=None, o_bias=None)


def subject(view: AttentionView, name: str, options: dict[str, object] | None = None) -> Subject:
    return Subject(mixer=MIXERS.get(name), options=options or {}, view=view)


def rms(y: Tensor, weight: Tensor | float, eps: float = 1e-6) -> Tensor:
    return y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


# Formulas. Each gives o_t and the new state of one head from what the paper calls for; S is (K, V).

Step = Callable[[Mixer, int, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
SIZE, HEADS = 12, 4
SCALE = 1 / math.sqrt(SIZE)


def decayed(gamma: Tensor | float, S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    S = gamma * S + torch.outer(k, v)
    return S.T @ q * SCALE, S


def lightning(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return decayed(math.exp(-(2 ** (-8 * (h + 1) / HEADS))), S, q, k, v)


def retnet(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return decayed(1 - 2 ** (-5 - h), S, q, k, v)


def simple_gla(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return decayed(torch.sigmoid(m.g_proj(x)[h]) ** (1 / 16), S, q, k, v)


def mamba2(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    dt = torch.log1p(torch.exp(m.dt_proj(x)[h]))
    o, S = decayed(torch.exp(-dt * torch.exp(m.A_log[h])), S, q, dt * k, v)
    return o + m.D[h] * v, S


def gla(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(m.g_proj.up(m.g_proj.down(x))[h * SIZE : (h + 1) * SIZE]) ** (1 / 16)
    return decayed(gate[:, None], S, q, k, v)


def delta(S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (y / (y.pow(2).sum() + 1e-6).sqrt() for y in (q, k))
    S = S + beta * torch.outer(k, v - S.T @ k)
    return S.T @ q, S


def deltanet(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return delta(S, q, k, v, torch.sigmoid(m.b_proj(x)[h]))


def gated_deltanet(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    alpha = torch.exp(-torch.exp(m.A_log[h]) * F.softplus(m.a_proj(x)[h]))
    return delta(alpha * S, q, k, v, torch.sigmoid(m.b_proj(x)[h]))


def kda(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    step = F.softplus(m.f_proj.up(m.f_proj.down(x))[h * SIZE : (h + 1) * SIZE])
    alpha = torch.exp(-torch.exp(m.A_log[h]) * step)
    return delta(alpha[:, None] * S, q, k, v, torch.sigmoid(m.b_proj(x)[h]))


def rwkv7(m: Mixer, h: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    rows = slice(h * SIZE, (h + 1) * SIZE)
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(m.w_proj.up(torch.tanh(m.w_proj.down(x)))[rows]))
    a = torch.sigmoid(m.a_proj.up(m.a_proj.down(x))[rows])
    kappa = m.xi[h] * k
    kappa = kappa / (kappa.pow(2).sum() + 1e-6).sqrt()
    written = k * (1 + m.alpha[h] * (a - 1))
    S = (torch.diag(w) - torch.outer(a * kappa, kappa)) @ S + torch.outer(written, v)
    return S.T @ q * SCALE, S


FORMULAS: dict[str, Step] = {
    f.__name__: f for f in (lightning, retnet, simple_gla, mamba2, gla, deltanet, gated_deltanet, kda, rwkv7)
}


def test_every_mixer_with_a_matrix_as_state_has_a_formula() -> None:
    assert sorted(FORMULAS) == sorted(LINEAR)


@pytest.mark.parametrize("name", FORMULAS)
@torch.no_grad()
def test_a_mixer_follows_its_papers_formulas(view, name) -> None:
    """An independent, straightforward reference: head by head, token by token."""
    case = subject(view, name)
    mixer, x = case.build(), case.noise(1, 9)
    for parameter in mixer.new_parameters():  # what starts at zero or one would hide a lost term
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    cos, sin = rotary_tables(torch.arange(9)[None], view)
    group, outputs, bonus = HEADS // view.num_kv_heads, torch.zeros(9, HEADS, SIZE).double(), 0

    def turn(y: Tensor, t: int) -> Tensor:
        return y * cos[0, t] + torch.cat((-y[SIZE // 2 :], y[: SIZE // 2])) * sin[0, t]

    if name == "rwkv7":
        bonus = torch.zeros_like(outputs)
    for h in range(HEADS):
        mine, shared = slice(h * SIZE, (h + 1) * SIZE), slice(h // group * SIZE, (h // group + 1) * SIZE)
        S = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        for t in range(9):
            q = turn(rms(view.q_weight[mine] @ x[0, t], view.q_norm.weight), t)
            k = turn(rms(view.k_weight[shared] @ x[0, t], view.k_norm.weight), t)
            v = view.v_weight[shared] @ x[0, t]
            outputs[t, h], S = FORMULAS[name](mixer, h, x[0, t], q, k, v, S)
            if name == "rwkv7":
                a = torch.sigmoid(mixer.a_proj(x[0, t])[mine])
                bonus[t, h] = (q * mixer.rho[h] * k * (1 + mixer.alpha[h] * (a - 1))).sum() * v
    flat = outputs.flatten(1) if name == "lightning" else outputs  # the released models normalise all heads together
    normed = rms(flat, mixer.o_norm.weight.view(flat.shape[1:])).view(outputs.shape) + bonus
    expected = (normed.flatten(1) * torch.sigmoid(x[0] @ mixer.z_proj.weight.T)) @ view.o_weight.T
    torch.testing.assert_close(case.run(mixer, x)[0], expected, rtol=1e-6, atol=1e-7)


def attention_by_hand(
    view: AttentionView, x: Tensor, sees: Callable[[int, int], bool], scale: Callable[[int], float]
) -> Tensor:
    """Softmax attention without rotation, token by token; (T, heads, size)."""
    outputs = torch.zeros(len(x), HEADS, SIZE, dtype=torch.float64)
    group = HEADS // view.num_kv_heads
    for h in range(HEADS):
        mine, shared = slice(h * SIZE, (h + 1) * SIZE), slice(h // group * SIZE, (h // group + 1) * SIZE)
        k, v = rms(x @ view.k_weight[shared].T, view.k_norm.weight), x @ view.v_weight[shared].T
        for t in range(len(x)):
            q = rms(view.q_weight[mine] @ x[t], view.q_norm.weight) * scale(t)
            seen = [s for s in range(t + 1) if sees(t, s)]
            weights = torch.exp(k[seen] @ q / math.sqrt(SIZE))
            outputs[t, h] = weights @ v[seen] / weights.sum()
    return outputs


@torch.no_grad()
def test_hype_follows_the_papers_formulas(view) -> None:
    case = subject(view, "softmax", {"logits_scale_base": 30.0})
    mixer, x = case.build(), case.noise(1, 9)
    outputs = attention_by_hand(view, x[0], lambda t, s: True, lambda t: math.log(t + 30, 30))
    expected = (outputs.flatten(1) * torch.sigmoid(x[0] @ mixer.o_gate.weight.T)) @ view.o_weight.T
    # s_t is fp32 on purpose, so the agreement is to its digits
    torch.testing.assert_close(case.run(mixer, x)[0], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_sliding_window_sees_the_last_tokens_and_the_first(view) -> None:
    case = subject(view, "sliding_window", {"window": 4, "sinks": 2, "rope": False})
    x = case.noise(1, 15)
    outputs = attention_by_hand(view, x[0], lambda t, s: t - s < 4 or s < 2, lambda t: 1.0)
    torch.testing.assert_close(case.run(case.build(), x)[0], outputs.flatten(1) @ view.o_weight.T)


# Options


@torch.no_grad()
def test_logits_are_scaled_in_evaluation_only(view) -> None:
    plain, scaled = subject(view, "softmax"), subject(view, "softmax", {"logits_scale_base": 20.0})
    x = plain.noise(1, 12)
    assert not torch.allclose(plain.run(plain.build(), x), scaled.run(scaled.build(), x))
    assert torch.equal(plain.run(plain.build(), x), scaled.run(scaled.build().train(), x))


@pytest.mark.parametrize("name", ["softmax", "sliding_window"])
@torch.no_grad()
def test_a_neutral_gate_makes_an_attention_layer_equal_the_ungated_one(view, name) -> None:
    gated = subject(view, name, {"output_gate": True, "gate_init": "neutral"})
    ungated, x = subject(view, name, {"output_gate": False}), gated.noise(2, 12)
    torch.testing.assert_close(gated.run(gated.build(), x), ungated.run(ungated.build(), x))


@torch.no_grad()
def test_a_window_of_the_teacher_is_kept_unless_told_otherwise(view) -> None:
    narrow = subject(replace(view, sliding_window=3), "softmax")
    wide = subject(narrow.view, "softmax", {"sliding_window": False})
    near, x = subject(narrow.view, "sliding_window", {"window": 9, "sinks": 0}), narrow.noise(1, 12)
    far = x.clone()
    far[:, 0] += 1
    for case in (narrow, near):
        assert torch.equal(case.run(case.build(), x)[:, 3:], case.run(case.build(), far)[:, 3:])
    assert not torch.allclose(wide.run(wide.build(), x)[:, 3:], wide.run(wide.build(), far)[:, 3:])


def test_student_key_heads_start_as_the_head_their_query_head_shared(view) -> None:
    mixer = subject(view, "lightning").build()
    teacher, student = (w.unflatten(0, (-1, view.head_dim)) for w in (view.k_weight, mixer.k_proj.weight))
    for head in range(view.num_heads):
        assert torch.equal(student[head], teacher[head // view.groups])


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("scope", ["head", "all"])
@torch.no_grad()
def test_expanded_key_heads_change_nothing_at_the_start(view, name, scope) -> None:
    if scope == "all":
        norms = {
            n: replace(view.q_norm, weight=torch.rand(h * SIZE).double(), scope="all") for n, h in (("q", 4), ("k", 2))
        }
        view = replace(view, q_norm=norms["q"], k_norm=norms["k"])
    expanded, shared = subject(view, name), subject(view, name, {"expand_kv": False})
    x = expanded.noise(1, 12)
    torch.testing.assert_close(expanded.run(expanded.build(), x), shared.run(shared.build(), x))


@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_convolutions_start_as_the_identity(view, name) -> None:
    plain, convolved = subject(view, name), subject(view, name, {"short_conv": 4})
    x = plain.noise(1, 12)
    torch.testing.assert_close(convolved.run(convolved.build(), x), plain.run(plain.build(), x))


@torch.no_grad()
def test_a_convolution_looks_back_by_its_width(view) -> None:
    convolution = ShortConvolution(3, 3, torch.zeros(1, dtype=torch.float64))
    convolution.weight.copy_(torch.tensor([[1.0, 10.0, 100.0]] * 3))
    x = torch.arange(1.0, 6.0, dtype=torch.float64)[None, :, None].expand(1, 5, 3)
    y, last = convolution(x, None, None)
    assert y[0, :, 0].tolist() == [100, 210, 321, 432, 543] and last[0, :, 0].tolist() == [4, 5]


@pytest.mark.parametrize("name", ["simple_gla", "mamba2", "gla", "gated_deltanet", "kda", "rwkv7"])
@torch.no_grad()
def test_learned_decays_start_at_the_slopes_of_lightning_attention(view, name) -> None:
    """The state, left alone for a token that writes nothing, shrinks by each head's ALiBi decay."""
    quiet = replace(view, init_std=0.0, v_weight=view.v_weight.clone())
    case = subject(quiet, name, {"output_norm": False, "output_gate": False, "rope": False})
    mixer, x = case.build(), case.noise(1, 2)
    _, cache = case.in_pieces(mixer, x, [0, 1])
    before = cache.state(view.layer_index)[0].clone()
    mixer.v_proj.weight.zero_()
    mixer.k_proj.weight.zero_()  # nothing is written, nor taken out
    case.run(mixer, x[:, 1:], cache=cache)
    after = cache.state(view.layer_index)[0]
    expected = torch.tensor([math.exp(-slope) for slope in alibi_slopes(HEADS)], dtype=torch.float64)
    torch.testing.assert_close((after / before).mean((-1, -2))[0], expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_mamba2_starts_as_a_weighted_mean() -> None:
    """Step sizes sum to one over the decay: a constant input is reproduced, not accumulated."""
    quiet = example_view(init_std=0.0, q_bias=None, k_bias=None, v_bias=None, o_bias=None)
    case = subject(quiet, "mamba2", {"output_norm": False, "output_gate": False, "rope": False})
    mixer, x = case.build(), case.noise(1, 1).expand(1, 3000, -1)
    _, cache = case.in_pieces(mixer, x, [0, 3000])
    k = mixer.k_norm(mixer.k_proj(x[:, :1]).unflatten(-1, (HEADS, SIZE)))[0, 0]
    v = mixer.v_proj(x[:, :1]).unflatten(-1, (HEADS, SIZE))[0, 0]
    ratio = cache.state(1)[0][0] / (k[..., None] * v[:, None])
    slope = torch.tensor(alibi_slopes(HEADS), dtype=torch.float64)
    torch.testing.assert_close(ratio.mean((-1, -2)), slope / (1 - torch.exp(-slope)), rtol=1e-5, atol=0)


@torch.no_grad()
def test_token_shift_starts_as_no_shift_and_then_looks_one_token_back(view) -> None:
    plain, shifted = subject(view, "rwkv7"), subject(view, "rwkv7", {"token_shift": True})
    x, mixer = plain.noise(1, 12), shifted.build()
    torch.testing.assert_close(shifted.run(mixer, x), plain.run(plain.build(), x))
    mixer.shift.fill_(1.0)  # only the previous token's input counts now
    delayed = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    mixer.z_proj.weight.zero_()  # but for the output gate, which sees the token itself
    expected = plain.build()
    expected.z_proj.weight.zero_()
    got = shifted.run(mixer, x)[:, 1:]
    assert not torch.allclose(got, expected(x, position_embeddings=None, context=_plain(12))[:, 1:], atol=1e-3)
    case = subject(view, "rwkv7", {"rope": False})
    unrotated = subject(view, "rwkv7", {"rope": False, "token_shift": True})
    mixer, other = unrotated.build(), case.build()
    mixer.shift.fill_(1.0)
    mixer.z_proj.weight.zero_()
    other.z_proj.weight.zero_()
    torch.testing.assert_close(unrotated.run(mixer, x)[:, 1:], case.run(other, delayed)[:, 1:])


def _plain(tokens: int):
    from halobench.mixers.contract import MixerContext

    return MixerContext.plain(tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS.names())
@torch.no_grad()
def test_on_a_gpu_a_mixer_answers_as_on_the_cpu_and_says_what_ran(name) -> None:
    case = subject(example_view(torch.bfloat16, head_dim=16, rotary_dim=16, **wide_enough()), name)
    mixer, hidden = case.build(), case.noise(2, 300)
    expected = case.run(mixer, hidden)
    got = case.run(mixer.cuda(), hidden.cuda())
    assert (got.cpu().float() - expected.float()).norm() < 0.03 * expected.float().norm()
    assert mixer.used_backend in ("fla", "torch", "sdpa")


def wide_enough() -> dict[str, object]:
    """Weights for heads of 16: fla's kernels take powers of two."""
    rows = {"q_weight": 64, "k_weight": 32, "v_weight": 32}
    weights = {name: (0.2 * torch.randn(n, 40)).bfloat16() for name, n in rows.items()}
    plain = {"q_bias": None, "k_bias": None, "v_bias": None, "q_norm": None, "k_norm": None}
    return {**weights, "o_weight": (0.2 * torch.randn(40, 64)).bfloat16(), **plain}


# Rotation


def test_a_partial_rotation_leaves_the_rest_of_the_head_alone(view) -> None:
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    angles = torch.arange(5, dtype=torch.float64)[None, :, None].expand(1, 5, 4)
    turned = Rotation(replace(view, rotary_dim=4))(x, (angles.cos(), angles.sin()))
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.allclose(turned[:, 1:, :, :4], x[:, 1:, :, :4])
    torch.testing.assert_close(turned[..., :4].norm(dim=-1), x[..., :4].norm(dim=-1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_of_one_number_a_pair_and_of_two_rotate_alike(view, interleaved) -> None:
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    pairs = torch.rand(1, 5, 4, dtype=torch.float64)
    doubled = {False: pairs.repeat(1, 1, 2), True: pairs.repeat_interleave(2, -1)}
    for table_interleaved, twice in doubled.items():
        turn = Rotation(
            replace(view, rotary_dim=8, rope_interleaved=interleaved, rope_table_interleaved=table_interleaved)
        )
        turned = turn(x, (pairs.cos(), pairs.sin()))
        assert torch.equal(turned, turn(x, (twice.cos(), twice.sin())))
        # Each pair turns as a complex number times exp(i angle).
        split = x.unflatten(-1, (4, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
        product = torch.view_as_real(torch.view_as_complex(split.contiguous()) * torch.exp(1j * pairs)[:, :, None])
        torch.testing.assert_close(turned, product.flatten(-2) if interleaved else torch.cat(product.unbind(-1), -1))


# Refusals


def test_unknown_and_impossible_options_are_refused(view) -> None:
    with pytest.raises(UserError, match="'tuple_conv'.*short_conv"):
        build_mixer(MIXERS.get("gla"), view, {"tuple_conv": 4})
    with pytest.raises(UserError, match="above 1"):
        SoftmaxOptions(logits_scale_base=1.0)
    with pytest.raises(UserError, match="short_conv=1 spans nothing"):
        build_mixer(MIXERS.get("kda"), view, {"short_conv": 1})
    with pytest.raises(UserError, match="window holds at least the token itself"):
        build_mixer(MIXERS.get("sliding_window"), view, {"window": 0})
    with pytest.raises(UserError, match="did you mean 'gated_deltanet'"):
        MIXERS.get("gated_delta_net")


@pytest.mark.parametrize("name", MIXERS.names())
def test_every_mixer_says_what_it_is(name, view) -> None:
    mixer = MIXERS.get(name)
    assert mixer.name == name and mixer.label and mixer.paper.startswith("https://arxiv.org/abs/")
    built = subject(view, name).build()
    assert built.flops_per_token(1000) > 2 * sum(w.numel() for w in (view.q_weight, view.o_weight))
    grows = built.state_bytes(1, 100_000) > built.state_bytes(1, 50_000)
    assert grows == (name == "softmax")
    assert to_dict(built.options) is not None
