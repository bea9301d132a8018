"""The page of the oracle: every selector's choice, cost, stability and regret, what it became, and what is real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halobench.errors import HalobenchError
from halobench.records import RunRecord
from halobench.reports.comparison import holm
from halobench.reports.regret import ACCURACY, GOALS, Goal, Oracle, Set
from halobench.reports.table import MISSING, Markup, clean, escape, number, render
from halobench.units import format_count, format_length

OURS, COSTLY = "joint", "kl-ls"


@dataclass(frozen=True)
class Study:
    """All teachers' oracles for one goal, in one order."""

    goal: Goal
    oracles: list[Oracle]

    @property
    def methods(self) -> list[str]:
        """Selectors that every teacher has, in the records' order."""
        first = self.oracles[0].methods
        return [name for name in first if all(o.chosen(name) in o.judged for o in self.oracles)]

    @property
    def unjudged(self) -> list[str]:
        """Selectors with a choice of which no conversion ended well."""
        everyone = {name: None for oracle in self.oracles for name in oracle.methods}
        return [name for name in everyone if name not in self.methods]

    def label(self, method: str) -> str:
        """What people call the selector."""
        return str(self.oracles[0].methods[method]["label"])

    def chosen(self, method: str) -> list[Set]:
        """Its set for each teacher."""
        return [kept for oracle in self.oracles if (kept := oracle.chosen(method)) is not None]

    def regrets(self, method: str) -> np.ndarray:
        """Resampled regret, mean over the teachers, in the goal's unit."""
        return np.mean([o.lost(kept) for o, kept in zip(self.oracles, self.chosen(method), strict=True)], axis=0)

    def regret(self, method: str) -> float:
        """Regret, mean over the teachers."""
        pairs = zip(self.oracles, self.chosen(method), strict=True)
        return float(np.mean([oracle.regret(kept).value for oracle, kept in pairs]))

    def chance(self) -> float:
        """What a random choice loses, mean over the teachers."""
        return float(np.mean([o.top - o.chance for o in self.oracles]))


def oracle_page(records: Sequence[RunRecord]) -> str:
    """The whole page, as Markdown, from the oracles' records of one or more teachers."""
    studies = _studies(records)
    parts = [_opening(studies[0]), "## Selectors\n\n" + _selectors(studies), "## What is real\n\n" + _real(studies)]
    parts += ["## By teacher\n\n" + "\n\n".join(_teacher(studies, place) for place in range(len(records)))]
    parts += ["## Agreement\n\n" + _agreement(studies[0])]
    return "\n\n".join(parts) + "\n"


def oracle_table(records: Sequence[RunRecord]) -> str:
    """The page's table of selectors alone, with what it was measured on."""
    studies = _studies(records)
    return f"{_selectors(studies)}\n\n{_opening(studies[0])}"


def _studies(records: Sequence[RunRecord]) -> list[Study]:
    studies = [Study(goal, [Oracle(record, goal) for record in records]) for goal in GOALS]
    if len({(o.keep, o.layers, str(o.record.settings["oracle"])) for o in studies[0].oracles}) > 1:
        raise HalobenchError("these oracles differ in layers, kept layers or settings; report each by itself")
    return studies


def _opening(study: Study) -> str:
    first = study.oracles[0]
    settings = first.record.settings["oracle"]
    tokens = int(first.record.details["oracle"]["tokens"])
    names = ", ".join(escape(o.teacher) for o in study.oracles)
    sets = [len(o.screened) for o in study.oracles]
    failed = sum(len(o.failed) for o in study.oracles)
    lengths = "/".join(f"×{m}" for m in settings["lengths"])
    return (
        f"Teachers: {names}. Every set of {first.keep} of {first.layers} layers was kept as softmax and converted "
        f"({max(sets)} sets, {format_count(tokens)} tokens each, seed 0); the sets that selectors chose and the "
        f"{settings['leaders']} best were then converted with {settings['judges']} more seeds, and regrets come from "
        f"those alone. Needles at {lengths} of the training length, {settings['haystacks']} haystacks each. "
        + (f"{failed} conversions diverged and are left out. " if failed else "")
        + "Intervals are 95%, over haystacks and training noise; the teachers are these, not a sample of all."
    )


