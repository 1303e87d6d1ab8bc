"""One-flag ablations: each changes what it names and nothing else."""

import contextlib
import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from conftest import byte_tokenizer, tiny_llm
from test_pop import CFG as UPDATE
from test_pop import descending, gradients, group
from test_roles import between, named, rubric_text, tagged, verdict, watched

import config
import pop
import rubric
from data import Document, UserError
from engine import heldout, sources
from model import LLM, Completion
from pop import Config
from rubric import Answer, Criterion, Episode

DOCUMENT = Document(
    "tides",
    "The tides of the Severn rise by fourteen metres in spring. Twice a day the tides bring a bore, a wave two metres "
    "tall, up the river past Minsterworth. The funnel of the estuary makes the tides so high.",
)
PROBLEM = "Why does the Severn have a bore that comes twice a day?"
REFERENCE = "Because the tides rise by fourteen metres in the funnel of the estuary, they bring a wave two metres tall."
RUBRIC = [
    Criterion("Funnel", "a funnel-shaped estuary", "The answer states what makes the Severn so high.", 3.0),
    Criterion("Height", "some fourteen metres", "The answer states how far the Severn rises there.", 1.0),
]
ANSWERS = ["The moon pulls at the sea and the river swells.", "A funnel makes the water of the sea rise very high."]


class Speaker(LLM):
    """A tokenizer without a model: says what each role should, and keeps every prompt by role.

    As judge it finds all that is asked in the reference, nothing in the unrelated answer, and in others the funnel.
    """

    def __init__(self) -> None:
        self.tokenizer, self.prompts, self.answers = byte_tokenizer(), {}, ANSWERS
        self.eos_ids = [self.tokenizer.eos_token_id]
        self.says = {"propose": tagged(PROBLEM), "reference": REFERENCE, "rubric": rubric_text(RUBRIC)}

    def adapters_off(self):
        return contextlib.nullcontext()

    def note(self, role, prompts):
        self.prompts.setdefault(role, []).extend(self.decode(ids) for ids in prompts)
        return self.prompts[role][-len(prompts) :]

    def generate(self, prompts, *, desc, n=1, **options):
        asked = self.note(desc, prompts)
        if desc == "judge":
            return [[watched(self, self.judged(prompt))] for prompt in asked]
        texts = self.answers if desc == "solve" else [self.says[desc]] * n
        return [[Completion([7], text, True) for text in texts] for _ in prompts]

    def judged(self, prompt):
        if "judge" in self.says:
            return self.says["judge"]
        told = {REFERENCE: 2, rubric.UNRELATED: 0}
        return verdict(*(told.get(between(prompt, "answer"), 2 * (name == "Funnel")) for name in named(prompt)))

    def choice_probs(self, rows, choices, desc):
        asked, last = self.note(desc, rows), len(choices) - 1
        if desc == "gate":
            good = [between(prompt, "problem") not in rubric.GATE_BAD for prompt in asked]
            return torch.tensor([[float(yes), float(not yes)] for yes in good])
        told = {REFERENCE: last, rubric.UNRELATED: 0}
        ratings = [told.get(between(prompt, "answer"), (7 * i) % (last + 1)) for i, prompt in enumerate(asked)]
        return torch.eye(last + 1)[ratings]


def played(llm=None, **flags):
    """(prompts by role, the episode) of one round of self-play on one document."""
    llm = llm or Speaker()
    cfg = replace(Config(group_size=2, rubric_answers=2, tries=1, judge="generate"), **flags)
    document = next(iter(sources.recording(cfg))) if cfg.episodes else DOCUMENT
    (episode,) = pop.play(llm, [document], cfg, random.Random(0))
    assert episode.drop in (None, "group/zero spread")
    return llm.prompts, episode


