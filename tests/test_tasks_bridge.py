"""The bridge to lm-eval: same numbers as lm-eval's own model, nothing cut, and what cannot be had is said."""

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halobench.errors import HalobenchError, UserError
from halobench.records import Metric
from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.transplant import transplant
from halobench.tasks import lm_eval_bridge
from halobench.tasks.continuation import load_items, score_items
from halobench.tasks.lm_eval_bridge import LM_SUITES, BridgeOutcome, run_lm_eval
from halobench.tasks.lm_eval_tasks import KNOWN_TASKS, OFFLINE_TASK, OUR_TASKS, find_file, local_task, offline_task

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "eval").is_dir(), reason="no ../shared/data/eval beside the repository")
ITEMS = load_items(5)
LETTERS = "ABCDE"


def lettered(texts: list[str], answer: int) -> dict[str, Any]:
    return {
        "choices": {"text": texts, "label": list(LETTERS[: len(texts)])},
        "answerKey": LETTERS[answer],
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [{"query": i.context, "choices": list(i.choices), "label": i.label} for i in ITEMS],
    "arc_easy": [{"question": i.context, **lettered(list(i.choices), i.label)} for i in ITEMS],
    "winogrande": [
        {"sentence": f"{i.context} _ went home because it rained.", "option1": "Ann", "option2": "Bo", "answer": "2"}
        for i in ITEMS
    ],
    "commonsense_qa": [{"question": i.context, **lettered(["a", "bb", "c", "d", "e"], i.label)} for i in ITEMS],
    "lambada_openai": [{"text": f"Then {i.context} {i.choices[i.label]}"} for i in ITEMS],
    "nq_open": [{"question": f"what is {i.context[-40:]}", "answer": ["the", "a b"]} for i in ITEMS[:2]],
    "wikitext": [{"page": f" = {i.source} = \n \n {i.context} "} for i in ITEMS],
}


def write(folder: Path, task: str, lines: list[str] | None = None) -> Path:
    local = KNOWN_TASKS[task].local
    assert local is not None
    path = folder / local.folder / local.name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in ROWS[task]] if lines is None else lines
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with five rows for each of ROWS."""
    for task in ROWS:
        write(tmp_path, task)
    return tmp_path


@pytest.fixture
def hybrid(reader) -> PreTrainedModel:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return transplant(reader, SurgeryPlan.for_model(reader, keep=[1])).eval()


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], **more: Any
) -> tuple[dict[str, Metric], BridgeOutcome]:
    options = {"limit": None, "batch_size": 8, "seed": 0, **more}
    outcome = run_lm_eval(model, tokenizer, tasks, **options)
    return {f"{metric.task}/{metric.metric}": metric for metric in outcome.metrics}, outcome


def plain_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Any], batch: int
) -> dict[str, dict[str, float]]:
    """What lm-eval finds with its own model class (simple_evaluate, without its questions about the machine)."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    for task in tasks:
        task.set_config(key="num_fewshot", value=0)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    with torch.no_grad():
        found = lm_eval.evaluate(lm, {"tasks": {task.config.task: task for task in tasks}}, bootstrap_iters=0)
    assert found is not None
    return {
        task: {key.partition(",")[0]: value for key, value in row.items() if "," in key and "stderr" not in key}
        for task, row in found["results"].items()
    }