def _selectors(studies: Sequence[Study]) -> str:
    recall, accuracy, text = studies
    rows: list[list[str]] = []
    for method in sorted(recall.methods, key=recall.regret):
        sets = " ".join(_braces(kept) for kept in recall.chosen(method))
        entries = [oracle.methods[method] for oracle in recall.oracles]
        low, high = np.quantile(recall.regrets(method), [0.025, 0.975])
        rows.append(
            [
                recall.label(method),
                Markup(sets),
                Markup(f"{number(recall.regret(method), digits=2)} [{low:.2f}, {high:.2f}]"),
                number(recall.regret(method) / recall.chance(), digits=2),
                number(accuracy.regret(method), digits=3),
                number(text.regret(method), digits=3),
                _mean([e.get("stability") for e in entries], 2),
                Markup(format_count(round(np.mean([e["cost_tokens"] for e in entries])))),
            ]
        )
    chance = [study.chance() for study in studies]
    rows.append(
        ["a random choice, on average", Markup(MISSING), number(chance[0], digits=2), number(1.0, digits=2),
         number(chance[1], digits=3), number(chance[2], digits=3), Markup(MISSING), Markup("0")]
    )  # fmt: skip
    header = ["selector", "kept, by teacher", "regret (nats an answer)", "share of chance", "regret (needles found)",
              "regret (bits per byte)", "stability", "tokens"]  # fmt: skip
    return render(header, rows, text_columns=2) + (
        "\nRegret: what the choice lost against the best judged set, mean over teachers. The best of several noisy "
        "means is too high by luck; how much is estimated by resampling and taken off, so the best set itself stands a "
        "little below 0. "
        "Share of chance: 1 is no better than drawing layers at random. Stability: mean Kendall tau between the "
        "ranking and those of resampled evidence. Tokens: what the selection cost."
    )


def _real(studies: Sequence[Study]) -> str:
    """Which differences in regret on recall survive Holm's correction."""
    study = studies[0]
    names = study.methods
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if study.chosen(a) != study.chosen(b)]
    differences = [study.regrets(b) - study.regrets(a) for a, b in pairs]
    raw = [2 * min((d > 0).mean(), (d < 0).mean()) + 1 / len(d) for d in differences]
    adjusted = holm([min(1.0, p) for p in raw])
    ahead: dict[str, list[str]] = {}
    for (a, b), d, p in zip(pairs, differences, adjusted, strict=True):
        if p < 0.05:
            winner, loser = (a, b) if d.mean() > 0 else (b, a)
            low, high = np.quantile(d * np.sign(d.mean()), [0.025, 0.975])
            ahead.setdefault(winner, []).append(f"{escape(study.label(loser))} ({low:.2f} to {high:.2f})")
    same = [" = ".join(escape(study.label(name)) for name in group) for group in _alike(study)]
    lines = [
        f"- **{escape(study.label(name))}** loses less than {', '.join(ahead[name])}."
        for name in sorted(ahead, key=study.regret)
    ]
    if study.unjudged:
        lines.append(f"- Left out, for a choice of theirs was not judged: {', '.join(map(escape, study.unjudged))}.")
    lines += [
        "- Every other difference between selectors is within noise.",
        *_goal(study, dict(zip(pairs, adjusted, strict=True))),
    ]
    if same:
        lines.append(f"- The same sets for every teacher: {'; '.join(same)}.")
    agree = ", ".join(f"{escape(o.teacher)} {o.screening_agrees():.2f}" for o in study.oracles)
    noise = ", ".join(f"{escape(o.teacher)} {o.noise:.2f}" for o in study.oracles)
    lines.append(f"- Training noise (standard deviation between seeds, nats an answer): {noise}.")
    lines.append(f"- Seed 0 against the judges, correlation over judged sets: {agree}.")
    return (
        "Regret on the answer log-likelihood, mean over teachers, 95% interval of the difference in brackets; only "
        f"differences with p < 0.05 after Holm's correction for {len(pairs)} pairs are named.\n\n" + "\n".join(lines)
    )


def _goal(study: Study, adjusted: dict[tuple[str, str], float]) -> list[str]:
    """Whether our own selector does what it is for: a lower regret than all others at a tenth of KL-LS's tokens."""
    if OURS not in study.methods or COSTLY not in study.methods:
        return []
    rival = min((name for name in study.methods if name != OURS), key=study.regret)
    behind = study.regrets(rival) - study.regrets(OURS)
    low, high = np.quantile(behind, [0.025, 0.975])
    p = adjusted.get((OURS, rival), adjusted.get((rival, OURS), 1.0))
    ours, costly = (escape(study.label(name)) for name in (OURS, COSTLY))
    place = "the lowest" if study.regret(OURS) < study.regret(rival) else "not the lowest"
    tokens = [sum(o.methods[name]["cost_tokens"] for o in study.oracles) for name in (OURS, COSTLY)]
    share = tokens[0] / max(tokens[1], 1)
    return [
        f"- **{ours}** was to lose less than every other selector at under a tenth of {costly}'s tokens. Its regret is "
        f"{place}: {escape(study.label(rival))} loses {behind.mean():.2f} nats more ({low:.2f} to {high:.2f}), which "
        f"is {'real' if p < 0.05 else 'within noise'}. It reads {share:.0%} of {costly}'s tokens."
    ]


