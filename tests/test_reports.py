"""Reports on synthetic records: what the tables say, which differences count, and that the plots show something."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from halobench.errors import HalobenchError, UserError
from halobench.records import LedgerRow, Metric, ModelCard, RunRecord
from halobench.reports import write_report
from halobench.reports.charts import spread
from halobench.reports.comparison import Target, bootstrap_interval, bootstrap_means, compare, holm, sign_flip_p
from halobench.reports.figures import needle_figure, needle_title
from halobench.reports.layer_bars import fit, layer_bars, layers_title
from halobench.reports.leaderboard import board_files, make_board
from halobench.reports.palette import LIGHT
from halobench.reports.plots import layers_figure, plots_of
from halobench.reports.rows import build_rows, group_by_teacher
from halobench.reports.scene import save_png
from halobench.reports.table import escape, number, render, signed, significant

ENVIRONMENT = {
    "versions": {"halobench": "0.1.0", "torch": "2.13.0"},
    "hardware": {"processor": "Example CPU", "cores": 2, "threads": 2, "memory": 2**34},
    "system": "Linux",
}
LENGTHS = (512, 1024, 2048)


def card(name: str, kept: list[int] | None = None, selectors: tuple[str, ...] = (), **changes: object) -> ModelCard:
    spent = [LedgerRow(what="align", tokens=500_000, seconds=60.0)] if kept is not None else []
    fields = {
        "path": f"runs/{name}",
        "hash": f"{name}-0123456789abcdef"[:16],
        "layers": 8,
        "parameters": 1_840_000,
        "teacher": "tiny",
        "positions": "rope" if kept is None else "hype",
        "trained_length": 512,
        "ledger": spent,
    }
    return ModelCard(name=name, kept=kept, selectors=list(selectors), **(fields | changes))  # type: ignore[arg-type]


def needle(length: int, samples: list[float]) -> Metric:
    values = np.array(samples)
    return Metric(
        suite="niah",
        task="multikey-4",
        metric="accuracy",
        value=float(values.mean()),
        n=len(samples),
        stderr=float(values.std(ddof=1) / math.sqrt(len(samples))),
        length=length,
        samples=samples,
    )


def hits(count: int, of: int = 100) -> list[float]:
    """The first `count` questions answered: models nest, as similar models nearly do."""
    return [1.0] * count + [0.0] * (of - count)


def record(model: ModelCard, metrics: list[Metric] | None = None, **changes: object) -> RunRecord:
    fields = {
        "kind": "eval",
        "settings": {"niah": {"seed": 0, "limit": 100}},
        "environment": ENVIRONMENT,
        "command": "halobench eval",
    }
    return RunRecord(model=model, metrics=metrics or [], **(fields | changes))  # type: ignore[arg-type]


def evaluated(model: ModelCard, counts: tuple[int, ...], *others: Metric, **changes: object) -> RunRecord:
    needles = [needle(length, hits(count)) for length, count in zip(LENGTHS, counts, strict=False)]
    return record(model, [*needles, *others], **changes)


def plain(suite: str, task: str, metric: str, value: float, stderr: float | None = None, **more: object) -> Metric:
    return Metric(suite=suite, task=task, metric=metric, value=value, n=50, stderr=stderr, **more)  # type: ignore[arg-type]


TEACHER = card("tiny")
HALO = card("halo", [2, 7], ("halo", "recall_drop"))
EVEN = card("even", [3, 7], ("even",))
ROPE = card("halo-rope", [2, 7], ("halo", "recall_drop"), positions="rope")


def study() -> list[RunRecord]:
    return [
        evaluated(EVEN, (80, 70, 70)),
        evaluated(HALO, (90, 91, 92)),
        evaluated(ROPE, (98, 40, 2)),
        evaluated(TEACHER, (100, 43, 1)),
    ]


def selection() -> RunRecord:
    scores = {
        "halo": [0.1, 0.4, 24_700.0, 0.2, 0.3, 0.1, 0.9, 8.0],
        "recall_drop": [0.0, 0.1, 0.4, 0.1, 0.0, 0.1, 0.2, 0.97],
    }
    methods = {
        "halo": {"label": "HALO", "layers": [2, 7], "scores": scores["halo"], "stderr": None, "cost_tokens": 600_000},
        "recall_drop": {
            "label": "recall drop",
            "layers": [2, 7],
            "scores": scores["recall_drop"],
            "stderr": [0.02] * 8,
            "cost_tokens": 600_000,
        },
        "even": {"label": "even spacing", "layers": [3, 7], "scores": [], "stderr": None, "cost_tokens": 0},
    }
    return record(TEACHER, kind="select", details={"selection": {"keep": 2, "methods": methods}})


def table(text: str, heading: str = "| selection ") -> dict[str, dict[str, str]]:
    """The cells of the Markdown table that starts with `heading`, by first cell and column title."""
    lines = text[text.index(heading) :].splitlines()
    body = list(takewhile(lambda line: line.startswith("|"), lines))
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body]
    assert len({len(row) for row in cells}) == 1, "every line of a table has as many cells as its header"
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def marked(text: str) -> list[str]:
    """The cells that carry the mark of the best hybrid."""
    return [cell for row in table(text).values() for cell in row.values() if cell.endswith("best**")]


def board(records: list[RunRecord]) -> str:
    return board_files(make_board(records), {})["leaderboard.md"]


def test_the_table_repeats_the_numbers_of_the_records() -> None:
    margin = plain("csr", "tiny_continuation", "margin", 0.1873, 0.0142)
    accuracy = plain("csr", "tiny_continuation", "acc", 0.515, 0.018)
    bits = plain("ppl", "modern", "bits_per_byte", 1.7104, 0.0061, higher_is_better=False)
    speed = [
        plain("profile", "tpot_ms", "median", 3.25, length=512),
        plain("profile", "tpot_ms", "median", 4.375, length=8192),
        plain("profile", "cache_bytes", "value", 2.5 * 2**20, length=512),
        plain("profile", "cache_bytes", "value", 12.0 * 2**20, length=8192),
    ]
    records = [
        evaluated(TEACHER, (100,)),
        evaluated(HALO, (90, 91), margin, accuracy, bits),
        record(HALO, speed, kind="profile"),
    ]
    row = table(board(records))["HALO = recall\\_drop"]
    stderr = np.std(hits(90), ddof=1) / 10
    assert row["needles 512 ×1 (trained)"] == f"0.900 ±{stderr:.3f}"
    assert row["needles 1K ×2"].startswith("0.910 ±")
    assert row["CSR margin (acc)"] == "0.187 ±0.014 (0.515)"
    assert row["bits per byte, modern"] == "1.710 ±0.006"
    assert row["TPOT ms at 512 / 8K"] == "3.25 / 4.38"
    assert row["cache MiB at 512 / 8K"] == "2.50 / 12.0"
    assert (row["kept layers (of 8)"], row["positions"], row["tokens"]) == ("2, 7", "HyPE", "500K")


def test_the_teacher_comes_first_and_hybrids_follow_by_needles_beyond_training() -> None:
    rows = list(table(board([*study(), selection()])))
    assert rows == ["**tiny** (teacher)", "HALO = recall drop", "even spacing", "HALO = recall drop (RoPE kept)"]


def test_what_was_not_measured_is_a_dash() -> None:
    text = board([evaluated(TEACHER, (100, 40)), evaluated(HALO, (90,), plain("ppl", "modern", "bits_per_byte", 1.7))])
    rows = table(text)
    assert rows["**tiny** (teacher)"]["bits per byte, modern"] == "–"
    assert rows["HALO = recall\\_drop"]["needles 1K ×2"] == "–"
    assert rows["HALO = recall\\_drop"]["bits per byte, modern"] == "1.700"
    assert "TPOT" not in text.split("## Notes")[0]


def test_running_out_of_memory_is_a_result() -> None:
    speed = [plain("profile", "tpot_ms", "batch-1", 3.0, length=length) for length in (512, 8192)]
    rows = [{"context": 512, "status": "ok"}, {"context": 8192, "status": "oom", "error": "8 GiB wanted"}]
    records = [evaluated(TEACHER, (100,)), record(TEACHER, speed[:1], kind="profile", details={"rows": rows})]
    records += [evaluated(HALO, (90,)), record(HALO, speed, kind="profile")]
    text = board(records)
    assert table(text)["**tiny** (teacher)"]["TPOT ms at 512 / 8K"] == "3.00 / out of memory"
    assert "**Failed**: profile of tiny: out of memory at 8K tokens" in text
    bits = plain("ppl", "modern", "bits_per_byte", 1.7)
    whole = record(EVEN, status="error", error="CUDA out of memory", settings={"ppl": {"seed": 0}})
    row = table(board([evaluated(HALO, (90,), bits), whole]))["even"]
    assert (row["bits per byte, modern"], row["needles 512 ×1 (trained)"]) == ("out of memory", "–")


def test_a_length_without_memory_stands_beside_those_that_were_measured() -> None:
    failed = [{"suite": "niah", "task": "multikey-4", "length": 1024, "error": "out of memory"}]
    row = table(board([evaluated(HALO, (90, 91)), evaluated(EVEN, (80,), details={"failed": failed})]))["even"]
    assert row["needles 1K ×2"] == "out of memory" and row["needles 512 ×1 (trained)"].startswith("0.800")


def test_an_advantage_over_every_other_hybrid_is_marked_and_noise_is_not() -> None:
    clear = table(board([evaluated(TEACHER, (100, 43)), evaluated(HALO, (90, 91)), evaluated(EVEN, (89, 60))]))
    assert clear["HALO = recall\\_drop"]["needles 1K ×2"].endswith("best**")
    assert "best" not in clear["HALO = recall\\_drop"]["needles 512 ×1 (trained)"], "90 against 89 is noise"
    third = card("third", [4, 7], ("third",))
    records = [evaluated(HALO, (90, 91)), evaluated(EVEN, (89, 60)), evaluated(third, (90, 90))]
    assert marked(board(records)) == [], "ahead of one rival is not ahead of all"


def test_a_lead_without_uncertainty_is_never_a_win() -> None:
    bare = [
        record(model, [plain("niah", "multikey-4", "accuracy", value, length=1024)])
        for model, value in ((TEACHER, 0.4), (HALO, 0.95), (EVEN, 0.1))
    ]
    text = board(bare)
    assert marked(text) == []
    assert "no uncertainty was recorded, so no difference is claimed" in text
    assert "**Better**" not in text


def test_lower_is_better_where_the_record_says_so() -> None:
    def bits(value: float) -> Metric:
        return plain("ppl", "modern", "bits_per_byte", value, 0.01, higher_is_better=False)

    rows = build_rows([record(HALO, [bits(1.6)]), record(EVEN, [bits(1.8)])])
    target = Target(suite="ppl", task="modern", metric="bits_per_byte")
    made = compare(rows, [target])
    assert made.items[0].method == "independent"
    assert made.items[0].difference == pytest.approx(-0.2)
    assert made.best(target) == rows[0].key


def test_holms_correction_changes_a_verdict() -> None:
    models = [HALO, EVEN, *(card(f"m{i}", [i, 7], (f"m{i}",)) for i in range(4))]
    rows = build_rows([evaluated(model, (70 - 7 * (i == 0),)) for i, model in enumerate(models)])
    target = Target(suite="niah", task="multikey-4", metric="accuracy", lengths=(512,))
    alone = compare(rows, [target], pairs=[(rows[0], rows[1])]).items[0]
    among = compare(rows, [target]).between(rows[0].key, rows[1].key, target)
    assert among is not None
    assert alone.p == pytest.approx(2 / 2**7, abs=0.004) and alone.significant and alone.winner == rows[1].key
    assert among.p == pytest.approx(alone.p, abs=0.004)
    assert among.adjusted is not None and among.adjusted > 0.05 and not among.significant


def test_holm_follows_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_bootstrap_agrees_with_the_analytic_standard_error() -> None:
    rng = np.random.default_rng(0)
    binary, continuous = rng.integers(-1, 2, 300).astype(float), rng.normal(0.3, 2.0, 200)
    for strata in ([binary], [continuous], [binary, continuous]):
        analytic = math.sqrt(sum(values.var() / len(values) for values in strata)) / len(strata)
        means = bootstrap_means(strata, np.random.default_rng(1), 20_000)
        centre = np.mean([values.mean() for values in strata])
        assert means.std() == pytest.approx(analytic, rel=0.03)
        assert means.mean() == pytest.approx(centre, abs=0.05 * analytic)
        low, high = bootstrap_interval(strata, np.random.default_rng(1))
        assert (low, high) == pytest.approx((centre - 1.96 * analytic, centre + 1.96 * analytic), abs=0.15 * analytic)
    assert bootstrap_interval([binary], np.random.default_rng(5)) == bootstrap_interval(
        [binary], np.random.default_rng(5)
    )


def test_the_sign_flip_test_is_exact_for_few_questions_and_keeps_its_level() -> None:
    assert sign_flip_p([np.ones(4)], np.random.default_rng(0)) == pytest.approx(2 / 16, abs=0.01)
    assert sign_flip_p([np.zeros(9)], np.random.default_rng(0)) == 1.0
    rng = np.random.default_rng(3)
    p_values = [sign_flip_p([rng.normal(size=30)], rng, 500) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09


def test_questions_drawn_with_another_seed_are_not_paired() -> None:
    target = Target(suite="niah", task="multikey-4", metric="accuracy", lengths=(512,))
    rows = build_rows([evaluated(HALO, (90,)), evaluated(EVEN, (80,), settings={"niah": {"seed": 1}})])
    assert compare(rows, [target]).items[0].method == "independent"
    rows = build_rows([evaluated(HALO, (90,)), evaluated(EVEN, (80,))])
    assert compare(rows, [target]).items[0].method == "paired"


def clustered(length: int, right: list[float], size: int) -> list[Metric]:
    """Accuracy and log-likelihood whose standard errors know that `size` consecutive questions share a haystack."""
    made = []
    noise = np.random.default_rng(length).normal(size=len(right))
    for name, values in (("accuracy", np.array(right)), ("answer_logprob", np.array(right) + noise)):
        sums = (values - values.mean()).reshape(-1, size).sum(axis=1)
        stderr = math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(values)
        made.append(replace(needle(length, values.tolist()), metric=name, stderr=stderr))
    return made


def test_questions_about_one_haystack_count_once() -> None:
    """Sixteen haystacks of four questions: four haystacks lost are four pieces of evidence, not sixteen."""
    worse, better = [0.0] * 16 + [1.0] * 48, [1.0] * 63 + [0.0]
    target = Target(suite="niah", task="multikey-4", metric="accuracy", lengths=(512,))
    found = {}
    for size in (1, 4):
        rows = build_rows([record(HALO, clustered(512, better, size)), record(EVEN, clustered(512, worse, size))])
        found[size] = compare(rows, [target]).items[0]
    assert (found[1].n, found[1].clusters) == (64, 64) and (found[4].n, found[4].clusters) == (64, 16)
    assert found[1].p is not None and found[1].p < 0.001 and found[1].winner == HALO.hash
    assert found[4].p is not None and found[4].p > 0.05 and found[4].winner is None
    assert found[1].difference == pytest.approx(found[4].difference)


def test_what_lies_beyond_training_is_beyond_the_hybrids_last_stage() -> None:
    longer = [replace(model, trained_length=1024) for model in (HALO, EVEN)]
    text = board([evaluated(TEACHER, (100, 43, 1)), *(evaluated(model, (90, 80, 70)) for model in longer)])
    assert {"needles 512 ×0.5", "needles 1K ×1 (trained)", "needles 2K ×2"} <= set(table(text)["even"])
    assert table(text)["even"]["needles beyond training"].startswith("0.700 ±")
    assert "needles within the training length (512, ×0.5)" in text, "1K is beyond what the teacher was trained on"


def test_commonsense_tasks_have_a_mean() -> None:
    tasks = [plain("csr", "piqa", "acc", 0.6, 0.03), plain("csr", "piqa", "acc_norm", 0.7, 0.03)]
    tasks.append(plain("csr", "lambada_openai", "acc", 0.5, 0.04))
    rows = table(board([evaluated(HALO, (90,), *tasks), evaluated(TEACHER, (100,))]))
    assert rows["HALO = recall\\_drop"]["CSR mean (2 tasks)"] == "0.600 ±0.025"
    assert rows["**tiny** (teacher)"]["CSR mean (2 tasks)"] == "–"


def test_the_sentences_follow_the_comparisons() -> None:
    text = board([*study(), selection()])
    even = next(line for line in text.splitlines() if line.startswith("- **HALO against even spacing**"))
    assert "1K to 2K, ×2 to ×4" in even and "HALO = recall drop 0.915" in even and "even spacing 0.700" in even
    assert "difference +0.215, 95% interval +0." in even and "(200 samples, p < 0.001)" in even
    assert even.endswith("**Better**: HALO = recall drop.")
    beyond, inside = [line for line in text.splitlines() if line.startswith("- **HyPE against RoPE kept**")]
    assert beyond.endswith("**Better**: HALO = recall drop.")
    assert inside.endswith("**Better**: HALO = recall drop (RoPE kept).")
    assert "is ahead of every other, each difference beyond noise" in text
    level = board([evaluated(HALO, (90, 91)), evaluated(EVEN, (80, 90))])
    assert "**Not told apart**" in level and "not told apart from even" in level


def test_equal_choices_share_a_row_and_say_so() -> None:
    again = card("halo", [2, 7], ("kl",), hash=HALO.hash)
    records = [
        evaluated(TEACHER, (100, 43)),
        evaluated(HALO, (90, 91)),
        record(again, [plain("ppl", "m", "bits_per_byte", 2.0)]),
    ]
    rows = table(board([*records, selection()]))
    assert list(rows) == ["**tiny** (teacher)", "HALO = recall drop = kl"]
    same = evaluated(card("both", [3, 7], ("halo", "even")), (80, 70))
    assert "HALO and even spacing chose the same layers (3, 7)" in board([evaluated(TEACHER, (100, 43)), same])


def test_two_models_of_one_name_are_both_shown_apart() -> None:
    twins = [
        evaluated(card("twin", [2, 7], ("kl",), hash=f"{mark}" * 16), (count,))
        for mark, count in (("a", 90), ("b", 10))
    ]
    rows = table(board(twins))
    assert [name.replace("\\", "") for name in rows] == ["kl (twin) #aaaaaaaa", "kl (twin) #bbbbbbbb"]
    teachers = build_rows([evaluated(card("tiny", hash="c" * 16), (1,)), evaluated(card("tiny", hash="d" * 16), (2,))])
    assert [row.label for row in teachers] == ["tiny #cccccccc", "tiny #dddddddd"]


def test_hybrids_stand_under_their_own_teacher() -> None:
    small, large = card("small", teacher="small"), card("large", teacher="large")
    by_hash = card("x", [1], ("kl",), teacher=large.hash)
    by_name = card("y", [1], ("even",), teacher="small")
    orphan = card("z", [1], ("halo",), teacher="gone")
    groups = group_by_teacher(build_rows([evaluated(c, (50,)) for c in (by_hash, small, orphan, by_name, large)]))
    found = {group.name: [row.card.name for row in group.rows] for group in groups}
    assert found == {"small": ["small", "y"], "large": ["large", "x"], "gone": ["z"]}


def test_the_newer_of_two_measurements_counts() -> None:
    old = evaluated(HALO, (10,), created="2025-01-01T00:00:00+00:00")
    new = evaluated(HALO, (90,), created="2025-01-02T00:00:00+00:00")
    metric = build_rows([new, old])[0].metric("niah", "multikey-4", "accuracy", 512)
    assert metric is not None and metric.value == 0.9


HOSTILE = "<script>x</script>|`a`*b*_c_[l](javascript:1)$y$\n# h\u202e"


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    model = card(HOSTILE, [2, 7], (HOSTILE,), hash="e" * 16, mixer=HOSTILE)
    failed = record(model, kind="profile", status="error", error=HOSTILE)
    run = tmp_path / "run"
    run.mkdir()
    for i, made in enumerate([evaluated(TEACHER, (100, 40)), evaluated(model, (90, 80)), failed]):
        made.save(run / f"{i}.record.json")
    written = write_report([run], tmp_path / "out")
    text = written[0].read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text and "\u202e" not in text
    shown = r"&lt;script&gt;x&lt;/script&gt;\|\`a\`\*b\*\_c\_\[l\](javascript:1)\$y\$ \# h"
    assert text.count(shown) == text.count("script&gt;x"), "every mention is escaped in full"
    assert len(table(text)) == 2, "the bar in the name did not split its row"
    assert (tmp_path / "out" / "needles.png").is_file()


def test_escaping_and_number_formats() -> None:
    assert escape("a|b") == "a\\|b" and escape("x\n\ny") == "x y" and escape("1 < 2 & 3") == "1 &lt; 2 &amp; 3"
    assert number(0.9124, 0.0138) == "0.912 ±0.014" and number(None) == "–" and number(math.nan) == "–"
    assert (
        number(-0.0001) == "0.000" and signed(0.15) == "+0.150" and signed(-0.2) == "-0.200" and signed(0.0) == "0.000"
    )
    figures = [significant(x) for x in (0.012345, 18.94, 10432.0, 9.999, 0.0)]
    assert figures == ["0.0123", "18.9", "10400", "10.0", "0"]
    with pytest.raises(ValueError, match="2 cells"):
        render(["a", "b"], [["only one"]])


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def close_to(image: np.ndarray, colour: str) -> int:
    """How many pixels have this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image - wanted).max(axis=-1) < 0.02).sum())


