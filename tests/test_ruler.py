"""RULER's prompts: exact lengths, answers that are there, samples that stand by themselves."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halobench.assets import TEXT_LONG, TINY_TEACHER
from halobench.errors import UserError
from halobench.tasks.ruler import RULER_TASKS, available, make_ruler_task
from halobench.tasks.ruler.counting import CodedText
from halobench.tasks.ruler.fitting import Gauge, fit
from halobench.tasks.ruler.haystacks import DEPTHS, NOISE, essay_sentences, scattered
from halobench.tasks.ruler.task import RulerTask
from halobench.tasks.text import read_jsonl

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NEEDLES = [name for name in RULER_TASKS.names() if name.startswith("niah")]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_TEACHER)


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerBase:
    """A BPE of another kind: spaces begin words, merges may cross words, and every text opens with a token."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    text = [read_jsonl(TEXT_LONG)[0].text[:60_000], "0123456789-", "abcdefghijklmnopqrstuvwxyz", NOISE]
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with small files in the form of SQuAD and HotpotQA."""
    folder = tmp_path_factory.mktemp("data")
    facts = [(f"town {i}", f"mayor {i * 7919 % 100_003}", f"In town {i} lives the mayor.") for i in range(60)]
    text = {
        town: f"{opening} It was mayor {mayor.split()[1]} who built {town}. {NOISE}" for town, mayor, opening in facts
    }
    rows = [
        {
            "context": text[town],
            "qas": [
                {"question": f"Who built {town}?", "is_impossible": False, "answers": [{"text": mayor}] * 2},
                {"question": "Why?", "is_impossible": True, "answers": []},
            ],
        }
        for town, mayor, _ in facts
    ]
    articles = [{"paragraphs": rows[i : i + 6]} for i in range(0, 60, 6)]
    (folder / "dev-v2.0.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Who built {facts[i][0]}?",
            "answer": facts[i][1] if i % 5 else "yes",
            "supporting_facts": [[facts[i][0], 0], [facts[(i + 1) % 60][0], 0]],
            "context": [[facts[(i + j) % 60][0], [text[facts[(i + j) % 60][0]]]] for j in range(4)],
        }
        for i in range(60)
    ]
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    return folder


def check(task: RulerTask, length: int, count: int = 3) -> None:
    room = length - task.answer_tokens
    for index in range(count):
        prompt = task.prompt(length, index)
        assert 0.99 * length - task.answer_tokens <= len(prompt.ids) <= room
        assert prompt.ids == task.tokenizer(prompt.text, verbose=False)["input_ids"]
        assert prompt.references and all(reference in prompt.text for reference in prompt.references)


@pytest.mark.parametrize("name", RULER_TASKS.names())
@pytest.mark.parametrize("kind", ["tiny", "merging"])
def test_prompts_fill_every_length_and_exceed_none(name, kind, data, request) -> None:  # type: ignore[no-untyped-def]
    task = make_ruler_task(name, request.getfixturevalue(kind), seed=0, data_dir=data)
    lengths = [max(512, task.shortest), 1500 if task.shortest > 1024 else 1024, 4000]
    for length in lengths:
        check(task, length)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe", "qa_1"])
def test_long_prompts_are_as_exact(name, tiny, data) -> None:  # type: ignore[no-untyped-def]
    check(make_ruler_task(name, tiny, seed=1, data_dir=data), 32_768, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2"])
def test_a_million_tokens_are_built_in_few_readings(name, tiny, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    task, million = make_ruler_task(name, tiny, seed=0), 1 << 20
    gauge, read = task.builder.gauge, []  # type: ignore[attr-defined]
    counted = gauge.ids

    def ids(text: str) -> list[int]:
        made = counted(text)
        read.append(len(made))
        return made

    monkeypatch.setattr(gauge, "ids", ids)
    prompt = task.prompt(million, 0)
    assert 0.999 * million <= len(prompt.ids) + task.answer_tokens <= million
    assert prompt.ids == tiny(prompt.text, verbose=False)["input_ids"]
    assert prompt.text.count(f"is: {prompt.references[0]}.") == 1
    assert sum(size > million // 2 for size in read) <= 3


def test_no_haystack_ends_with_its_corpus(tiny) -> None:  # type: ignore[no-untyped-def]
    sentences = essay_sentences()
    assert sum(map(len, sentences)) > 10**6  # the corpus is used whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halobench.tasks.ruler.haystacks.essay_sentences", lambda: sentences[:40])
        check(make_ruler_task("niah_single_2", tiny, seed=0), 8192, count=2)


@pytest.mark.parametrize("name", RULER_TASKS.names())
def test_a_sample_depends_on_seed_length_and_index_alone(name, tiny, data) -> None:  # type: ignore[no-untyped-def]
    make = lambda seed: make_ruler_task(name, tiny, seed=seed, data_dir=data)  # noqa: E731
    one, again, other = make(0), make(0), make(1)
    first = [one.prompt(1200, index).text for index in (0, 1, 2)]
    assert again.prompt(1200, 2).text == first[2] and len(set(first)) == 3
    assert other.prompt(1200, 2).text != first[2] and again.prompt(1216, 2).text != first[2]


@pytest.mark.parametrize("name", NEEDLES)
def test_a_needle_stands_once_and_where_its_depth_says(name, tiny) -> None:  # type: ignore[no-untyped-def]
    task = make_ruler_task(name, tiny, seed=0)
    for index in range(5):
        prompt = task.prompt(2048, index)
        context, question = re.split(r"\nWhat (?:is|are all)", prompt.text)
        context = context.partition("afterwards.\n")[2]
        asked = re.split(", and |, ", re.search(r"for (.+?) mentioned", question)[1])
        facts = dict.fromkeys(re.findall(r"(?<=special magic )\w+ for (.+?) is: (\S+)\.", context))
        assert sorted(v for k, v in facts if k in asked) == sorted(prompt.references)
        assert sum(v in prompt.references for _, v in facts) == len(prompt.references)
        if prompt.depth is None:
            assert len(prompt.references) == 4
            continue
        values, filler = task.builder.kind.value, task.builder.kind.filler
        needle = rf"One of the special magic {values} for {asked[0] if filler == 'needle' else '.+?'} is: \S+\.\s?"
        parts = context.partition(f"One of the special magic {values} for {asked[0]} is")[0], context
        before, whole = (len(tiny(re.sub(needle, "", part))["input_ids"]) for part in parts)
        assert before / whole == pytest.approx(prompt.depth, abs=0.01)


def test_needles_in_essays_stand_at_the_forty_depths_and_others_anywhere(tiny) -> None:  # type: ignore[no-untyped-def]
    depths = {
        name: [make_ruler_task(name, tiny, seed=0).prompt(1024, index).depth for index in range(16)]
        for name in ("niah_single_1", "niah_single_2")
    }
    for found in depths.values():
        assert min(found) < 0.2 and max(found) > 0.8 and 3 < sum(depth < 0.5 for depth in found) < 13
    away = [min(abs(depth - wanted) for wanted in DEPTHS) for depth in depths["niah_single_2"]]
    assert max(away) < 0.05  # half of a sentence that is as long as they come


def test_scattered_places_are_distinct_as_likely_and_never_last() -> None:
    rng, ends = np.random.default_rng(0), np.arange(13)
    counts: Counter[int] = Counter()
    for _ in range(400):
        places = scattered(5, 40, rng)(ends)
        assert places == sorted(set(places)) and len(places) == 5
        counts.update(places)
    assert set(counts) == set(range(12))  # before each of twelve units; behind the last there is none
    assert max(abs(count - 400 * 5 / 12) for count in counts.values()) < 5 * (400 * 5 / 12 * 7 / 12) ** 0.5
    assert scattered(5, 40, rng)(np.arange(4)) == [0, 0, 1, 1, 2]


def test_variables_form_one_chain_in_order(tiny) -> None:  # type: ignore[no-untyped-def]
    prompt = make_ruler_task("vt", tiny, seed=0).prompt(2048, 0)
    text = prompt.text.split("Memorize")[2]
    value = re.search(r"assigned the value (\d+)", text)[1]
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
    assert [later for later, _ in chain] == list(prompt.references)
    assert [earlier for _, earlier in chain] == [value, *prompt.references[:-1]]
    lines = text.split("\n\n")[1].partition("\nQuestion")[0].split("\n")
    noise = [NOISE.endswith(line) for line in lines]  # the first may be the end of a sentence
    assert sum(noise) + 5 == len(lines) and all(one or two for one, two in pairwise(noise))
    assert not prompt.text.endswith(" ") and value not in prompt.text.split("Memorize")[1]


@pytest.mark.parametrize(("length", "common", "other"), [(1024, None, 1), (4000, 6, 1), (8192, 30, 3)])
def test_common_words_are_the_most_common_at_every_length(length, common, other, tiny) -> None:  # type: ignore[no-untyped-def]
    task = make_ruler_task("cwe", tiny, seed=0)
    for index in range(3):
        prompt = task.prompt(length, index)
        listed = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", prompt.text.split("Below is")[2])
        counts = Counter(listed)
        often = {counts[word] for word in prompt.references}
        rest = [count for word, count in counts.items() if word not in prompt.references]
        assert len(set(prompt.references)) == 10 and len(often) == 1 and len(rest) >= 10
        assert max(rest) == other < often.pop() if common is None else often == {common} and max(rest) == other


def test_frequent_words_are_beyond_doubt_at_the_shortest_length(tiny) -> None:  # type: ignore[no-untyped-def]
    task = make_ruler_task("fwe", tiny, seed=0)
    for length in (task.shortest, 2048):
        prompt = task.prompt(length, 0)
        words = prompt.text.split("coded words. ")[1].split("\nQuestion")[0].split()
        assert [word for word, _ in Counter(words).most_common(4)] == ["...", *prompt.references]
        assert len({count for _, count in Counter(words).most_common(5)}) == 5


def test_a_length_without_room_is_refused_with_one_that_has_it(tiny, data) -> None:  # type: ignore[no-untyped-def]
    for name in RULER_TASKS.names():
        task = make_ruler_task(name, tiny, seed=0, data_dir=data)
        with pytest.raises(UserError, match=f"length 128 has no room for RULER's {name}") as caught:
            task.prompt(128, 0)
        check(task, int(re.search(r"use (\d+) or more", str(caught.value))[1]), count=2)


def test_the_documents_of_a_question_are_whole_and_shuffled(tiny, data) -> None:  # type: ignore[no-untyped-def]
    task, places = make_ruler_task("qa_2", tiny, seed=0, data_dir=data), set()
    for index in range(8):
        text = task.prompt(2048, index).text
        town = re.search(r"Who built (town \d+)\?", text)[1]
        documents = re.split(r"Document \d+:\n", text)[1:]
        assert any(document.startswith(f"{town}\n") and NOISE in document for document in documents)
        places.add(next(i for i, document in enumerate(documents) if document.startswith(f"{town}\n")))
        assert [int(n) for n in re.findall(r"Document (\d+):", text)] == list(range(1, len(documents) + 1))
    assert len(places) > 2


def test_tasks_without_files_are_left_out_with_the_reason(tiny, data, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert available(data) == (RULER_TASKS.names(), {})
    names, out = available(tmp_path)
    assert len(names) == 11 and set(out) == {"qa_1", "qa_2"} and "dev-v2.0.json" in out["qa_1"]
    with pytest.raises(UserError, match="no data folder was given"):
        make_ruler_task("qa_2", tiny, seed=0)
    with pytest.raises(UserError, match="did you mean 'niah_single_1'"):
        make_ruler_task("niah_single_11", tiny, seed=0)


@pytest.mark.parametrize("content", ["{", '{"data": [{}]}', "[]"])
def test_a_file_of_another_form_is_refused_in_one_line(content, tiny, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "dev-v2.0.json").write_text(content)
    with pytest.raises(UserError, match="dev-v2.0.json") as caught:
        make_ruler_task("qa_1", tiny, seed=0, data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not (DATA / "ruler_babilong").is_dir(), reason="needs the SQuAD file in ../shared/data")
def test_squad_fills_prompts(tiny) -> None:  # type: ignore[no-untyped-def]
    task = make_ruler_task("qa_1", tiny, seed=0, data_dir=DATA)
    for length in (task.shortest, 4000):
        check(task, length)


def test_fitting_leaves_out_what_no_patch_can_fill(tiny) -> None:  # type: ignore[no-untyped-def]
    draft = CodedText(Gauge(tiny), ["...", "abcdef", "bcdefg", "cdefgh", "defghi", "efghij"], 5000, 0)
    draft.patches = lambda units, gap: []  # type: ignore[method-assign]
    assert 950 < len(fit(Gauge(tiny), draft, 1000).ids) <= 1000