def _alike(study: Study) -> list[list[str]]:
    """Selectors that made the same choice for every teacher, in groups of two or more."""
    groups: dict[tuple[Set, ...], list[str]] = {}
    for name in study.methods:
        groups.setdefault(tuple(study.chosen(name)), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _teacher(studies: Sequence[Study], place: int) -> str:
    """Every judged set of one teacher: who chose it, what it lost, and its quality after conversion."""
    recall, accuracy, text = (study.oracles[place] for study in studies)
    quality = _Quality(accuracy)
    rows = []
    for kept in sorted(recall.judged, key=lambda k: -float(np.mean(recall.values(k)))):
        fans = [str(e["label"]) for e in recall.methods.values() if tuple(e["layers"]) == kept]
        lost = recall.regret(kept)
        rows.append(
            [
                Markup(_braces(kept)),
                ", ".join(fans) or Markup("*none*"),
                Markup(f"{lost.value:.2f} [{lost.low:.2f}, {lost.high:.2f}]"),
                Markup(f"{lost.best:.0%}"),
                *(number(*pair, 2) for pair in quality.by_length(kept)),
                number(*_spread(recall.values(kept)), 2),
                number(*_spread([-x for x in text.values(kept)])),
            ]
        )
    header = ["kept", "chosen by", "regret (nats)", "best", *(f"needles {format_length(n)}" for n in quality.lengths),
              "answer log-likelihood", "bits per byte"]  # fmt: skip
    seeds = max(len(runs) for runs in recall.judged.values())
    return f"### {escape(recall.teacher)}\n\n{render(header, rows, text_columns=2)}\n" + (
        f"Means over {seeds} seeds ± their standard deviation. Best: share of resamples in which no judged set has a "
        f"higher answer log-likelihood. All {len(recall.screened)} sets with seed 0: mean {recall.chance:.2f}, "
        f"best {max(recall.screened.values()):.2f}, worst {min(recall.screened.values()):.2f} nats."
    )


class _Quality:
    """Needles found by length, over the judges' seeds."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        cell = next(c for c in oracle.record.details["oracle"]["cells"] if "error" not in c)
        self.lengths = [m["length"] for m in cell["metrics"] if m["metric"] == ACCURACY.metric]

    def by_length(self, kept: Set) -> list[tuple[float, float | None]]:
        """(mean, standard deviation between seeds) at each length."""
        runs = self.oracle.judged[kept]
        return [_spread([float(run[i].mean()) for run in runs]) for i in range(len(self.lengths))]


def _agreement(study: Study) -> str:
    """Kendall's tau between every two selectors (above the diagonal) and shared layers (below), mean over teachers."""
    names = study.methods
    tau, overlap = (
        np.mean([_matrix(oracle, kind, names) for oracle in study.oracles], axis=0) for kind in ("tau", "overlap")
    )
    keep = study.oracles[0].keep
    rows = []
    for i, name in enumerate(names):
        cells = [
            Markup("") if i == j else number(float(tau[i, j] if i < j else overlap[i, j]), digits=2)
            for j in range(len(names))
        ]
        rows.append([f"{i + 1} {study.label(name)}", *cells])
    table = render(["selector", *(str(i + 1) for i in range(len(names)))], rows)
    return f"{table}\nAbove the diagonal: Kendall's tau of the scores. Below: kept layers in common, of {keep}."


def _matrix(oracle: Oracle, kind: str, names: Sequence[str]) -> np.ndarray:
    order = [oracle.agreement["methods"].index(name) for name in names]
    return np.array(oracle.agreement[kind], dtype=float)[np.ix_(order, order)]


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _mean(values: Sequence[Any], digits: int) -> Markup:
    known = [float(v) for v in values if v is not None]
    return number(float(np.mean(known)), digits=digits) if known else Markup(MISSING)


def _braces(kept: Sequence[int]) -> str:
    return clean("{" + ",".join(map(str, kept)) + "}")
