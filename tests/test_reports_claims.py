"""What a report may claim: nothing from failed runs, from few groups, from no error, or against its own numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from halobench.records import Metric, ModelCard, RunRecord
from halobench.reports.charts import Dot, runs_with_errors
from halobench.reports.columns import standing_targets
from halobench.reports.comparison import bootstrap_interval, compare, sign_flip_p
from halobench.reports.figures import figures, looks_of
from halobench.reports.layer_bars import layer_bars
from halobench.reports.leaderboard import make_board, opening
from halobench.reports.page import page
from halobench.reports.pairing import Target
from halobench.reports.rows import build_rows
from halobench.reports.scene import Scene, Shape, Text
from halobench.reports.standing import stand
from halobench.reports.table import escape
from tests.test_reports import (
    EVEN,
    HALO,
    TEACHER,
    board,
    card,
    evaluated,
    hits,
    marked,
    needle,
    plain,
    record,
    study,
    table,
)

AT_512 = Target(suite="niah", task="multikey-4", metric="accuracy", lengths=(512,))
HALO_ROW = "HALO = recall\\_drop"


def texts(scene: Scene) -> list[str]:
    return [part.text for part in scene.parts if isinstance(part, Text)]


def bands(scene: Scene) -> list[Shape]:
    return [part for part in scene.parts if isinstance(part, Shape) and part.opacity == 0.16]


def ruler(task: str, length: int) -> Metric:
    return plain("ruler", task, "score", 0.5, 0.03, length=length)


def test_numbers_of_a_run_that_failed_are_neither_shown_nor_marked() -> None:
    cut = evaluated(HALO, (100, 99), status="error", error="12 prompts were not read whole; their numbers do not count")
    text = board([evaluated(TEACHER, (100, 40)), cut, evaluated(EVEN, (50, 40))])
    assert table(text)[HALO_ROW]["needles 1K ×2"] == "failed" and marked(text) == []
    assert "**Failed**: eval of HALO = recall\\_drop: 12 prompts were not read whole" in text


def test_a_failure_stands_in_the_columns_of_its_own_suite() -> None:
    margin = plain("csr", "tiny_continuation", "margin", 0.1, 0.01)
    failed = record(EVEN, status="error", error="CUDA out of memory", settings={"continuation": {"seed": 0}})
    row = table(board([evaluated(HALO, (90,), margin), failed]))["even"]
    assert (row["CSR margin (acc)"], row["needles 512 ×1 (trained)"]) == ("out of memory", "–")
    needles = {"niah:multikey-4": {"lengths": [1024]}}
    failed = record(EVEN, status="error", error="CUDA out of memory", settings=needles)
    row = table(board([evaluated(HALO, (90, 80), margin), failed]))["even"]
    assert [row[f"needles {at}"] for at in ("512 ×1 (trained)", "1K ×2")] == ["–", "out of memory"]
    assert row["CSR margin (acc)"] == "–"


def test_all_of_a_few_questions_is_no_certainty() -> None:
    """Twelve of twelve against 900 of 1000 other questions, and against the teacher's 980 of 1000."""
    few, many, teacher = needle(512, [1.0] * 12), needle(512, hits(900, 1000)), needle(512, hits(980, 1000))
    rows = build_rows([record(TEACHER, [teacher]), record(HALO, [few]), record(EVEN, [many])])
    made = compare(rows, [AT_512], pairs=[(rows[1], rows[2])])
    assert made.items[0].method == "independent" and made.best(AT_512) is None
    assert made.items[0].p is not None and made.items[0].p > 0.1
    stood = stand(rows[1], rows[0], AT_512)
    assert stood.lowest is not None and stood.lowest < -0.02
    large = [needle(512, hits(count, 4000)) for count in (3600, 4000)]
    rows = build_rows([record(HALO, [large[1]]), record(EVEN, [replace(large[0], samples=None)])])
    assert compare(rows, [AT_512]).best(AT_512) == rows[0].key, "many questions still tell"


def test_a_large_family_can_still_find_what_is_clear() -> None:
    rng = np.random.default_rng(0)
    assert sign_flip_p([np.ones(40)], rng, most=400_000) < 0.05 / 1000
    assert sign_flip_p([np.ones(14)], rng) == pytest.approx(2 / 2**14, rel=1e-9)
    assert sign_flip_p([np.ones(4)], rng) == pytest.approx(2 / 16, rel=1e-9)
    assert sign_flip_p([np.zeros(4)], rng, most=400_000) == 1.0


