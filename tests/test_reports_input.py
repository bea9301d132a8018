"""What a report is given: hostile texts, damaged and foreign files, numbers not finite; sorting and --check."""

from __future__ import annotations

import csv
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halobench.config import to_dict
from halobench.errors import HalobenchError, UserError
from halobench.records import RunRecord
from halobench.reports import write_report
from halobench.reports.leaderboard import board_files, make_board
from halobench.reports.reading import read_runs
from tests.test_reports import (
    EVEN,
    HALO,
    TEACHER,
    board,
    card,
    evaluated,
    needle,
    plain,
    record,
    selection,
    study,
    table,
)

HOSTILE = "<script>alert(1)</script>|`a`*b*_c_[l](javascript:1)$y$ \"'&amp; <img src=x onerror=alert(1)>\n# h\u202e"


def saved(folder: Path, records: list[RunRecord]) -> Path:
    """The records as files of a run."""
    for i, made in enumerate(records):
        made.save(folder / f"{i}.record.json")
    return folder


def hostile_study() -> list[RunRecord]:
    """The same text as name, selector, mixer, task, error, command, setting and stage."""
    model = card(HOSTILE, [2, 7], (HOSTILE,), hash="e" * 16, mixer=HOSTILE)
    metrics = [plain(HOSTILE, HOSTILE, HOSTILE, 0.5), plain("ppl", HOSTILE, "bits_per_byte", 1.5, 0.1)]
    methods = {HOSTILE: {"label": HOSTILE, "layers": [2, 7], "scores": [1.0, 2.0] * 4, "stderr": None}}
    changes: dict[str, Any] = {
        "command": HOSTILE,
        "settings": {HOSTILE: {"seed": HOSTILE}},
        "lineage": {HOSTILE: HOSTILE},
        "backends": {HOSTILE: HOSTILE},
        "environment": {"versions": {HOSTILE: HOSTILE}, "hardware": {"processor": HOSTILE}, "system": HOSTILE},
    }
    stages = [{"stage": HOSTILE, "tokens": 10, "seconds": HOSTILE, "first_loss": math.inf}]
    return [
        evaluated(TEACHER, (100, 40)),
        evaluated(model, (90, 80), *metrics, **changes),
        record(model, kind="profile", status="error", error=HOSTILE),
        record(model, kind="select", details={"selection": {"keep": 2, "methods": methods}}),
        record(model, kind="convert", details={"stages": stages, "curves": {HOSTILE: [[1, 2], [2, 1]]}}),
    ]


def test_hostile_texts_are_shown_and_do_nothing_in_any_file(tmp_path: Path) -> None:
    hostile = hostile_study()
    hostile[-1] = replace(hostile[-1], details=json.loads(json.dumps(hostile[-1].details).replace("Infinity", "1e9")))
    written = write_report([saved(tmp_path / "run", hostile)], tmp_path / "out")
    texts = {path.name: path.read_text("utf-8") for path in written if path.suffix in (".md", ".html", ".svg", ".csv")}
    assert len(texts) >= 6
    for name, text in texts.items():
        assert "\u202e" not in text, name
        if name != "leaderboard.csv":
            assert not re.search(r"<script>alert|<img", text), name
        if name.endswith(".svg"):
            ElementTree.fromstring(text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in texts["report.html"]
    assert texts["report.html"].count("<script") == 1, "the page's own"
    assert re.findall(r"<strong>\s*[bc]\s*</strong>|<em>", texts["report.html"]) == []


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path: Path, start: str) -> None:
    written = write_report([saved(tmp_path, [evaluated(card(start), (10,))])], tmp_path / "out")
    with next(path for path in written if path.suffix == ".csv").open(encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["model"] == line["teacher"] == f"'{start.strip()}"
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in line.values())


def test_numbers_that_are_not_finite_are_missing_and_said_to_be(tmp_path: Path) -> None:
    bits = plain("ppl", "modern", "bits_per_byte", math.nan, 0.1, higher_is_better=False)
    broken = replace(needle(1024, [1.0, 0.0]), samples=[math.nan, 1.0], clusters=[0, 1], depths=[0.0, 1.0])
    unsure = replace(needle(2048, [1.0, 0.0]), stderr=math.inf)
    made = record(HALO, [bits, broken, unsure, needle(512, [1.0, 0.0])])
    folder = saved(tmp_path / "run", [evaluated(TEACHER, (100, 43)), evaluated(EVEN, (80, 70, 60))])
    (folder / "bad.record.json").write_text(json.dumps(to_dict(made)), encoding="utf-8")
    written = write_report([folder], tmp_path / "out")
    text = written[0].read_text("utf-8")
    row = table(text)["HALO = recall\\_drop"]
    assert (
        "bits per byte, modern" not in row
        and row["needles 1K ×2"].startswith("0.500")
        and row["needles 2K ×4"] == "0.500"
    )
    line = next(line for line in text.splitlines() if "Not finite" in line)
    for name in ("bits\\_per\\_byte", "accuracy at 1K", "accuracy at 2K"):
        assert name in line
    assert "accuracy at 512" not in line
    assert ">NaN<" not in written[1].read_text("utf-8")
    json.loads(written[3].read_text("utf-8"), parse_constant=pytest.fail)