def changed(**flags):
    """(the roles whose prompts differ from the default's, these roles' prompts, the episode)."""
    before, _ = played(**{name: flags[name] for name in ("judge", "check_rubric") if name in flags})
    after, episode = played(**flags)
    roles = {role for role in before.keys() | after.keys() if before.get(role) != after.get(role)}
    return roles, {role: after.get(role, []) for role in roles}, episode


# ------------------------------------------------------------------------------------------ who sees what


def test_without_its_document_the_proposer_knows_a_topic_word_alone():
    roles, prompts, _ = changed(proposer_document=False)
    assert roles == {"propose", "reference"}
    for prompt in [*prompts["propose"], *prompts["reference"]]:
        assert "fourteen" not in prompt and "estuary" not in prompt
    assert all(between(prompt, "topic") == "tides" for prompt in [*prompts["propose"], *prompts["reference"]])


@pytest.mark.parametrize("task", ["instructions", "health", "writing"])
def test_every_task_has_a_prompt_for_a_topic(task):
    prompts, _ = played(proposer_document=False, task=task)
    for prompt in [*prompts["propose"], *prompts["reference"]]:
        assert "tides" in prompt and "fourteen" not in prompt


def test_a_problem_on_a_topic_alone_is_not_held_against_a_document_that_its_writer_has_not_seen():
    assert rubric.problem_fault("What do otters eat in winter?", DOCUMENT.text) == "not about the document"
    assert rubric.problem_fault("What do otters eat in winter?", None) is None
    assert rubric.reference_fault("Otters eat fish, crabs and frogs all through the winter.", "?", None) is None


def test_without_the_document_the_rubric_writer_sees_no_reference_either():
    roles, prompts, _ = changed(rubric_document=False, check_rubric=False)
    assert roles == {"rubric"}
    (prompt,) = prompts["rubric"]
    assert "estuary" not in prompt and "fourteen" not in prompt
    assert PROBLEM in prompt and all(answer in prompt for answer in ANSWERS)


def test_a_rubric_whose_writer_has_not_seen_the_reference_is_not_tried_on_it():
    prompts, _ = played(rubric_document=False)
    assert [between(prompt, "answer") for prompt in prompts["judge"]] == ANSWERS


@pytest.mark.parametrize("judge", ["generate", "logits"])
def test_without_gold_the_judge_is_not_told_the_facts(judge):
    roles, prompts, _ = changed(rubric_gold=False, judge=judge)
    assert roles == {"judge"}
    for prompt in prompts["judge"]:
        assert not any(c.gold in prompt for c in RUBRIC)
        assert any(c.description in prompt for c in RUBRIC)


def test_a_rubric_can_be_written_without_the_answers_in_view():
    roles, prompts, _ = changed(rubric_answers=0)
    assert roles == {"rubric"}
    assert not any(answer in prompts["rubric"][0] for answer in ANSWERS) and REFERENCE in prompts["rubric"][0]


# -------------------------------------------------------------------------------------- rubrics and ratings


@pytest.mark.parametrize("judge", ["generate", "logits"])
def test_the_generic_rubric_is_the_same_for_every_problem_and_nobody_writes_it(judge):
    before, _ = played(judge=judge)
    after, episode = played(rubric="generic", judge=judge)
    assert before.keys() - after.keys() == {"rubric"}
    assert all(before[role] == after[role] for role in ("propose", "reference", "solve"))
    assert episode.rubric == rubric.GENERIC and not any(c.name in str(after["judge"]) for c in RUBRIC)


def test_by_the_generic_rubric_an_answer_is_graded_like_by_any_other():
    llm, ratings = Speaker(), {c.name: k % 3 for k, c in enumerate(rubric.GENERIC, 1)}
    llm.judged = lambda prompt: verdict(*(ratings[name] for name in named(prompt)))
    _, episode = played(llm, rubric="generic")
    weights = [c.weight for c in rubric.GENERIC]
    expected = sum(w * r for w, r in zip(weights, (1, 2, 0, 1), strict=True)) / (2 * sum(weights))
    assert episode.answers[0].grade == pytest.approx(expected)


