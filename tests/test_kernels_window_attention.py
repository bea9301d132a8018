"""Window attention with a memory that does not grow: blocks and steps against the definition, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halobench.kernels.attention.softmax import attend
from halobench.kernels.window_attention import chunked
from halobench.kernels.window_attention.chunked import window_attention
from halobench.kernels.window_attention.memory import WindowMemory, empty_memory, memory_bytes
from halobench.kernels.window_attention.naive import window_attention_naive

PLAIN = {"scale": 0.4}
SINK_SCORES = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
every_window = pytest.mark.parametrize(
    ("window", "sinks"), [(1, 0), (1, 2), (3, 0), (5, 2), (4, 50), (40, 0)], ids=lambda value: str(value)
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short text has several."""
    monkeypatch.setattr(chunked, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(chunked, "LARGEST_BLOCK", 8)


def inputs(batch: int, tokens: int, kv_heads: int = 2, grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens * 10 + kv_heads)
    shapes = ((batch, tokens, 4, 6), (batch, tokens, kv_heads, 6), (batch, tokens, kv_heads, 5))
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(grad) for shape in shapes]


def plain_positions(tokens: int) -> Tensor:
    return torch.arange(tokens)[None]


def padded(kind: str, tokens: int = 22) -> tuple[Tensor, Tensor]:
    """A mask of 4 rows with 0, 6, 13 and all but one token padded, and the positions it makes."""
    mask = torch.ones(4, tokens, dtype=torch.bool)
    for row, pads in enumerate((0, 6, 13, tokens - 1)):
        start = {"left": 0, "right": tokens - pads, "middle": min(5, tokens - pads)}[kind]
        mask[row, start : start + pads] = False
    return mask, (mask.long().cumsum(1) - 1).clamp(min=0)


def in_parts(leaves: list[Tensor], positions: Tensor, cuts: list[int], mask: Tensor | None = None, **options):
    """One call after another, each with the memory of the one before."""
    memory, outputs = None, []
    for begin, end in itertools.pairwise([0, *cuts, leaves[0].shape[1]]):
        o, memory = window_attention(
            *(x[:, begin:end] for x in leaves),
            positions_BT=positions[:, begin:end],
            padding_mask_BT=None if mask is None else mask[:, begin:end],
            memory=memory,
            **options,
        )
        outputs.append(o)
    return torch.cat(outputs, dim=1), memory


# The definition


def test_the_definition_sees_exactly_the_keys_that_the_rule_names() -> None:
    mask, positions = padded("middle", tokens=12)
    q, k, _ = inputs(4, 12, kv_heads=4)
    v = torch.eye(12, dtype=torch.float64)[None, :, None].expand(4, 12, 4, 12)  # outputs are the probabilities
    o = window_attention_naive(
        q, k, v, positions_BT=positions, padding_mask_BT=mask, window=3, sinks=2, scale=0.4
    )  # fmt: skip
    for row, query, key in itertools.product(range(4), range(12), range(12)):
        if not mask[row, query]:
            continue
        between = int(mask[row, key:query].sum())  # real tokens from the key up to the query
        first = int(mask[row, :key].sum()) < 2
        seen = bool(mask[row, key]) and key <= query and (between < 3 or first)
        assert bool((o[row, query, :, key] > 0).all()) == seen


