"""What the numbers say, in sentences: each is one comparison with its interval and Holm-corrected verdict.

A sentence claims a difference only when the comparison is significant; otherwise it says that the two are not told
apart, that there is too little to tell, or that nothing was recorded to judge it by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from halobench.reports.columns import beyond_target, inside_target, margin_target, span, standing_targets, text_targets
from halobench.reports.comparison import Comparison, Comparisons, compare_cases
from halobench.reports.pairing import Target
from halobench.reports.rows import Group, Row
from halobench.reports.table import escape, number, signed
from halobench.units import format_length


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One comparison worth a sentence. `what` names the quantity; `topic` opens the sentence."""

    topic: str
    what: str
    left: Row
    right: Row
    target: Target


def chose_by(row: Row, method: str) -> bool:
    """True when the row's kept layers were chosen by `method` (or a variant: "even" covers "even, latter half")."""
    names = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in row.card.selectors]
    return any(name == method or (method == "even" and name.startswith(method)) for name in names)


def headline(group: Group) -> Row | None:
    """The row the sentences are about: HALO's choice, without positions in its kept layers if there are both."""
    halo = [row for row in group.hybrids if chose_by(row, "halo")]
    return next((row for row in halo if row.card.positions == "hype"), halo[0] if halo else None)


def statements(group: Group, marks: Comparisons, seed: int = 0) -> list[str]:
    """The sentences for one teacher, as Markdown."""
    pooled, halo = beyond_target(group), headline(group)
    said: list[str] = []
    if halo is not None and chose_by(halo, "even"):
        said.append(
            f"**Selection.** HALO and even spacing chose the same layers ({_kept(halo)}): nothing to tell apart."
        )
    claims = _selection(group, halo, pooled) + _positions(group, pooled) + _teacher(group, halo, pooled)
    family = compare_cases([(claim.left, claim.right, claim.target) for claim in claims], seed=seed)
    said += [sentence(claim, made) for claim, made in zip(claims, family, strict=True)]
    if pooled is not None and len(group.hybrids) > 1:
        said.append(_best(group, marks, pooled))
    said += [
        _standing(group, marks, name, target) for name, target in standing_targets(group).items() if marks.standings
    ]
    tested = sum(made.p is not None for made in family)
    if tested:
        said.append(
            f"The {tested} comparisons with a p-value form one family: each carries Holm's correction. "
            "The intervals are 95% each and cover the choice of questions, not another training run of the same recipe."
        )
    return said


def _needles_beyond(group: Group, pooled: Target) -> str:
    trained = group.trained_length
    return f"needles {'beyond the training length' if trained else 'at all lengths'} ({span(pooled.lengths, trained)})"


def _needles_inside(group: Group, inside: Target) -> str:
    return f"needles within the training length ({span(inside.lengths, group.trained_length)})"


def _text(target: Target) -> str:
    window = target.lengths[0]
    return target.task + (f" in windows of {format_length(window)}" if window else "")


def _shortest(targets: list[Target]) -> list[Target]:
    """Of each text the target with the shortest window."""
    return list({target.task: target for target in reversed(targets)}.values())[::-1]


def _selection(group: Group, halo: Row | None, pooled: Target | None) -> list[Claim]:
    if halo is None or pooled is None or chose_by(halo, "even"):
        return []
    what = _needles_beyond(group, pooled)
    even = [r for r in group.hybrids if chose_by(r, "even") and r.card.positions == halo.card.positions]
    return [Claim(topic="HALO against even spacing", what=what, left=halo, right=row, target=pooled) for row in even]


def _positions(group: Group, pooled: Target | None) -> list[Claim]:
    """Rows that differ in nothing but the positions of their kept layers."""
    inside = inside_target(group)
    found = []
    for hype in (row for row in group.hybrids if row.card.positions == "hype"):
        for rope in (row for row in group.hybrids if row.card.positions == "rope"):
            if (hype.card.kept, hype.card.mixer) != (rope.card.kept, rope.card.mixer) or pooled is None:
                continue
            what = _needles_beyond(group, pooled)
            found.append(Claim(topic="HyPE against RoPE kept", what=what, left=hype, right=rope, target=pooled))
            if inside is not None:
                what = _needles_inside(group, inside)
                found.append(Claim(topic="HyPE against RoPE kept", what=what, left=hype, right=rope, target=inside))
    return found


def _teacher(group: Group, halo: Row | None, pooled: Target | None) -> list[Claim]:
    student = halo or (group.hybrids[0] if group.hybrids else None)
    if student is None or group.teacher is None:
        return []
    inside = inside_target(group)
    targets: list[tuple[str, Target | None]] = [
        (_needles_beyond(group, pooled) if pooled else "", pooled),
        (_needles_inside(group, inside) if inside else "", inside),
        ("the commonsense margin (nats per byte)", margin_target(group.rows)),
        *((f"bits per byte on {_text(t)} (lower is better)", t) for t in _shortest(text_targets(group.rows))),
    ]
    return [
        Claim(topic="Against the teacher", what=what, left=student, right=group.teacher, target=target)
        for what, target in targets
        if target is not None
    ]