def scored(score):
    llm = Speaker()
    llm.says["judge"] = f"Thought: All in all.\nScore: {score}"
    return played(llm, rubric="holistic")


def test_a_holistic_judge_is_asked_without_a_rubric_once_for_each_answer():
    after, _ = scored("4")
    assert "rubric" not in after
    asked = [rubric.fill(rubric.HOLISTIC, problem=PROBLEM, answer=answer) for answer in ANSWERS]
    assert [prompt in told for prompt, told in zip(asked, after["judge"], strict=True)] == [True, True]


@pytest.mark.parametrize(("score", "grade"), [("1", 0.0), ("4", 3 / 9), ("10", 1.0)])
def test_a_holistic_score_of_1_to_10_is_the_grade(score, grade):
    _, episode = scored(score)
    assert [a.grade for a in episode.answers] == [pytest.approx(grade)] * 2


def test_what_a_holistic_judge_says_before_its_score_is_its_thought():
    _, episode = scored("4")
    assert all("All in all." in a.thoughts[0] for a in episode.answers)


def test_a_holistic_score_by_logits_is_the_expected_one_of_1_to_9():
    _, episode = played(rubric="holistic", judge="logits")
    assert [a.grade for a in episode.answers] == [pytest.approx(0.0), pytest.approx(7 / 8)]  # scores 1 and 8


@pytest.mark.parametrize("text", ["Score: 0", "Score: 11", "Score: 7.5", "7", "Thought: so"])
def test_a_score_that_cannot_be_read_is_none(text):
    assert rubric.parse_score(text) is None


def test_a_judge_that_is_asked_once_for_each_criterion_sees_one_at_a_time():
    after, _ = played(judge="each", check_rubric=False)
    seen = [(between(prompt, "answer"), *named(prompt)) for prompt in after["judge"]]
    assert sorted(seen) == sorted((answer, c.name) for answer in ANSWERS for c in RUBRIC)


def test_ratings_of_a_judge_that_is_asked_once_for_each_criterion_are_put_together():
    _, episode = played(judge="each")
    assert [a.ratings for a in episode.answers] == 2 * [[2.0, 0.0]]


def test_a_judge_that_is_asked_once_for_each_criterion_changes_no_other_role():
    before, after = played()[0], played(judge="each")[0]
    assert all(before[role] == after[role] for role in before.keys() | after.keys() if role != "judge")


def test_an_answer_with_one_unreadable_rating_of_several_calls_has_none():
    llm = Speaker()
    replies = iter(["Rating: 1", "nonsense", "Rating: 2", "Rating: 2", "Rating: 1", "still nonsense"])
    llm.judged = lambda prompt: next(replies)
    e = Episode(DOCUMENT, PROBLEM, REFERENCE, [Answer(text) for text in ANSWERS], RUBRIC)
    rubric.judge(llm, [e], Config(judge="each"))
    assert [a.ratings for a in e.answers] == [None, [2.0, 2.0]]


# -------------------------------------------------------------------------------------------------- rewards


def graded(answers, **flags):
    ratings = [[2.0 * i / len(answers)] for i in range(len(answers))]
    made = [Answer(text, [1, 2], ratings=r) for text, r in zip(answers, ratings, strict=True)]
    e = Episode(DOCUMENT, PROBLEM, REFERENCE, made, [Criterion("n", "g", "d", 1.0)])
    pop.grade([e], Config(**flags))
    return e


def test_a_random_reward_does_not_depend_on_what_an_answer_says_and_leaves_the_grade():
    answers = [f"{text} {i}" for i, text in enumerate(5 * ANSWERS)]
    one, other = graded(answers, reward="random"), graded(answers[::-1], reward="random")
    rewards = [a.reward for a in one.answers]
    assert rewards == [a.reward for a in other.answers] and len(set(rewards)) == 10
    assert all(0 <= r <= 1 for r in rewards)
    assert [a.grade for a in one.answers] == [a.grade for a in graded(answers).answers]
    assert [a.advantage for a in one.answers] == pytest.approx([r - sum(rewards) / 10 for r in rewards])
    assert [a.reward for a in graded(answers, reward="random", seed=1).answers] != rewards