@every_window
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_equal_the_definition_with_gradients(window: int, sinks: int, kv_heads: int) -> None:
    leaves = inputs(2, 29, kv_heads, grad=True)
    options = {"positions_BT": plain_positions(29), "window": window, "sinks": sinks, **PLAIN}
    results = []
    for function in (lambda *a, **o: window_attention(*a, **o)[0], window_attention_naive):
        o = function(*leaves, **options)
        results.append((o, *torch.autograd.grad((o**2).sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("learned", [False, True])
def test_padding_soft_cap_and_learned_sinks_equal_the_definition_with_gradients(kind, soft_cap, learned) -> None:
    leaves = inputs(4, 22, grad=True)
    mask, positions = (None, plain_positions(22)) if kind == "none" else padded(kind)
    options = {"positions_BT": positions, "padding_mask_BT": mask, "window": 5, "sinks": 2, "soft_cap": soft_cap}
    scores = SINK_SCORES.clone().requires_grad_()
    wanted = [*leaves, scores] if learned else leaves
    results = []
    for function in (lambda *a, **o: window_attention(*a, **o)[0], window_attention_naive):
        o = function(*leaves, sinks_H=scores if learned else None, **options, **PLAIN)
        assert o.isfinite().all()
        results.append((o, *torch.autograd.grad((o**2).sum(), wanted)))
    for got, expected in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("learned", [None, SINK_SCORES])
def test_a_window_larger_than_the_text_is_plain_causal_attention(learned) -> None:
    leaves = inputs(2, 30)
    expected = attend(*leaves, sinks_H=learned, **PLAIN)
    for window, sinks in ((30, 0), (64, 3), (29, 1), (2, 30)):
        options = {"window": window, "sinks": sinks, "sinks_H": learned, **PLAIN}
        o, _ = window_attention(*leaves, positions_BT=plain_positions(30), **options)
        torch.testing.assert_close(o, expected)
        o, _ = in_parts(leaves, plain_positions(30), [11, 12], **options)
        torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_stays_near_the_definition(dtype: torch.dtype) -> None:
    leaves = inputs(2, 40)
    options = {"positions_BT": plain_positions(40), "window": 6, "sinks": 2, **PLAIN}
    expected = window_attention_naive(*leaves, sinks_H=SINK_SCORES, **options)
    o, _ = window_attention(*(x.to(dtype) for x in leaves), sinks_H=SINK_SCORES.to(dtype), **options)
    assert o.dtype == dtype
    assert (o.double() - expected).abs().max() < (0.02 if dtype == torch.bfloat16 else 1e-5)


# The memory


@every_window
@pytest.mark.parametrize("learned", [None, SINK_SCORES])
def test_every_cut_equals_the_whole(window: int, sinks: int, learned) -> None:
    leaves, positions = inputs(2, 17), plain_positions(17)
    options = {"window": window, "sinks": sinks, "sinks_H": learned, **PLAIN}
    expected = window_attention_naive(*leaves, positions_BT=positions, **options)
    whole, memory = window_attention(*leaves, positions_BT=positions, **options)
    for cut in range(1, 17):
        o, cut_memory = in_parts(leaves, positions, [cut], **options)
        torch.testing.assert_close(o, expected)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(memory, cut_memory, strict=True))
    torch.testing.assert_close(whole, expected)


@every_window
@pytest.mark.parametrize("kind", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_token_by_token_equals_the_whole(window: int, sinks: int, kind: str, in_place: bool) -> None:
    leaves = inputs(4, 22)
    mask, positions = (None, plain_positions(22)) if kind == "none" else padded(kind)
    options = {"window": window, "sinks": sinks, "soft_cap": 0.9 if sinks == 2 else None, **PLAIN}
    expected, _ = window_attention(*leaves, positions_BT=positions, padding_mask_BT=mask, **options)
    real = torch.ones(4, 22, dtype=torch.bool) if mask is None else mask
    for cuts in (list(range(1, 22)), [9, 10, 11, 18]):
        o, _ = in_parts(leaves, positions, cuts, mask, in_place=in_place, **options)
        assert o.isfinite().all()
        torch.testing.assert_close(o[real], expected[real])


@pytest.mark.parametrize("kind", ["left", "right", "middle"])
@pytest.mark.parametrize("cuts", [[], [7], list(range(1, 22))], ids=["whole", "cut", "steps"])
def test_a_padded_row_of_a_batch_gives_what_its_real_tokens_give_alone(kind: str, cuts: list[int]) -> None:
    leaves, (mask, positions) = inputs(4, 22), padded(kind)
    options = {"window": 4, "sinks": 1, "sinks_H": SINK_SCORES, **PLAIN}
    o, memory = in_parts(leaves, positions, cuts, mask, **options)
    for row in range(4):
        alone = [x[row : row + 1, mask[row]] for x in leaves]
        expected, kept = window_attention(*alone, positions_BT=plain_positions(int(mask[row].sum())), **options)
        torch.testing.assert_close(o[row : row + 1, mask[row]], expected)
        for mine, theirs in zip(memory, kept, strict=True):
            assert torch.equal(mine[row], theirs[0])


def test_gradients_pass_through_the_memory_and_padded_steps_give_no_nan() -> None:
    leaves, (mask, positions) = inputs(4, 22, grad=True), padded("left")
    scores = SINK_SCORES.clone().requires_grad_()
    options = {"window": 4, "sinks": 1, "sinks_H": scores, **PLAIN}
    expected = window_attention_naive(*leaves, positions_BT=positions, padding_mask_BT=mask, **options)
    wanted = torch.autograd.grad((expected[mask] ** 2).sum(), [*leaves, scores])
    for cuts in ([9], list(range(1, 22))):
        o, _ = in_parts(leaves, positions, cuts, mask, **options)
        assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), [*leaves, scores], retain_graph=True))
        for got, gradient in zip(torch.autograd.grad((o[mask] ** 2).sum(), [*leaves, scores]), wanted, strict=True):
            torch.testing.assert_close(got, gradient)