def test_few_differences_are_flipped_every_way() -> None:
    rng = np.random.default_rng(0)
    strata = [rng.integers(-4, 5, size=5) / 4, rng.normal(size=4)]
    signs = np.array(list(itertools.product((-1, 1), repeat=9)))
    sums = signs[:, :5] @ strata[0] / 5 + signs[:, 5:] @ strata[1] / 4
    observed = abs(strata[0].mean() + strata[1].mean())
    expected = float((np.abs(sums) >= observed - 1e-12).mean())
    assert sign_flip_p(strata, rng) == pytest.approx(expected, rel=1e-12)
    many = [rng.integers(-4, 5, size=36) / 4]
    assert sign_flip_p(many, np.random.default_rng(1)) == sign_flip_p(many, np.random.default_rng(2))


def test_the_flips_that_go_on_keep_their_level() -> None:
    rng = np.random.default_rng(4)
    p_values = np.array([sign_flip_p([rng.normal(size=30)], rng, 100, 2000) for _ in range(500)])
    assert np.mean(p_values <= 0.05) < 0.08 and np.mean(p_values <= 0.02) < 0.04 and p_values.min() < 1 / 100


def test_only_hybrids_are_compared_for_the_mark() -> None:
    (made,) = make_board([evaluated(TEACHER, (100, 43)), evaluated(HALO, (90, 91)), evaluated(EVEN, (80, 70))]).marks
    pairs = {frozenset((item.left, item.right)) for item in made.items}
    assert pairs == {frozenset((HALO.hash, EVEN.hash))}


def test_intervals_of_few_groups_hold_what_they_promise() -> None:
    rng = np.random.default_rng(1)
    made = [bootstrap_interval([rng.normal(size=5)], rng) for _ in range(200)]
    inside = sum(low <= 0 <= high for low, high in made if low is not None and high is not None)
    assert inside > 0.88 * len(made), "resamples alone cover five groups in about 82 of 100 cases"
    assert bootstrap_interval([np.ones(1)], rng) == (None, None)