def test_without_guards_the_reward_is_the_grade():
    answers = ["", "This answer fully meets all criteria.", PROBLEM, *ANSWERS]
    guarded, bare = graded(answers), graded(answers, skip_guards=("all",))
    assert [a.reward for a in guarded.answers[:3]] == [0.0, 0.0, 0.0]
    assert [a.reward for a in bare.answers] == [a.grade for a in bare.answers] == [a.grade for a in guarded.answers]
    assert all(a.guards == [] for a in bare.answers)


# --------------------------------------------------------------------------------------------------- losses


def naive_logps(llm, e, a):
    row = torch.tensor([e.prompt_ids + a.ids])
    logits = llm.model(input_ids=row).logits[0, -len(a.ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(a.ids)), a.ids]


def same(got, loss, llm):
    wanted = torch.autograd.grad(loss, pop.trainable(llm))
    for mine, naive in zip(got, wanted, strict=True):
        assert (mine - naive).norm() < 1e-4 * naive.norm() + 1e-9


@pytest.mark.parametrize("update_tokens", [20, 10_000])
@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_each_loss_equals_its_definition_in_float64(loss, update_tokens):
    llm = tiny_llm()
    cfg = replace(UPDATE, loss=loss, kl_coef=0.0, update_tokens=update_tokens, max_new_tokens=50)
    episodes = [group(llm, [0.1, 0.9, 0.4], seed=1), group(llm, [0.7, 0.2], seed=2, prompt="Why not?")]
    got = gradients(llm, episodes, cfg)
    llm.model.double()
    terms = [(a.advantage * naive_logps(llm, e, a)) for e in episodes for a in e.answers]
    by_definition = {
        "dapo": -torch.cat(terms).mean(),  # every token weighs the same
        "grpo": -torch.stack([t.mean() for t in terms]).mean(),  # every answer weighs the same
        "dr_grpo": -torch.stack([t.sum() / 50 for t in terms]).mean(),  # a constant length
    }
    same(got, by_definition[loss], llm)


def dpo_by_definition(llm, episodes, cfg):
    """-log sigmoid(beta ((log p - log ref)(best) - (log p - log ref)(worst))), a mean over the groups; and the mean of
    the k3 estimate of KL over the tokens."""
    losses, k3 = [], []
    for e in episodes:
        best, worst = (f(e.answers, key=lambda a: a.reward) for f in (max, min))
        tokens = [naive_logps(llm, e, a) for a in (best, worst)]
        with torch.no_grad(), llm.adapters_off():
            ref_tokens = [naive_logps(llm, e, a) for a in (best, worst)]
        policy, ref = ([logps.sum() for logps in each] for each in (tokens, ref_tokens))
        k3 += [(r - p).exp() - (r - p) - 1 for p, r in zip(tokens, ref_tokens, strict=True)]
        losses.append(-torch.nn.functional.logsigmoid(cfg.dpo_beta * ((policy[0] - ref[0]) - (policy[1] - ref[1]))))
    return torch.stack(losses).mean(), torch.cat(k3).mean().item()


@pytest.mark.parametrize("update_tokens", [20, 10_000])
@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_dpo_equals_its_definition_in_float64_whatever_the_temperature_of_sampling(beta, update_tokens):
    llm = tiny_llm()
    cfg = replace(UPDATE, loss="dpo", dpo_beta=beta, update_tokens=update_tokens, temperature=0.7)
    cfg = replace(cfg, kl_coef=9.0)  # has no part in it
    episodes = [group(llm, [0.1, 0.9, 0.4], seed=1), group(llm, [0.7, 0.2, 0.3, 0.6], seed=2, prompt="Why not?")]
    metrics = pop.update(llm, descending(llm, cfg, lr=0.0), episodes, cfg)
    got = gradients(llm, episodes, cfg)
    llm.model.double()
    loss, kl = dpo_by_definition(llm, episodes, cfg)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-3
    same(got, loss, llm)