def sentence(claim: Claim, made: Comparison) -> str:
    """The claim as Markdown: both numbers, the difference with its interval, the verdict."""
    left, right = claim.target.value(claim.left), claim.target.value(claim.right)
    opening = f"**{claim.topic}**, {escape(claim.what)}:"
    if left is None or right is None or made.difference is None:
        absent = claim.left if left is None else claim.right
        return f"{opening} not measured for {_named(absent)}."
    numbers = f"{_named(claim.left)} {number(*left)} against {_named(claim.right)} {number(*right)}"
    if made.method == "paired" and (made.low is None or 2.0 ** (1 - made.clusters) > made.level):
        counted = f"{made.n} samples in {made.clusters} independent group{'s' * (made.clusters != 1)}"
        return f"{opening} {numbers} ({counted}). **Too few independent groups to tell**."
    if made.low is None or made.high is None or made.adjusted is None:
        return f"{opening} {numbers}; no uncertainty was recorded, so no difference is claimed."
    kind = "paired difference" if made.method == "paired" else "difference"
    interval = f"{kind} {signed(made.difference)}, 95% interval {signed(made.low)} to {signed(made.high)}"
    chance = "p < 0.001" if made.adjusted < 0.001 else f"p = {made.adjusted:.3f}"
    basis = f"{made.n} {'samples' if made.method == 'paired' else 'unpaired samples'}"
    if 0 < made.clusters < made.n:
        basis += f" in {made.clusters} independent groups"
    winner = made.winner
    if winner is None:
        verdict = "**Not told apart**"
        verdict += ": the values and their paired difference point opposite ways" if made.contrary else ""
    else:
        verdict = f"**Better**: {_named(claim.left if winner == claim.left.key else claim.right)}"
    return f"{opening} {numbers}; {interval} ({basis}, {chance}). {verdict}."


def _best(group: Group, marks: Comparisons, pooled: Target) -> str:
    what = escape(_needles_beyond(group, pooled))
    best = next((row for row in group.hybrids if row.key == marks.best(pooled)), None)
    if best is not None:
        return f"**Among the hybrids**, {what}: {_named(best)} is ahead of every other, each difference beyond noise."
    scored = [(value[0], row) for row in group.hybrids if (value := pooled.value(row)) is not None]
    if not scored:
        return f"**Among the hybrids**, {what}: not measured."
    top = max(scored, key=lambda pair: pair[0])[1]
    rivals = [row for _, row in scored if row is not top and not _beaten(marks, top, row, pooled)]
    if not rivals:
        return f"**Among the hybrids**, {what}: of {_named(top)} alone there is a number."
    return (
        f"**Among the hybrids**, {what}: {_named(top)} has the highest number, but it is not told apart from "
        f"{', '.join(_named(row) for row in rivals)}."
    )


def _standing(group: Group, marks: Comparisons, name: str, target: Target) -> str:
    """Which hybrids are shown to be no worse than the teacher, and how much worse the others may be."""
    tested = [made for made in marks.standings if made.target == target and made.lowest is not None]
    labels = {row.key: escape(row.label) for row in group.hybrids}
    opening = (
        f"**As good as the teacher** to within {marks.standings[0].margin:g}, {_standing_name(group, name, target)}:"
    )
    if not tested:
        return f"{opening} not tested, for want of samples or standard errors."
    bounds = {made.row: f"{labels[made.row]} ({signed(made.lowest or 0.0)})" for made in tested}
    shown = [bounds[made.row] for made in tested if made.shown]
    others = [bounds[made.row] for made in tested if not made.shown]
    said = [f"shown for {', '.join(shown)}"] if shown else []
    said += [f"not shown for {', '.join(others)}"] if others else []
    return f"{opening} {'; '.join(said)}. In brackets: 97.5% bounds, before correction."


def _standing_name(group: Group, name: str, target: Target) -> str:
    if target.lengths[0] is None:
        return f"{name} accuracy"
    return f"{name} within the training length ({span(target.lengths, group.trained_length)})"


def _beaten(marks: Comparisons, top: Row, row: Row, target: Target) -> bool:
    made = marks.between(top.key, row.key, target)
    return made is not None and made.winner == top.key


def _kept(row: Row) -> str:
    return ", ".join(map(str, row.card.kept or [])) or "none"


def _named(row: Row) -> str:
    return escape(row.label) if not row.untouched else f"the teacher {escape(row.label)}"
