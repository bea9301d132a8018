"""The cache of layers that keep their source's attention: windows that forget, against transformers' own cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from halobench.errors import UserError
from halobench.mixers.cache import HybridCache

WINDOW = 8
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
SOURCES = {
    "mistral": {},
    "gemma2": ALTERNATING,
    "gemma3_text": {"layer_types": ["full_attention", *["sliding_attention"] * 3]},  # layer 0 is not a sliding one
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    "cohere2": ALTERNATING,
}
every_source = pytest.mark.parametrize("family", SOURCES)


@pytest.fixture
def source(pico, family):
    """A pico decoder of `family` with windows of 8 tokens; gpt_oss in eager mode, which is all it has."""
    model = pico(family, sliding_window=WINDOW, **SOURCES[family])
    assert model.config.sliding_window == WINDOW
    return model


def windows_of(model: PreTrainedModel) -> list[int | None]:
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers
    return [WINDOW if kind == "sliding_attention" else None for kind in types]


def caches(model: PreTrainedModel) -> tuple[HybridCache, DynamicCache]:
    windows = windows_of(model)
    return HybridCache(len(windows), windows=windows), DynamicCache(config=model.config)


def fed(model: PreTrainedModel, ids: Tensor, cuts: list[int], cache, mask: Tensor | None = None) -> Tensor:
    """Logits of `ids` given in parts, with the cache of the parts before."""
    parts = []
    for begin, end in itertools.pairwise([0, *cuts, ids.shape[1]]):
        arguments = {} if mask is None else {
            "attention_mask": mask[:, :end], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        }  # fmt: skip
        parts.append(model(ids[:, begin:end], past_key_values=cache, **arguments).logits)
    return torch.cat(parts, dim=1)


def left_padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :19] = 0, 0
    return torch.where(mask == 1, tokens, 2), mask


# As transformers' own


@every_source
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padded"])
@torch.no_grad()
def test_logits_equal_those_of_transformers_cache_bit_for_bit(source, tokens, padded) -> None:
    ids, mask = left_padded(tokens) if padded else (tokens, None)
    for cuts in ([], [20], list(range(1, 40)), [3, 9, 16, 17, 18, 30], [35, 36, 37, 38]):
        mine, theirs = caches(source)
        got, expected = fed(source, ids, cuts, mine, mask), fed(source, ids, cuts, theirs, mask)
        assert torch.equal(got, expected), cuts
        assert mine.get_seq_length() == 40


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_any_cut_gives_the_logits_of_the_whole(source, tokens) -> None:
    whole = source(tokens, use_cache=False).logits
    for cut in range(1, 40):
        got = fed(source, tokens, [cut], caches(source)[0])
        torch.testing.assert_close(got, whole, atol=2e-5, rtol=2e-5)


@every_source
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=["greedy", "beam", "chunks"])
def test_generation_equals_that_with_transformers_cache(source, tokens, options) -> None:
    ids, mask = left_padded(tokens)
    options = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, **options}
    mine, theirs = (source.generate(ids, past_key_values=cache, **options) for cache in caches(source))
    assert torch.equal(mine, theirs)


@every_source
@torch.no_grad()
def test_a_windowed_layer_keeps_what_transformers_keeps(source, tokens) -> None:
    mine, theirs = caches(source)
    for begin, end in itertools.pairwise([0, 3, 7, 8, 30, 31, 40]):
        for cache in (mine, theirs):
            source(tokens[:, begin:end], past_key_values=cache)
        kept = sum(x.nbytes for layer in theirs.layers for x in (layer.keys, layer.values))
        assert mine.nbytes(used=True) == kept
        assert mine.is_sliding == theirs.is_sliding
        for index in range(4):
            assert mine.get_mask_sizes(5, index) == theirs.get_mask_sizes(5, index)


# The buffer


def windowed(tokens: int, step: int = 1, window: int = 4) -> tuple[HybridCache, Tensor]:
    """A cache of one layer after `tokens` of 60, given `step` at a time."""
    cache, x = HybridCache(1, room=2, windows=[window]), torch.randn(3, 2, 60, 5)
    for begin in range(0, tokens, step):
        part = x[:, :, begin : min(begin + step, tokens)]
        cache.update(part, -part, 0)
    return cache, x


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("step", [1, 2, 3, 20])
def test_an_update_returns_the_past_in_sight_and_the_new_tokens_however_many_come(window: int, step: int) -> None:
    cache, x = HybridCache(1, room=2, windows=[window]), torch.randn(3, 2, 60, 5)
    for begin in range(0, 60, step):
        length, offset = cache.get_mask_sizes(step, 0)
        keys, values = cache.update(x[:, :, begin : begin + step], -x[:, :, begin : begin + step], 0)
        assert (length, offset) == (keys.shape[2], max(0, begin - window + 1))
        assert torch.equal(keys, x[:, :, offset : begin + step])
        assert torch.equal(values, -keys)
        assert cache.nbytes() <= 2 * x[:, :, : 2 * window].nbytes
        assert cache.nbytes(used=True) == 2 * x[:, :, : min(begin + step, window - 1)].nbytes


def test_most_tokens_are_written_without_a_copy_of_the_others() -> None:
    cache, x = windowed(8, window=16)
    moves = 0
    for t in range(8, 60):
        keys, _ = cache.update(x[:, :, t : t + 1], x[:, :, t : t + 1], 0)
        moves += keys.untyped_storage().data_ptr() != cache.layers[0].keys.untyped_storage().data_ptr()
    assert moves == 2  # the buffer has room for 32 tokens and keeps 15 when it is full


def test_a_clone_and_a_reordered_batch_go_on_alone() -> None:
    cache, x = windowed(10)
    twin, rows = cache.clone(), torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    for t in range(10, 30):
        keys, _ = cache.update(x[rows][:, :, t : t + 1], x[rows][:, :, t : t + 1], 0)
        assert torch.equal(keys, x[rows][:, :, t - 3 : t + 1])
    twin.batch_repeat_interleave(2)
    twin.batch_select_indices(torch.tensor([5, 0]))
    keys, _ = twin.update(x[[2, 0]][:, :, 10:11], x[[2, 0]][:, :, 10:11], 0)
    assert torch.equal(keys, x[[2, 0]][:, :, 7:11])
    assert (twin.get_seq_length(), cache.get_seq_length(), twin.batch_size) == (11, 30, 2)
    assert twin.is_sliding == [True]


def test_tokens_are_taken_back_until_a_window_has_dropped_some_and_then_from_no_layer() -> None:
    cache, x = windowed(3)
    cache.crop(-2)
    keys, _ = cache.update(x[:, :, 1:3], x[:, :, 1:3], 0)
    assert torch.equal(keys, x[:, :, :3])

    both = HybridCache(2, windows=[None, 4])
    for layer in (0, 1):
        both.update(x[:, :, :6], x[:, :, :6], layer)
    before = both.nbytes(used=True)
    both.crop(0)
    with pytest.raises(UserError, match=r"window of 4 tokens that has seen 6 .*clone\(\)"):
        both.crop(-1)
    assert both.nbytes(used=True) == before
    assert [layer.length for layer in both.layers] == [6, 6]
    assert not both.is_croppable


def test_a_reset_cache_begins_anew() -> None:
    cache, x = windowed(20)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes()) == (0, 0)
    assert torch.equal(cache.update(x[:, :, :9], x[:, :, :9], 0)[0], x[:, :, :9])


def test_full_layers_recurrent_ones_and_windows_live_side_by_side() -> None:
    cache, x = HybridCache(3, windows=[None, None, 4]), torch.randn(1, 2, 9, 5)
    cache.set_state(0, (torch.randn(1, 2, 5, 5),), tokens=9)
    cache.update(x, x, 1)
    assert cache.get_mask_sizes(2, 1) == (11, 0)
    assert cache.get_mask_sizes(2, 2) == (5, 6)  # by what the model has seen, even before the layer has
    assert cache.is_sliding == [False, False, True]


def test_windows_that_do_not_fit_the_layers_are_refused() -> None:
    for windows in ([4], [4, 0], [4, None, None]):
        with pytest.raises(UserError, match="windows is .*one for each of 2 layers"):
            HybridCache(2, windows=windows)