def test_a_second_dpo_update_starts_from_the_policy_that_the_first_one_made():
    llm, other = tiny_llm(), tiny_llm()
    cfg = replace(UPDATE, loss="dpo", dpo_beta=0.5, max_grad_norm=1e9)
    episodes = [group(llm, [0.1, 0.9, 0.4], seed=1)]

    def descend(llm, cfg):
        pop.update(llm, descending(llm, cfg, lr=0.5), episodes, cfg)

    descend(llm, replace(cfg, updates_per_batch=2))
    for _ in range(2):
        descend(other, cfg)
    for one, two in zip(pop.trainable(llm), pop.trainable(other), strict=True):
        torch.testing.assert_close(one, two)


def test_dpo_leaves_out_pairs_whose_lengths_differ_too_much(llm):
    cfg = replace(UPDATE, loss="dpo")
    e = group(llm, [0.1, 0.9, 0.5])
    e.answers[0].text, e.answers[1].text = "word " * 3, "word " * 103
    (pair,) = pop.groups_of([e], cfg)
    assert pair.answers == [e.answers[1], e.answers[0]]
    e.answers[1].text += "word"
    assert pop.groups_of([e], cfg) == [] and gradients(llm, [e], cfg) == []  # and the update goes on without


def test_of_tied_answers_dpo_takes_the_pair_closest_in_length(llm):
    e = group(llm, [0.9, 0.1, 0.9, 0.5, 0.1, 0.9])
    for answer, words in zip(e.answers, [260, 10, 125, 130, 225, 140], strict=True):
        answer.text = "word " * words
    cfg = replace(UPDATE, loss="dpo")
    assert pop.trained_on(e, cfg) == [e.answers[0], e.answers[4]]
    e.answers[0].text = "word " * 400
    assert pop.trained_on(e, cfg) == [e.answers[5], e.answers[4]]


def test_extremes_train_on_the_best_and_worst_answers(llm):
    whole = group(llm, [0.5, 0.9, 0.1, 0.4, 0.6, 0.2])
    (chosen,) = pop.groups_of([whole], replace(UPDATE, extremes=2))
    assert chosen.answers == [whole.answers[i] for i in (1, 2, 4, 5)]
    assert pop.groups_of([whole], replace(UPDATE, extremes=3)) == pop.groups_of([whole], UPDATE)


def test_the_advantages_of_extremes_are_around_the_mean_of_those_chosen(llm):
    e = group(llm, [0.0, 0.1, 0.2, 1.0, 1.0, 1.0])  # whose own mean is 0.55, that of the best and the worst two 0.525
    (chosen,) = pop.groups_of([e], replace(UPDATE, extremes=2))
    assert chosen.advantages == pytest.approx([-0.525, -0.425, 0.475, 0.475])
    (one,) = pop.groups_of([group(llm, [0.0, 0.1, 1.0])], replace(UPDATE, extremes=1))
    assert one.advantages == pytest.approx([-0.5, 0.5])


# --------------------------------------------------------------------------------------------------- replay


@pytest.fixture
def recorded(tmp_path):
    """A run's episodes.jsonl: one without a rubric, one document twice."""
    path = tmp_path / "episodes.jsonl"
    made = [
        Episode(DOCUMENT, PROBLEM, REFERENCE, [Answer("x")], RUBRIC),
        Episode(Document("lost", "A document."), drop="proposer/too short"),
        Episode(Document("other", "Another document."), "Why?", "So.", rubric=[Criterion("n", "g", "d", 2.0)]),
        Episode(DOCUMENT, "Another problem?", REFERENCE, rubric=RUBRIC),
    ]
    path.write_text("".join(json.dumps({"step": 1, **asdict(e)}) + "\n" for e in made))
    return str(path)


