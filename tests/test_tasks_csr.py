"""The bridge to lm-eval: same numbers as lm-eval and as our own scoring, real files, clear errors."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halobench.errors import UserError
from halobench.records import Metric
from halobench.tasks.continuation import load_items, score_items
from halobench.tasks.csr import LOCAL_TASKS, OUR_TASKS, run_lm_eval

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "eval").is_dir(), reason="no ../shared/data/eval beside the repository")


def by_name(metrics: list[Metric]) -> dict[str, Metric]:
    return {f"{metric.task}/{metric.metric}": metric for metric in metrics}


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], limit: int = 12, **more: object
) -> dict:
    options = {"limit": limit, "batch_size": 8, "max_length": 2048, "seed": 0, **more}
    return by_name(run_lm_eval(model, tokenizer, tasks, **options))  # type: ignore[arg-type]


def test_the_offline_task_gives_our_own_marks(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    found = run(reader, bpe, ["tiny_continuation"])
    ours = score_items(reader, bpe, load_items(12))
    for name, values in (("acc", ours.correct), ("acc_norm", ours.correct_norm), ("margin", ours.margin)):
        metric = found[f"tiny_continuation/{name}"]
        assert metric.samples == pytest.approx(values.tolist(), abs=1e-3)
        assert metric.value == pytest.approx(values.mean(), abs=1e-4)
        assert metric.n == 12 and metric.suite == "csr"
        assert metric.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(12), abs=1e-4)


def test_the_bridge_equals_lm_eval_on_its_own(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    alone = lm_eval.simple_evaluate(
        model=HFLM(pretrained=reader, tokenizer=bpe, backend="causal", batch_size=1, max_length=2048),
        tasks=["tiny_continuation"],
        limit=6,
        task_manager=TaskManager(include_path=str(OUR_TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    assert alone is not None
    found = run(reader, bpe, ["tiny_continuation"], limit=6)
    for name in ("acc", "acc_norm", "margin"):
        assert found[f"tiny_continuation/{name}"].value == pytest.approx(
            alone["results"]["tiny_continuation"][f"{name},none"], abs=1e-5
        )


def test_the_callers_random_state_and_mode_are_left_alone(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    def states() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    before = states()
    reader.train()
    run(reader, bpe, ["tiny_continuation"], limit=2)
    assert states() == before and reader.training


def test_a_model_in_training_is_judged_without_its_dropout(pico, bpe) -> None:  # type: ignore[no-untyped-def]
    model = pico(vocab_size=len(bpe), max_position_embeddings=4096, attention_dropout=0.5)
    still = run(model, bpe, ["tiny_continuation"], limit=3)
    assert run(model.train(), bpe, ["tiny_continuation"], limit=3) == still


@needs_data
def test_every_local_task_runs_on_its_real_file(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    found = run(reader, bpe, list(LOCAL_TASKS), limit=4, data_dir=DATA)
    for task in LOCAL_TASKS:
        assert found[f"{task}/acc"].n == 4 and found[f"{task}/acc"].stderr is not None
        if task == "lambada_openai":
            assert not found["lambada_openai/perplexity"].higher_is_better
        else:
            assert found[f"{task}/margin"].samples is not None
    for task in ("arc_easy", "hellaswag", "piqa", "openbookqa"):
        assert f"{task}/acc_norm" in found


@needs_data
def test_the_margin_is_positive_where_accuracy_is_one_when_lengths_are_the_same(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    found = run(reader, bpe, ["winogrande"], limit=24, data_dir=DATA)  # scores one text behind two contexts
    margins, right = (np.array(found[f"winogrande/{name}"].samples) for name in ("margin", "acc"))
    assert ((margins > 0) == (right > 0)).all() and 0 < right.mean() < 1


@needs_data
def test_a_local_task_asks_what_lm_eval_asks() -> None:
    from halobench.tasks.csr import local_task

    task = local_task("hellaswag", DATA)
    doc = next(iter(task.validation_docs()))
    assert task.doc_to_text(doc) == "Roof shingle removal: A man is sitting on a roof. He"
    assert task.doc_to_target(doc) == 3 and len(task.doc_to_choice(doc)) == 4
    assert not task.has_training_docs()


def test_a_file_that_is_missing_is_named(reader, bpe, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="task piqa needs piqa.validation.jsonl.gz, which is not in"):
        run(reader, bpe, ["piqa"], data_dir=tmp_path)


def test_an_unknown_task_is_an_error_with_the_nearest_name(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.tasks import TaskManager

    few = TaskManager(include_path=str(OUR_TASKS), include_defaults=False)
    with pytest.raises(UserError, match="unknown lm-eval task 'tiny_continuatoin'; did you mean 'tiny_continuation'"):
        run(reader, bpe, ["tiny_continuatoin"], manager=few)