def selector(**changes: Any) -> dict[str, Any]:
    """Details of a selection by one selector, changed."""
    return {"details": {"selection": {"methods": {"x": {"layers": [1], "scores": [0.5], "stderr": None} | changes}}}}


def one_metric(**changes: Any) -> dict[str, Any]:
    """A record's list of one metric, changed."""
    return {"metrics": [{"suite": "a", "task": "b", "metric": "c", "value": 1, "n": 1} | changes]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "version 2"),
        ({"schema": "1"}, "version 1"),
        ({"kind": "other"}, "other"),
        ({"model": {"name": "x"}}, "lacks the field"),
        ({"model": []}, "must be a table"),
        (one_metric(value="high"), "value must be float"),
        (one_metric(value=[1]), "value must be float"),
        (one_metric(n=-1), "n is -1"),
        (one_metric(stderr=-0.1), "stderr is -0.1"),
        ({"details": {"curves": {"a": [[10**400, 1]]}}}, "larger than"),
        ({"settings": {"a": json.loads("[" * 70 + "]" * 70)}}, "nests deeper than 60"),
        ({"command": "half \ud800"}, "half a character"),
        ({"model": to_dict(replace(HALO, trained_length=0))}, "trained_length is 0"),
        (selector(layers={"a": 1}), "layers of the selector 'x' must be a list"),
        (selector(scores=3), "scores of the selector 'x' must be a list"),
        (selector(stderr=[0.0] * 5000), "stderr of the selector 'x' must be a list of at most 4096"),
        (one_metric(value=1e99), "larger than"),
        (one_metric(length=0), "length is 0"),
        (one_metric(depths=[0.5]), "1 depths for 0"),
        (one_metric(samples=[1, 0], clusters=[0]), "1 clusters for 2"),
        (one_metric(samples=[1], depths=[2]), "a depth is not"),
        ({"kind": "oracle"}, "details.oracle"),
        ({"details": []}, "details must be a table"),
    ],
)
def test_a_record_that_does_not_fit_is_one_line_that_names_the_file(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = study()[0].save(tmp_path / "a.record.json")
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), encoding="utf-8")
    with pytest.raises(HalobenchError, match=re.escape(says)) as caught:
        write_report([tmp_path], tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ["", '{"schema": 1', "[" * 100_000, "[]", "null", '{"results": 1}', "\x00", "9" * 5000, "{}"]
)
def test_a_file_that_is_no_record_is_one_line_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.record.json"
    path.write_text(content, encoding="utf-8")
    for given in (tmp_path, path):
        with pytest.raises(HalobenchError) as caught:
            write_report([given], tmp_path / "out")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report([tmp_path / "gone"], tmp_path / "out")
    with pytest.raises(HalobenchError, match="no records"):
        write_report([tmp_path], tmp_path / "out")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "results_1.json").write_text(json.dumps(lm_eval_results()), encoding="utf-8")
    with pytest.raises(UserError, match=r"results of lm-eval; give .*results_1\.json itself"):
        write_report([tmp_path], tmp_path / "out")
    (tmp_path / "dir.record.json").mkdir()
    with pytest.raises(HalobenchError, match="dir.record.json cannot be read"):
        write_report([tmp_path], tmp_path / "out")


def lm_eval_results(**changes: Any) -> dict[str, Any]:
    """A results document as lm-eval writes it."""
    document = {
        "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.6, "acc_stderr,none": 0.01, "acc_norm,none": 0.55,
                         "acc_norm_stderr,none": 0.0101},
            "lambada_openai": {"alias": "lambada_openai", "perplexity,none": 5.5, "perplexity_stderr,none": 0.2,
                               "acc,none": 0.65, "acc_stderr,none": 0.007},
            "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": "N/A"},
        },
        "n-samples": {"arc_easy": {"original": 2376, "effective": 500}},
        "higher_is_better": {"lambada_openai": {"acc": True, "perplexity": False}},
        "config": {"model": "hf", "model_args": "pretrained=org/model,dtype=bfloat16", "model_num_parameters": 7},
        "versions": {"arc_easy": 1.0},
        "git_hash": "abc1234",
        "date": 1750000000.25,
        "lm_eval_version": "0.4.13",
        "model_name": "org/model",
    }  # fmt: skip
    return document | changes