def test_the_needle_plot_draws_every_model_in_its_colour(tmp_path: Path) -> None:
    (group,) = make_board(study()).groups
    drawn = needle_figure(group)
    assert drawn is not None
    image = pixels(save_png(drawn, tmp_path / "needles.png"))
    assert image.shape[1] > 1500 and image.std() > 0.05
    for role in ("ink", "s0", "s1", "s2"):
        assert close_to(image, LIGHT[role]) > 300, f"{role} is missing"
    assert close_to(image, LIGHT["s3"]) == 0, "no fourth hybrid was given"
    assert close_to(image, LIGHT["paper"]) > image.shape[0] * image.shape[1] / 2
    assert (
        needle_title(group)
        == "At 2K tokens, 4 times the training length, HALO = recall_drop finds 92% of the needles, the teacher 1%"
    )
    save_png(drawn, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "needles.png").read_bytes()


def test_the_layer_plot_highlights_what_is_kept_and_fits_an_extreme_score(tmp_path: Path) -> None:
    image = pixels(save_png(layers_figure(selection()), tmp_path / "layers.png"))
    assert close_to(image, LIGHT["kept"]) > 5_000 and close_to(image, LIGHT["rest"]) > 5_000
    scale = fit([0.1, 0.4, 24_700.0, 0.2, 0.3, 0.1, 0.9, 0.5], [0.0] * 8)
    assert scale.base == 0 and 0.9 < scale.high < 3, "the extreme score does not flatten the others"
    narrow = fit([-0.84, -0.79, -0.86, -0.71], [0.01] * 4)
    assert narrow.base == narrow.low and -1.0 < narrow.low < -0.87
    assert layers_title(selection().details["selection"]["methods"]) == "Layer 7 is kept by all 3 selectors"