@pytest.mark.parametrize("documents", [1, 2, 5])
def test_too_few_documents_tell_nothing(documents: int) -> None:
    def bits(value: float) -> Metric:
        samples = [value + 0.01 * i for i in range(2 * documents)]
        more = {"samples": samples, "length": 512, "higher_is_better": False}
        made = plain("ppl", "novels", "bits_per_byte", value, 0.01, **more)
        return replace(made, n=len(samples), clusters=[i // 2 for i in range(len(samples))])

    text = board([evaluated(TEACHER, (100,), bits(1.5)), evaluated(HALO, (90,), bits(1.9))])
    line = next(line for line in text.splitlines() if "bits per byte on novels" in line)
    assert line.endswith("**Too few independent groups to tell**.") and "interval" not in line
    assert "neither is ahead" not in text


def test_a_difference_against_the_values_of_the_table_has_no_winner() -> None:
    """Bits per byte weigh documents by size, their paired difference does not."""

    def bits(value: float, each: float) -> Metric:
        more = {"samples": [each] * 20, "length": 512, "higher_is_better": False}
        return replace(plain("ppl", "novels", "bits_per_byte", value, 0.01, **more), n=20)

    records = [evaluated(TEACHER, (100,), bits(1.7, 1.6)), evaluated(HALO, (90,), bits(1.6, 1.7))]
    line = next(line for line in board(records).splitlines() if "bits per byte on novels" in line)
    assert line.endswith("**Not told apart**: the values and their paired difference point opposite ways.")
    agreeing = [evaluated(TEACHER, (100,), bits(1.7, 1.7)), evaluated(HALO, (90,), bits(1.6, 1.6))]
    line = next(line for line in board(agreeing).splitlines() if "bits per byte on novels" in line)
    assert line.endswith("**Better**: HALO = recall\\_drop.")


def test_the_notes_count_groups_and_name_bounds_for_what_they_are() -> None:
    shared = replace(needle(512, hits(24, 48)), clusters=[i // 4 for i in range(48)])
    text = board([record(TEACHER, [shared]), record(HALO, [shared]), record(EVEN, [shared])])
    assert "needles 512 ×1 (trained) 48 in 12 groups" in text and "with g groups" in text
    assert "every answer was the same" not in text and "at worst" not in text
    assert "97.5% bounds, before correction" in text


def test_a_hybrid_that_was_not_tested_is_not_said_to_have_failed() -> None:
    bits = plain("ppl", "modern", "bits_per_byte", 1.7)
    rows = table(board([evaluated(TEACHER, (100,)), evaluated(HALO, (90,)), record(EVEN, [bits])]))
    assert rows["even"]["within 0.02 of teacher"] == "–" and rows[HALO_ROW]["within 0.02 of teacher"] == "not shown"


def test_ruler_is_held_against_the_teacher_at_one_length() -> None:
    """Questions about documents are the same at every length."""
    longer = [replace(model, trained_length=1024) for model in (TEACHER, HALO)]
    records = [record(model, [ruler("qa", 512), ruler("qa", 1024), ruler("qa", 2048)]) for model in longer]
    assert standing_targets(make_board(records).groups[0])["RULER"].lengths == (1024,)


def test_equal_titles_with_other_meanings_name_their_teacher() -> None:
    other = card("other", hash="f" * 16)
    records = [record(model, [ruler(task, 512) for task in tasks])
               for model, tasks in ((TEACHER, ("vt", "cwe")), (other, ("fwe", "qa")))]  # fmt: skip
    lines = [line for line in board(records).splitlines() if "mean score over" in line]
    assert [line.split(": ")[-1] for line in lines] == ["mean score over cwe, vt", "mean score over fwe, qa"]
    assert "tiny" in lines[0] and "other" in lines[1]


def test_what_is_counted_in_the_opening_is_there() -> None:
    def said(*records: RunRecord) -> str:
        return opening(make_board(list(records)).groups).split(". ")[0]

    foreign = [evaluated(card(name, hash=name), (), lineage={"imported": "lm-eval"}) for name in ("a", "b")]
    csr = [replace(one, metrics=[plain("csr", "piqa", "acc", 0.5, 0.1)]) for one in foreign]
    other = card("other", hash="f" * 16)
    assert said(*study()) == "3 hybrids of 1 teacher"
    assert said(evaluated(TEACHER, (9,)), evaluated(other, (9,)), evaluated(HALO, (9,)), *csr) == (
        "1 hybrid of 2 teachers, 2 rows from another harness"
    )
    assert said(evaluated(TEACHER, (9,))) == "1 model" and said(*csr) == "2 rows from another harness"
    assert "<h1>tiny</h1>" in page(make_board([evaluated(TEACHER, (9,))]))


def test_a_hybrid_of_an_unnamed_teacher_has_a_heading() -> None:
    assert "## an unnamed teacher" in board([evaluated(replace(HALO, teacher=""), (90,))])


def test_suites_asked_for_by_task_are_paired_by_their_seed() -> None:
    rows = build_rows(
        [evaluated(model, (90,), settings={"niah:multikey-4": {"seed": i}}) for i, model in enumerate((HALO, EVEN))]
    )
    assert compare(rows, [AT_512]).items[0].method == "independent"


def test_no_band_is_drawn_where_no_error_was_recorded() -> None:
    def accuracies(*errors: float | None) -> list[Metric]:
        return [plain("niah", "multikey-4", "accuracy", 0.5, e, length=512 * 2**i) for i, e in enumerate(errors)]

    dots = [Dot(x=i, y=0.5, y_error=error) for i, error in enumerate((0.1, 0.1, None, 0.1))]
    assert [len(run) for run in runs_with_errors(dots)] == [2, 1]
    records = [record(HALO, accuracies(0.1, 0.1, None, 0.1, 0.0)), record(EVEN, accuracies(None, None, None))]
    drawn = figures(make_board(records).groups[0]).curves[0]
    assert len(bands(drawn)) == 2 and "no band: no standard error" in " ".join(texts(drawn))
    without = figures(make_board(records[1:]).groups[0]).curves[0]
    assert bands(without) == [] and "no standard errors" in texts(without)


def test_what_all_were_trained_on_is_shaded() -> None:
    longer = replace(HALO, trained_length=1024)
    drawn = figures(make_board([evaluated(TEACHER, (100, 43, 1)), evaluated(longer, (90, 80, 70))]).groups[0]).curves[0]
    (shade,) = [part for part in drawn.parts if isinstance(part, Shape) and part.fill == "shade"]
    (end,) = [part.at[0] for part in drawn.parts if isinstance(part, Text) and part.text == "512"]
    assert max(x for x, _ in shade.points) == pytest.approx(end)
    assert "all trained to 512" in texts(drawn)


def profiled(model: ModelCard, *lengths: int, task: str = "tpot_ms") -> RunRecord:
    speed = [plain("profile", task, "median", 1.0 + length, 0.1, length=length) for length in lengths]
    return record(model, speed, kind="profile")


def test_tradeoffs_stand_at_the_length_that_most_were_profiled_at() -> None:
    records = [evaluated(model, (90, 80)) for model in (TEACHER, HALO, EVEN)]
    records += [profiled(TEACHER, 512, 4096), profiled(HALO, 4096, 524_288)]
    (drawn,) = figures(make_board(records).groups[0]).tradeoffs
    said = " ".join(texts(drawn))
    assert "at 4K tokens" in said and "not measured: even" in said


def test_memory_is_a_column_and_an_axis_where_it_was_measured() -> None:
    records = [evaluated(model, (90, 80)) for model in (TEACHER, HALO)]
    small = [profiled(model, 512, task="cache_bytes") for model in (TEACHER, HALO)]
    whole = [profiled(model, 512, 2**20, task="memory_bytes") for model in (TEACHER, HALO)]
    assert table(board([*records, *whole]))["**tiny** (teacher)"]["memory MiB at 512 / 1M"] == "0.000489 / 1.00"
    for more, axis in ((small, "cache"), ([*small, *whole], "memory")):
        (drawn,) = figures(make_board([*records, *more]).groups[0]).tradeoffs
        assert drawn.title.endswith(f" against {axis}")


def test_zeros_everywhere_are_a_chart_like_others() -> None:
    zeros = [plain("niah", "multikey-4", "answer_logprob", 0.0, 0.0, length=length) for length in (512, 1024)]
    group = make_board([record(HALO, [needle(512, hits(90)), needle(1024, hits(80)), *zeros])]).groups[0]
    drawn = figures(group).curves[1]
    places = [value for part in drawn.parts if isinstance(part, Shape) for point in part.points for value in point]
    assert "Log-likelihood" in drawn.title and all(map(math.isfinite, places))


def test_a_whisker_that_runs_off_the_scale_has_no_end() -> None:
    def caps(error: float) -> int:
        drawn = layer_bars("x", {"layers": [], "scores": [1.0, 2.0, 3.0], "stderr": [error, 0.0, 0.0]}, 3)
        lines = [part.points for part in drawn.parts if isinstance(part, Shape) and part.stroke == "ink"]
        return sum(a[1] == b[1] for a, b in lines)

    assert caps(0.2) == 2 and caps(50.0) == 0


def test_a_seventh_hybrid_looks_like_none_before_it() -> None:
    models = [card(f"m{i}", [i, 7], (f"m{i}",)) for i in range(7)]
    looks = looks_of(make_board([evaluated(model, (90 - i,)) for i, model in enumerate(models)]).groups[0])
    assert len({(look.colour, look.mark((0, 0)).points) for look in looks.values()}) == 7


def test_github_makes_no_links_of_names() -> None:
    assert escape("www.example.org a@b.org WWW.x") == "www&#46;example.org a&#64;b.org WWW&#46;x"
    shown = page(make_board([evaluated(card("www.example.org a@b.org"), (90,))]))
    assert "&amp;#" not in shown and "www&#46;example.org a&#64;b.org" in shown


def test_windows_over_other_stretches_of_text_are_not_paired() -> None:
    target = Target(suite="ppl", task="novels", metric="bits_per_byte", lengths=(512,))

    def read(model: ModelCard, bits: float, lengths: list[int]) -> RunRecord:
        samples = [bits + 0.01 * i for i in range(8)]
        novels = plain(
            "ppl", "novels", "bits_per_byte", bits, 0.01, length=512, samples=samples, higher_is_better=False
        )
        return record(model, [novels], settings={"ppl": {"seed": 0, "version": 2, "limit": 8, "lengths": lengths}})

    for lengths, method in (([512], "paired"), ([512, 8192], "independent")):
        rows = build_rows([read(HALO, 1.5, [512]), read(EVEN, 1.6, lengths)])
        assert compare(rows, [target]).items[0].method == method