def test_results_of_lm_eval_become_a_marked_row(tmp_path: Path) -> None:
    path = tmp_path / "results_2026.json"
    path.write_text(json.dumps(lm_eval_results()), encoding="utf-8")
    (made,) = read_runs([path])
    found = {(m.suite, m.task, m.metric): m for m in made.metrics}
    assert set(found) == {
        ("csr", "arc_easy", "acc"), ("csr", "arc_easy", "acc_norm"), ("csr", "lambada_openai", "acc"),
        ("csr", "lambada_openai", "perplexity"), ("lm-eval", "gsm8k", "exact_match:strict-match"),
    }  # fmt: skip
    ours = found["csr", "arc_easy", "acc_norm"]
    assert (ours.value, ours.stderr, ours.n, ours.samples) == (0.55, 0.0101, 500, None)
    assert found["csr", "lambada_openai", "perplexity"].higher_is_better is False
    assert found["lm-eval", "gsm8k", "exact_match:strict-match"].stderr is None
    assert made.created == "2025-06-15T15:06:40+00:00" and made.lineage["imported"] == "lm-eval"

    tasks = [plain("csr", "arc_easy", "acc_norm", 0.5, 0.01), plain("csr", "lambada_openai", "acc", 0.6, 0.01)]
    run = saved(tmp_path / "run", [evaluated(TEACHER, (100,), *tasks), evaluated(HALO, (90,), *tasks)])
    written = write_report([run, path], tmp_path / "out")
    text = written[0].read_text("utf-8")
    rows = table(text)
    assert list(rows)[-1] == "org/model (lm-eval)" and len(rows) == 3
    assert rows["org/model (lm-eval)"]["CSR mean (2 tasks)"] == "0.600 ±0.006"
    assert rows["org/model (lm-eval)"]["needles 512 ×1 (trained)"] == "–"
    assert "**org/model (lm-eval)** was measured elsewhere" in text and "5.500 ±0.200" in text
    marks = make_board(read_runs([run, path])).marks[0]
    assert not any(made.lineage["results"] in (c.left, c.right) for c in marks.items for made in read_runs([path]))


