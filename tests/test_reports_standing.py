"""Statistics of a report: clusters as noted, being as good as the teacher, one correction for both kinds of test."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from halobench.errors import UserError
from halobench.reports.comparison import compare, holm
from halobench.reports.leaderboard import make_board
from halobench.reports.pairing import Target, paired_strata
from halobench.reports.rows import build_rows
from halobench.reports.standing import reach, stand, tail
from tests.test_reports import EVEN, HALO, TEACHER, board, evaluated, hits, needle, plain, record, table

TARGET = Target(suite="niah", task="multikey-4", metric="accuracy", lengths=(512,))


def with_clusters(samples: list[float], clusters: list[int]):
    return replace(needle(512, samples), clusters=clusters)


def test_noted_clusters_count_once_wherever_their_questions_stand() -> None:
    """Four haystacks whose questions are interleaved: no standard error is needed to know it."""
    worse, better = [0.0, 1.0, 1.0, 1.0] * 16, [1.0] * 64
    clusters = [0, 1, 2, 3] * 16
    rows = build_rows([record(HALO, [with_clusters(better, clusters)]), record(EVEN, [with_clusters(worse, clusters)])])
    made = compare(rows, [TARGET]).items[0]
    assert (made.n, made.clusters) == (64, 4) and made.winner is None, "one haystack lost is no evidence"
    assert made.difference == pytest.approx(0.25)


def test_unequal_clusters_weigh_every_question_alike() -> None:
    left, right = [1.0] * 10, [1.0] * 4 + [0.0] * 6
    clusters = [7, 7, 7, 7, 1, 1, 2, 2, 2, 2]
    rows = build_rows([record(HALO, [with_clusters(left, clusters)]), record(EVEN, [with_clusters(right, clusters)])])
    strata = paired_strata(rows[0], rows[1], TARGET)
    assert strata is not None and len(strata[0]) == 3 and strata[0].mean() == pytest.approx(0.6)


def test_questions_of_other_clusters_are_not_paired() -> None:
    values = hits(50)
    made = [with_clusters(values, [i // size for i in range(100)]) for size in (2, 4)]
    rows = build_rows([record(HALO, [made[0]]), record(EVEN, [made[1]])])
    assert paired_strata(rows[0], rows[1], TARGET) is None
    renamed = with_clusters(values, [9 - i // 2 for i in range(100)])
    rows = build_rows([record(HALO, [made[0]]), record(EVEN, [renamed])])
    assert paired_strata(rows[0], rows[1], TARGET) is not None, "numbers of clusters are only names"


def test_students_distribution_is_right() -> None:
    """Values of the usual table."""
    assert tail(2.228, 10) == pytest.approx(0.025, abs=1e-5) and tail(1.0, 1) == pytest.approx(0.25, abs=1e-6)
    assert tail(-2.228, 10) == pytest.approx(0.975, abs=1e-5) and tail(1.96, 0) == pytest.approx(0.025, abs=1e-4)
    assert reach(30) == pytest.approx(2.0423, abs=1e-3) and reach(0) == pytest.approx(1.96, abs=1e-3)


def standing(questions: int, lost: int, won: int = 0, margin: float = 0.02):
    ours = [0.0] * lost + [1.0] * (questions - lost)
    teachers = [1.0] * (questions - won) + [0.0] * won
    rows = build_rows([record(TEACHER, [needle(512, teachers)]), record(HALO, [needle(512, ours)])])
    return stand(rows[1], rows[0], TARGET, margin)


def test_equal_answers_to_few_questions_prove_nothing() -> None:
    few, many = standing(48, 0), standing(2000, 0)
    assert few.lowest is not None and few.lowest < -0.02 and few.p is not None and few.p > 0.05
    assert many.lowest is not None and many.lowest > -0.02 and many.p is not None and many.p < 0.001


@pytest.mark.parametrize(("questions", "margin"), [(60, 0.1), (60, 0.3), (200, 0.02), (400, 0.02)])
def test_a_hybrid_that_is_worse_by_the_margin_is_rarely_shown_to_be_as_good(questions: int, margin: float) -> None:
    """Summed over every number of lost questions: an error of at most 2.5%, yet a test that can find something."""

    def chance(lost: int, rate: float) -> float:
        return math.comb(questions, lost) * rate**lost * (1 - rate) ** (questions - lost)

    passing = [
        lost for lost in range(int(3 * margin * questions)) if (standing(questions, lost, 0, margin).p or 0) < 0.05
    ]
    assert sum(chance(lost, margin) for lost in passing) <= 0.025
    assert passing == list(range(len(passing))) and (questions < 400 or passing)


def test_haystacks_lost_whole_count_once_each() -> None:
    """Each of 150 haystacks of 13 questions is lost with a chance of 2%: in 4.8% of all studies none is."""

    def shown(lost: int) -> bool:
        clusters = [i // 13 for i in range(150 * 13)]
        ours = replace(needle(512, [0.0] * (13 * lost) + [1.0] * (13 * (150 - lost))), clusters=clusters)
        teachers = replace(needle(512, [1.0] * (150 * 13)), clusters=clusters)
        rows = build_rows([record(TEACHER, [teachers]), record(HALO, [ours])])
        return (stand(rows[1], rows[0], TARGET).p or 0) < 0.05

    chances = [math.comb(150, lost) * 0.02**lost * 0.98 ** (150 - lost) for lost in range(5)]
    assert sum(chance for lost, chance in enumerate(chances) if shown(lost)) <= 0.025


@pytest.mark.parametrize("sizes", [(5, 2000), (2000, 2000)])
def test_a_small_task_beside_a_large_one_weighs_as_much_and_knows_as_little(sizes: tuple[int, int]) -> None:
    """The small task loses twice the margin, the large one nothing: the mean is worse by the margin."""
    target = Target(suite="csr", task="a", metric="acc", also=(("b", "acc"),))

    def answers(lost: int):
        made = [[0.0] * lost + [1.0] * (sizes[0] - lost), [1.0] * sizes[1]]
        values = [(task, samples, sum(samples) / len(samples)) for task, samples in zip("ab", made, strict=True)]
        return [replace(plain("csr", task, "acc", v, 0.0, samples=s), n=len(s)) for task, s, v in values]

    def shown(lost: int) -> bool:
        rows = build_rows([record(TEACHER, answers(0)), record(HALO, answers(lost))])
        return (stand(rows[1], rows[0], target).p or 0) < 0.05

    n, rate = sizes[0], 0.04
    passing = [lost for lost in range(min(n + 1, 90)) if shown(lost)]
    assert sum(math.comb(n, lost) * rate**lost * (1 - rate) ** (n - lost) for lost in passing) <= 0.025
    assert bool(passing) == (n == 2000)


def test_being_as_good_is_corrected_with_the_marks_of_the_table() -> None:
    rows = build_rows([evaluated(TEACHER, (100,)), evaluated(HALO, (97,)), evaluated(EVEN, (96,))])
    made = compare(rows, [TARGET], teacher=rows[0], standing=[TARGET], margin=0.1)
    family = [test.p for test in (*made.items, *made.standings)]
    assert len(family) == 3 + 2 and made.tested == 5
    adjusted = [test.adjusted for test in (*made.items, *made.standings)]
    assert adjusted == pytest.approx(holm([p for p in family if p is not None]))


def test_the_table_says_in_what_a_hybrid_is_as_good_as_its_teacher() -> None:
    def csr(share: float):
        samples = hits(round(4000 * share), 4000)
        stderr = math.sqrt(share * (1 - share) / 4000)
        return replace(plain("csr", "piqa", "acc_norm", share, stderr), n=4000, samples=samples)

    records = [
        evaluated(TEACHER, (100,), csr(0.7)),
        evaluated(HALO, (90,), csr(0.699)),
        evaluated(EVEN, (30,), csr(0.6)),
    ]
    text = board(records)
    column = {name: cells["within 0.02 of teacher"] for name, cells in table(text).items()}
    assert column == {"**tiny** (teacher)": "–", "HALO = recall\\_drop": "CSR", "even": "not shown"}
    line = next(
        line for line in text.splitlines() if line.startswith("- **As good as the teacher** to within 0.02, CSR")
    )
    assert "shown for HALO = recall\\_drop (-0.0" in line and "not shown for even (-0.1" in line
    wide = make_board(records, margin=0.3).marks[0]
    assert sum(made.shown for made in wide.standings) == 3, "both in commonsense, and one in needles"
    for wrong in (0.0, -0.1, 1.0, math.nan):
        with pytest.raises(UserError, match="--margin"):
            make_board(records, margin=wrong)