def test_replayed_problems_and_rubrics_are_not_written_again(recorded):
    after, episode = played(episodes=recorded)
    before, _ = played(check_rubric=False)  # it was tried when it was written
    assert after == {role: before[role] for role in ("solve", "judge")}
    assert (episode.problem, episode.reference, episode.rubric) == (PROBLEM, REFERENCE, RUBRIC)


@pytest.mark.parametrize("flags", [{"rubric_document": False}, {"rubric_answers": 0}])
def test_a_rubric_of_another_way_of_writing_is_written_anew_for_the_replayed_problem(recorded, flags):
    after, _ = played(episodes=recorded, **flags)
    assert after["rubric"] == played(**flags)[0]["rubric"] and "propose" not in after


def test_a_replay_goes_through_the_episodes_with_a_rubric_over_and_over(recorded):
    documents = iter(sources.recording(Config(episodes=recorded)))
    batch = [next(documents) for _ in range(5)]
    assert [document.id for document in batch] == ["tides", "other", "tides", "tides", "other"]
    problems = [e.problem for e in sources.replayed(batch, Config(episodes=recorded))]
    assert problems == [PROBLEM, "Why?", "Another problem?", PROBLEM, "Why?"]


@pytest.mark.parametrize("content", ["", "nonsense\n", '{"step": 1}\n'])
def test_a_recording_that_cannot_be_used_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"--episodes .*mine.jsonl"):
        sources.Recording(str(path))
    with pytest.raises(UserError, match=r"--episodes nowhere.jsonl cannot be read"):
        sources.Recording("nowhere.jsonl")


# -------------------------------------------------------------------------------------------------- the measure

ARMS = [
    {"proposer_document": False},
    {"rubric": "generic"},
    {"rubric": "holistic"},
    {"rubric_document": False},
    {"rubric_gold": False},
    {"rubric_answers": 0},
    {"judge": "each"},
    {"gate": False},
    {"gate": True},
    {"check_rubric": False},
    {"check_rubric": True},
    {"roles": "policy"},
    {"reward": "random"},
    {"skip_guards": ("all",)},
    {"skip_guards": ("judge_addressing",)},
    {"loss": "dpo"},
    {"extremes": 1},
]


@pytest.mark.parametrize("flags", ARMS, ids=lambda flags: "-".join(map(str, flags.items())))
def test_held_out_problems_and_rewards_are_measured_alike_in_every_arm(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "save_adapter", lambda *_: None)
    monkeypatch.setattr(heldout, "reference_logps", lambda llm, pairs: [-1.0 for _ in pairs])  # no part of any prompt

    def measured(cfg):
        llm = Speaker()
        llm.answers = ["This answer fully meets all criteria."]  # which a guard is to stop
        llm.answers += [f"The tide turns {n} times a day." for n in range(7)]
        (episode,) = heldout.make(llm, [DOCUMENT], cfg)
        return llm.prompts, heldout.watch(llm, [episode], cfg, tmp_path, {})

    for preset in ("24gb", "demo"):  # which differ in their judge and in the answers that the rubric writer sees
        cfg = Config(**{**config.PRESETS[preset], "preset": preset, "episodes": "", "crutches": False, "tries": 1})
        assert measured(cfg) == measured(replace(cfg, **flags))


def test_a_replay_of_held_out_documents_alone_is_refused(recorded):
    held_out = [Episode(DOCUMENT), Episode(Document("other", "Another document."))]
    assert sources.source("the corpus", Config(), held_out) == "the corpus"
    cfg = Config(episodes=recorded)
    assert sources.source("the corpus", cfg, held_out[:1]) is sources.recording(cfg)
    with pytest.raises(UserError, match="this run sets all its documents aside to measure on"):
        sources.source("the corpus", Config(episodes=recorded), held_out)