def test_imported_rows_alone_and_of_one_name_are_shown_apart(tmp_path: Path) -> None:
    for i, value in enumerate((0.5, 0.6)):
        document = lm_eval_results(results={"arc_easy": {"acc,none": value}})
        (tmp_path / f"results_{i}.json").write_text(json.dumps(document), encoding="utf-8")
    found = read_runs(sorted(tmp_path.glob("results_*.json")))
    text = board(found)
    assert len(table(text)) == 2 and "## imported" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"results": {}}, "no results"),
        ({"results": []}, "'results' must be a table"),
        ({"results": {"a": 1}}, "results.a must be a table"),
        ({"results": {"a": {"acc,none": "high"}}}, "must be a number, got str 'high'"),
        ({"results": {"a": {"acc,none": 0.5, "acc_stderr,none": [1]}}}, "must be a number, got list"),
        ({"model_name": None, "config": {}}, "does not name its model"),
    ],
)
def test_damaged_results_of_lm_eval_are_one_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(lm_eval_results(**change)), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        read_runs([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_are_sorted_by_the_column_asked_for() -> None:
    def bits(value: float):
        return plain("ppl", "modern", "bits_per_byte", value, 0.01, higher_is_better=False)

    third = card("third", [4, 7], ("third",))
    records = [evaluated(HALO, (90,), bits(1.9)), evaluated(EVEN, (80,), bits(1.7)), evaluated(third, (99,))]

    def order(sort: str | None) -> list[str]:
        return [row.card.name for row in make_board(records, sort=sort).groups[0].rows]

    assert order("bits per byte, modern") == ["even", "halo", "third"], "lowest first, and what is missing last"
    assert order("NEEDLES 512") == ["third", "halo", "even"]
    assert order("selection") == ["halo", "even", "third"], "by label: HALO comes before even"
    csr = [replace(plain("csr", "piqa", "acc", 1.0, 0.001, samples=[1.0] * 4000), n=4000)]
    records = [evaluated(TEACHER, (100,), *csr), evaluated(HALO, (90,)), evaluated(EVEN, (80,), *csr)]
    assert order(None) == ["tiny", "halo", "even"] and order("within 0.02 of teacher") == ["tiny", "even", "halo"]
    with pytest.raises(UserError, match=r"--sort 'speed' is no column; the columns are: selection; kept layers"):
        order("speed")
    with pytest.raises(UserError, match=r"--sort 'e' fits \d+ columns"):
        order("e")


def test_ruler_has_a_column_a_length_that_averages_the_tasks_all_have() -> None:
    def ruler(task: str, length: int, value: float):
        return plain("ruler", task, "score", value, 0.03, length=length)

    records = [
        record(TEACHER, [ruler("vt", 512, 0.9), ruler("cwe", 512, 0.7), ruler("vt", 1024, 0.2)]),
        record(HALO, [ruler("vt", 512, 0.8), ruler("cwe", 512, 0.6), ruler("fwe", 512, 0.1), ruler("vt", 1024, 0.5)]),
    ]
    text = board(records)
    row = table(text)["HALO = recall\\_drop"]
    assert row["RULER 512 ×1 (trained) (2 tasks)"] == "0.700 ±0.021" and row["RULER 1K ×2 (1 task)"] == "0.500 ±0.030"
    assert "mean score over cwe, vt" in text


def test_check_finds_a_stale_file_and_writes_nothing(tmp_path: Path) -> None:
    run, out = saved(tmp_path / "run", [*study(), selection()]), tmp_path / "out"
    with pytest.raises(HalobenchError, match="leaderboard.md is not what the records give now"):
        write_report([run], out, check=True)
    assert not out.exists()
    written = write_report([run], out)
    before = {path: path.read_bytes() for path in written}
    write_report([run], out, check=True)
    for name in ("report.html", "leaderboard.json"):
        (out / name).write_bytes(before[out / name] + b" ")
        with pytest.raises(HalobenchError, match=f"{name} is not") as caught:
            write_report([run], out, check=True)
        assert caught.value.exit_code == 1 and (out / name).read_bytes() == before[out / name] + b" "
        (out / name).write_bytes(before[out / name])
    (out / "needles.svg").write_bytes(before[out / "needles.svg"] + b" ")
    with pytest.raises(HalobenchError, match="needles.svg is not"):
        write_report([run], out, check=True)
    (out / "layers.png").unlink()
    write_report([run], out)
    assert {path: path.read_bytes() for path in written} == before, "equal records give equal files, plots included"
    (out / "layers-2.svg").touch()
    with pytest.raises(HalobenchError, match=r"layers-2\.svg is left over"):
        write_report([run], out, check=True)


def test_check_names_the_options_that_a_report_was_made_with(tmp_path: Path) -> None:
    run, out = saved(tmp_path / "run", study()), tmp_path / "out"
    write_report([run], out, sort="tokens", margin=0.1)
    write_report([run], out, sort="tokens", margin=0.1, check=True)
    with pytest.raises(HalobenchError, match=r"is not what .* \(it was made with --sort tokens, --margin 0\.1\); run"):
        write_report([run], out, check=True)


def test_tables_for_machines_are_in_order_and_the_same_on_every_machine() -> None:
    third = replace(needle(16384, [1.0, 0.0, 0.0]), value=1 / 3)
    made = make_board([record(HALO, [third, *(needle(length, [1.0, 0.0]) for length in (2048, 512, 1024))])])
    files = board_files(made, {})
    assert [line.split(",")[8] for line in files["leaderboard.csv"].splitlines()[1:]] == [
        "512",
        "1024",
        "2048",
        "16384",
    ]
    metrics = json.loads(files["leaderboard.json"])["groups"][0]["rows"][0]["metrics"]
    assert [metric["length"] for metric in metrics] == [512, 1024, 2048, 16384]
    assert metrics[-1]["value"] == 0.333333333


def test_a_damaged_oracle_is_one_line(tmp_path: Path) -> None:
    parts = {"layers": 4, "keep": 2, "methods": 5, "agreement": {}, "cells": []}
    saved(tmp_path, [record(TEACHER, kind="oracle", details={"oracle": parts})])
    with pytest.raises(HalobenchError, match="oracle's record of tiny is damaged") as caught:
        write_report([tmp_path], tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_two_runs_of_one_name_stay_apart_in_every_file(tmp_path: Path) -> None:
    twins = [evaluated(card("twin", [2, 7], ("kl",), hash=mark * 16), (50,)) for mark in "ab"]
    written = write_report([saved(tmp_path / "run", twins)], tmp_path / "out")
    for path in written:
        if path.suffix in (".md", ".html", ".csv", ".json", ".svg") and path.stem != "needles":
            text = path.read_text("utf-8").replace("\\#", "#")
            assert "kl (twin) #aaaaaaaa" in text or path.stem not in ("leaderboard", "report"), path
            assert text.count("#bbbbbbbb") == text.count("#aaaaaaaa")