@pytest.mark.parametrize(("kind", "batch"), [("reader", 1), ("hybrid", 3)])
def test_every_kind_of_task_gives_lm_evals_numbers(
    kind: str, batch: int, data: Path, bpe: PreTrainedTokenizerBase, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    tasks = [OFFLINE_TASK, *ROWS]
    found, outcome = run(model, bpe, tasks, data_dir=data, limit=5)
    shipped = offline_task(0)[0]
    shipped.dataset = {"test": shipped.dataset["test"].select(range(5))}  # as many as ours have
    expected = plain_lm_eval(model, bpe, [shipped, *(local_task(name, data)[0] for name in ROWS)], batch)
    for task, numbers in expected.items():
        for metric, value in numbers.items():
            exact = metric in ("acc", "acc_norm", "exact_match")
            close = value if exact else pytest.approx(value, rel=1e-6, abs=1e-6)
            assert found[f"{task}/{metric}"].value == close, (task, metric)
    assert set(expected) == set(tasks)
    assert outcome.work.shared > 0 and outcome.work.plain > 0
    assert outcome.work.generated == 2 and outcome.work.rolling == 5 and outcome.work.truncated == 0


def test_the_shipped_task_gives_our_own_marks(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    found, _ = run(reader, bpe, [OFFLINE_TASK], limit=12, suite="csr")
    ours = score_items(reader, bpe, load_items(12))
    for name, values in (("acc", ours.correct), ("acc_norm", ours.correct_norm), ("margin", ours.margin)):
        metric = found[f"{OFFLINE_TASK}/{name}"]
        assert metric.samples == pytest.approx(values.tolist(), abs=1e-3)
        assert metric.value == pytest.approx(values.mean(), abs=1e-4)
        assert metric.n == 12 and metric.suite == "csr"
        assert metric.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(12), abs=1e-4)


def test_the_callers_random_state_and_mode_are_left_alone(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    def states() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    before = states()
    reader.train()
    run(reader, bpe, [OFFLINE_TASK], limit=2)
    assert states() == before and reader.training


def test_a_model_in_training_is_judged_without_its_dropout(pico, bpe) -> None:  # type: ignore[no-untyped-def]
    model = pico(vocab_size=len(bpe), max_position_embeddings=4096, attention_dropout=0.5)
    still, _ = run(model, bpe, [OFFLINE_TASK], limit=3)
    assert run(model.train(), bpe, [OFFLINE_TASK], limit=3)[0] == still


def test_choices_behind_one_context_are_read_with_it_once(data, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    _, shared = run(reader, bpe, ["hellaswag"], data_dir=data)
    assert shared.work.shared == 20 and shared.work.plain == 0
    assert shared.work.tokens < 0.7 * shared.work.tokens_plain
    _, letters = run(reader, bpe, ["commonsense_qa"], data_dir=data)  # one token each: one row says all of them
    assert letters.work.plain == 25 and letters.work.tokens == letters.work.tokens_plain


def test_one_text_asked_in_two_ways_is_not_mistaken(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.api.instance import Instance

    from halobench.tasks.lm_eval_model import BridgeLM

    splits = [("One two three", " four five"), ("One two three four", " five")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=split, idx=0, metadata=(f"task {i}", 0, 1))
        for i, split in enumerate(splits)
    ]
    together = BridgeLM(reader, bpe, batch_size=4).loglikelihood(requests)
    for request, answer in zip(requests, together, strict=True):
        assert BridgeLM(reader, bpe, batch_size=1).loglikelihood([request])[0][0] == pytest.approx(answer[0], abs=1e-5)
    assert together[0][0] < together[1][0] - 1


def test_a_continuation_without_tokens_is_refused_with_its_task(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.api.instance import Instance

    from halobench.tasks.lm_eval_model import BridgeLM

    empty = Instance(request_type="loglikelihood", doc={}, arguments=("One", ""), idx=0, metadata=("quiz", 0, 1))
    with pytest.raises(HalobenchError, match="task quiz scores a continuation without tokens"):
        BridgeLM(reader, bpe, batch_size=1).loglikelihood([empty])


def test_numbers_do_not_depend_on_the_batch(data, hybrid, bpe) -> None:  # type: ignore[no-untyped-def]
    tasks = ["hellaswag", "lambada_openai", "nq_open"]
    one, many = (run(hybrid, bpe, tasks, data_dir=data, batch_size=size)[0] for size in (1, 16))
    assert set(one) == set(many)
    for name, metric in one.items():
        assert metric.value == pytest.approx(many[name].value, rel=1e-5, abs=1e-5), name


def test_prompts_beyond_the_window_are_read_whole_and_counted(data, pico, bpe, capsys) -> None:  # type: ignore[no-untyped-def]
    wide, narrow = (pico(vocab_size=len(bpe), max_position_embeddings=n) for n in (4096, 40))
    tasks = ["hellaswag", "lambada_openai", "nq_open"]
    found, outcome = run(narrow, bpe, tasks, data_dir=data)
    assert found == run(wide, bpe, tasks, data_dir=data)[0]
    assert outcome.work.beyond_window["hellaswag"] == 20 and outcome.work.truncated == 0
    assert "hellaswag: 20 prompts are beyond the model's window of 40 tokens; they are read whole" in (
        capsys.readouterr().err
    )


def test_prompts_that_are_cut_are_counted(data, reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from contextlib import nullcontext

    from halobench.tasks.lm_eval_model import BridgeLM

    lm = BridgeLM(reader, bpe, batch_size=2)
    lm.tok_batch_encode(["one two three four", "x"], left_truncate_len=3)
    assert lm.work.truncated == 1
    monkeypatch.setattr(BridgeLM, "_whole", lambda self, lengths: nullcontext())  # as HFLM by itself
    assert run(reader, bpe, ["lambada_openai"], data_dir=data, window=40)[1].work.truncated == 5


def test_a_table_of_positions_that_is_too_short_is_refused_with_the_task(data, bpe) -> None:  # type: ignore[no-untyped-def]
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(bpe), n_positions=40, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(UserError, match=r"task hellaswag has a prompt of \d+ tokens, \d+ more than .* not cut"):
        run(model, bpe, ["hellaswag"], data_dir=data)


def test_a_model_that_gives_nan_is_refused_on_either_path(data, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        reader.lm_head.weight.fill_(float("nan"))
    for task in ("hellaswag", "lambada_openai"):
        with pytest.raises(HalobenchError, match="not finite"):
            run(reader, bpe, [task], data_dir=data)


def test_rows_are_identified_by_the_hash_of_their_file(data, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    _, outcome = run(reader, bpe, ["arc_easy", OFFLINE_TASK], data_dir=data, limit=2)
    mine, shipped = outcome.sources
    path = find_file("arc_easy", data)
    assert path is not None and mine.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (mine.place, mine.rows, mine.version) == ("eval/arc_easy.test.jsonl.gz", 5, "1.0")
    assert mine.headline == "acc_norm" and shipped.place == "package" and shipped.rows > 300
    assert outcome.lm_eval.startswith("0.4")


def test_a_suite_goes_on_without_what_the_folder_lacks_and_says_so(data, reader, bpe, capsys) -> None:  # type: ignore[no-untyped-def]
    found, outcome = run(reader, bpe, list(LM_SUITES["csr"]), data_dir=data, limit=2, suite="csr", whole=False)
    assert outcome.left_out == ["arc_challenge", "piqa", "mmlu"]
    said = capsys.readouterr().err
    assert "suite csr without arc_challenge: " in said and "has no arc_challenge.test.jsonl.gz" in said
    assert "suite csr without mmlu: its rows come from the hub only" in said
    assert "hellaswag/acc_norm" in found and not any(name.startswith("piqa") for name in found)


def test_what_is_asked_for_by_name_must_be_had(data, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="task fda: its rows come from the hub only; leave out the data folder"):
        run(reader, bpe, ["fda"], data_dir=data)
    with pytest.raises(UserError, match="task piqa: .* has no piqa.validation.jsonl.gz"):
        run(reader, bpe, ["piqa"], data_dir=data)
    with pytest.raises(UserError, match="none of the tasks can be had: squad_completion, fda, swde: its rows"):
        run(reader, bpe, list(LM_SUITES["recall"]), data_dir=data, whole=False)


def test_a_hub_that_does_not_answer_is_said_and_not_waited_for(reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(lm_eval_bridge, "_hub_answers", lambda: False)
    with pytest.raises(UserError, match="task arc_easy: the hub cannot be reached and no data folder is given"):
        run(reader, bpe, ["arc_easy"])
    _, outcome = run(reader, bpe, list(LM_SUITES["csr"]), limit=2, whole=False)
    assert outcome.left_out == list(LM_SUITES["csr"])[1:] and len(outcome.sources) == 1


def test_a_group_is_one_row_over_all_its_items(reader, bpe, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(lm_eval_bridge, "_hub_answers", lambda: True)
    (tmp_path / "rows.py").write_text(
        "from datasets import Dataset\n"
        "def _rows(n, start):\n"
        "    rows = [{'q': f'Question {i + start}', 'gold': i % 2} for i in range(n)]\n"
        "    return {'test': Dataset.from_list(rows)}\n"
        "def one(**_): return _rows(3, 0)\n"
        "def two(**_): return _rows(6, 50)\n"
    )
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: part_{name}\ncustom_dataset: !function rows.{name}\noutput_type: multiple_choice\n"
            'test_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: gold\ndoc_to_choice: ["yes", "no"]\n'
            "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        )
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [part_one, part_two]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    parts, _ = run(reader, bpe, ["part_one", "part_two"], manager=manager)
    found, outcome = run(reader, bpe, ["both"], manager=manager)
    assert list(found) == ["both/acc"] and [source.rows for source in outcome.sources] == [3, 6]
    both, one, two = found["both/acc"], parts["part_one/acc"], parts["part_two/acc"]
    assert both.samples == [*(one.samples or ()), *(two.samples or ())] and both.n == 9
    assert both.value == pytest.approx((3 * one.value + 6 * two.value) / 9) and both.stderr is not None


def damaged(folder: Path, task: str, how: str) -> Path:
    path = write(folder, task)
    row = dict(ROWS[task][0])
    if how == "empty":
        return write(folder, task, [])
    if how == "nothing":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "text":
        path.write_bytes(b'{"question": "?"}\n')
    elif how == "broken line":
        return write(folder, task, [json.dumps(row), '{"question": '])
    elif how == "no column":
        return write(folder, task, [json.dumps(row), json.dumps({k: v for k, v in row.items() if k != "choices"})])
    elif how == "a list":
        return write(folder, task, ["[1, 2]"])
    elif how == "wrong gold":
        return write(folder, task, [json.dumps(row | {"answerKey": "Z"})])
    elif how == "wrong type":
        return write(folder, task, [json.dumps(row | {"choices": "none"})])
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "has no rows, so task arc_easy has nothing to score"),
        ("nothing", "has no rows"),
        ("cut", "is not a whole gzip file"),
        ("text", "is not a whole gzip file"),
        ("broken line", "line 2 is not JSON"),
        ("no column", "line 2 lacks choices; task arc_easy reads a table of question, choices, answerKey"),
        ("a list", "line 1 lacks question, choices, answerKey"),
        ("wrong gold", "line 1 cannot be scored by task arc_easy: it has no right answer among its choices"),
        ("wrong type", "line 1 cannot be scored by task arc_easy"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(how: str, message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, "arc_easy", how)
    with pytest.raises(UserError) as caught:
        local_task("arc_easy", tmp_path)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


def test_only_the_source_of_the_rows_differs_from_lm_evals_definition(data: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    from halobench.tasks.lm_eval_tasks import definitions

    asked = {"doc_to_text", "doc_to_choice", "output_type", "metric_list", "generation_kwargs", "filter_list"}
    for name in ROWS:
        task = local_task(name, data)[0]
        theirs = load_yaml(definitions() / KNOWN_TASKS[name].definition)
        for key in asked & set(theirs):
            if key == "generation_kwargs":
                assert theirs[key].items() <= task.config.generation_kwargs.items()
            else:
                assert getattr(task.config, key) == theirs[key], (name, key)
        assert (theirs.get("metadata") or {}).get("version", task.VERSION) == task.VERSION


@needs_data
def test_every_local_task_runs_on_its_real_file(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    local = [name for name, known in KNOWN_TASKS.items() if known.local]
    found, outcome = run(reader, bpe, local, limit=3, data_dir=DATA)
    assert [source.task for source in outcome.sources] == local
    rows = {source.task: source.rows for source in outcome.sources}
    assert rows["hellaswag"] == 10042 and rows["lambada_openai"] == 5153 and rows["wikitext"] == 62
    for name in local:
        headline = found[f"{name}/{KNOWN_TASKS[name].headline}"]
        assert headline.n == 3 and np.isfinite(headline.value)
    assert found["hellaswag/margin"].samples is not None and not found["lambada_openai/perplexity"].higher_is_better


@needs_data
def test_winogrande_scores_one_text_behind_two_contexts(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    found, _ = run(reader, bpe, ["winogrande"], limit=24, data_dir=DATA)
    margins, right = (np.array(found[f"winogrande/{name}"].samples) for name in ("margin", "acc"))
    assert ((margins > 0) == (right > 0)).all() and 0 < right.mean() < 1


def test_a_local_task_asks_what_lm_eval_asks(data: Path) -> None:
    task, _ = local_task("hellaswag", data)
    doc = next(iter(task.validation_docs()))
    assert task.doc_to_text(doc) == ITEMS[0].context and task.doc_to_choice(doc) == list(ITEMS[0].choices)
    assert task.doc_to_target(doc) == ITEMS[0].label and not task.has_training_docs()


def test_an_unknown_task_is_an_error_with_the_nearest_name(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.tasks import TaskManager

    few = TaskManager(include_path=str(OUR_TASKS), include_defaults=False)
    with pytest.raises(UserError, match="unknown lm-eval task 'tiny_continuatoin'; did you mean 'tiny_continuation'"):
        run(reader, bpe, ["tiny_continuatoin"], manager=few)


def test_a_model_is_given_back_when_its_tasks_are_done(pico, bpe) -> None:  # type: ignore[no-untyped-def]
    import gc
    import weakref

    model = pico(vocab_size=len(bpe))
    run(model, bpe, [OFFLINE_TASK], limit=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_number_that_is_none_names_its_task(data, reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "process_results", lambda self, doc, results: {"acc": float("inf")})
    with pytest.raises(HalobenchError, match="task lambada_openai: acc is inf"):
        run(reader, bpe, ["lambada_openai"], data_dir=data, limit=2)