def test_scores_that_are_alike_but_for_one_are_drawn() -> None:
    drawn = layer_bars("x", {"layers": [3], "scores": [1.0, 1.0, 1.0, 100.0]}, 4)
    assert len([part for part in drawn.parts if getattr(part, "data", False)]) == 4


def test_what_was_not_measured_is_not_drawn() -> None:
    assert [plot.stem for plot in plots_of(make_board([record(HALO), record(TEACHER, kind="select")]))] == []


def test_labels_are_pushed_apart_and_stay_in_order() -> None:
    places = spread([0.91, 0.90, 0.02, 0.01, 0.0], 0.1, 0.0, 1.0)
    assert all(a - b >= 0.1 - 1e-9 for a, b in zip(places, places[1:], strict=False)) and places[-1] == 0.0
    assert places[0] == 0.91


def test_write_report_makes_the_whole_folder_and_counts_a_record_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    for made in study():
        made.save(run / "eval" / f"{made.model.name}.record.json")
    selection().save(run / "select.record.json")
    written = write_report([run, run / "eval"], tmp_path / "report")
    names = ["leaderboard.md", "report.html", "leaderboard.csv", "leaderboard.json"]
    names += [f"{stem}.{kind}" for stem in ("needles", "curves", "heatmap", "layers") for kind in ("png", "svg")]
    assert [path.name for path in written] == names and all(path.is_file() for path in written)
    text = written[0].read_text(encoding="utf-8")
    assert "](needles.png)" in text and "](layers.png)" in text and str(tmp_path) not in text
    for part in ("**Seeds**: eval 0", "torch 2.13.0", "Example CPU, 2 cores", "needles 512 ×1 (trained) 100"):
        assert part in text
    rows = json.loads(written[3].read_text(encoding="utf-8"))["groups"][0]["rows"]
    assert [row["label"] for row in rows][:2] == ["tiny", "HALO = recall drop"]
    assert rows[1]["metrics"][0]["value"] in (0.9, 0.91, 0.92) and "samples" not in rows[1]["metrics"][0]
    with written[2].open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12 and {line["length"] for line in lines} == {"512", "1024", "2048"}


def test_a_damaged_record_is_one_clear_line(tmp_path: Path) -> None:
    whole = study()[0].save(tmp_path / "a.record.json").read_text(encoding="utf-8")
    (tmp_path / "a.record.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(HalobenchError, match=r"a\.record\.json is not valid JSON") as caught:
        write_report([tmp_path], tmp_path / "out")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.record.json").write_text('{"schema": 1, "kind": "eval"}', encoding="utf-8")
    with pytest.raises(UserError, match="lacks the field 'model'"):
        write_report([tmp_path], tmp_path / "out")