def test_the_memory_may_be_reordered_repeated_and_used_twice_as_a_cache_does() -> None:
    leaves, (mask, positions) = inputs(4, 22), padded("middle")
    options = {"window": 5, "sinks": 2, **PLAIN}
    _, memory = in_parts([x[:, :15] for x in leaves], positions, [], mask[:, :15], **options)
    expected, _ = window_attention(*leaves, positions_BT=positions, padding_mask_BT=mask, **options)
    for rows in (torch.tensor([2, 0, 0, 1, 3]), torch.arange(4).repeat_interleave(2)):
        moved = tuple(x.index_select(0, rows) for x in memory)
        o, _ = window_attention(
            *(x[rows, 15:] for x in leaves),
            positions_BT=positions[rows, 15:],
            padding_mask_BT=mask[rows, 15:],
            memory=moved,
            **options,
        )
        torch.testing.assert_close(o[mask[rows, 15:]], expected[rows, 15:][mask[rows, 15:]])


def test_a_memory_is_written_in_place_only_when_asked_and_when_autograd_allows() -> None:
    leaves, options = inputs(1, 1), {"positions_BT": torch.tensor([[0]]), "window": 3, **PLAIN}
    memory = empty_memory(leaves[1], leaves[2], 3, 0)
    for grad, in_place, written in ((False, False, -1), (True, True, -1), (False, True, 0)):
        with torch.set_grad_enabled(grad):
            window_attention(*leaves, memory=memory, in_place=in_place, **options)
        assert memory.positions_BM[0, 0] == written


def test_a_memory_made_in_inference_mode_can_be_continued_outside() -> None:
    leaves, positions = inputs(2, 12, grad=True), plain_positions(12)
    options = {"window": 4, "in_place": True, **PLAIN}
    expected = window_attention_naive(*leaves, positions_BT=positions, window=4, **PLAIN)
    with torch.inference_mode():
        _, memory = in_parts([x[:, :10] for x in leaves], positions, [8], **options)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            o, _ = window_attention(
                *(x[:, 10:11] for x in leaves), positions_BT=positions[:, 10:11], memory=memory, **options
            )
        torch.testing.assert_close(o, expected[:, 10:11])


def test_the_memory_is_as_large_as_declared_from_the_first_token_and_never_grows() -> None:
    q, k, _ = inputs(3, 30)
    declared = memory_bytes(3, 2, 6, window=7, sinks=2, bytes_per_element=8)
    for tokens in (1, 5, 30):
        _, memory = window_attention(
            *(x[:, :tokens] for x in (q, k, k)), positions_BT=plain_positions(tokens), window=7, sinks=2, **PLAIN
        )
        assert isinstance(memory, WindowMemory)
        assert sum(x.nbytes for x in memory) == declared


def test_no_memory_is_made_when_none_is_wanted() -> None:
    leaves, positions = inputs(1, 9), plain_positions(9)
    assert window_attention(*leaves, positions_BT=positions, window=3, keep_memory=False, **PLAIN)[1] is None
    _, memory = in_parts([x[:, :8] for x in leaves], positions, [], window=3, **PLAIN)
    last = [x[:, 8:] for x in leaves]
    options = {"positions_BT": positions[:, 8:], "memory": memory, "window": 3, **PLAIN}
    assert window_attention(*last, keep_memory=False, **options)[1] is None


# Cost


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("mode", ["plain", "padded", "soft cap", "learned sinks"])
def test_no_intermediate_grows_with_the_square_of_the_text(mode: str) -> None:
    q, k, v = (x[..., :4].float().requires_grad_() for x in inputs(1, 4096))
    mask = None
    if mode == "padded":
        mask = torch.ones(1, 4096, dtype=torch.bool)
        mask[:, 1000:1010] = False
    extra = {"soft cap": {"soft_cap": 3.0}, "learned sinks": {"sinks_H": SINK_SCORES.float()}}.get(mode, {})
    with Largest() as largest:
        o, _ = window_attention(
            q, k, v, positions_BT=plain_positions(4096), padding_mask_BT=mask, window=16, sinks=2, **extra, **PLAIN
        )
        o.sum().backward()
    assert largest.elements <= max(q.numel(), chunked.EXPLICIT_BLOCK * (chunked.EXPLICIT_BLOCK + 18) * 4)
