"""The report says what the files say, comes about whatever they are like, and a browser shows nothing but text."""

import json
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import training
from matplotlib.figure import Figure

import config
import pop
from data import UserError
from engine import signals
from engine.audit import verdict, warnings
from lab import curves, report

CHROMIUM = shutil.which("chromium")
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and sync_playwright), reason="needs a browser: apt-get install chromium, pip install playwright"
)


# --------------------------------------------------------------------------------------------------- made-up runs


def answer(reward, text="An answer.", **more):
    usual = dict(ids=[1] * 10, finished=True, thoughts=["so it seems"], ratings=[2.0], grade=reward, guards=[])
    return {"text": text, "reward": reward, "advantage": 0.0, **usual, **more}


def episode(step, *answers, document="A text on voles.", problem="What do voles eat?", **more):
    criterion = dict(name="Food", gold="they eat roots", description="The answer names roots.", weight=2.0)
    usual = dict(reference="Roots.", rubric=[criterion], prompt_ids=[1], failures=[], drop=None)
    return {
        "step": step,
        "document": {"id": "notes.txt", "text": document},
        "problem": problem,
        "answers": answers or [answer(0.25), answer(0.75)],
        **usual,
        **more,
    }


def metrics(step, **more):
    usual = dict(reward_mean=0.5, reward_spread=0.25, trained_tokens=100, completion_length=10.0, kl=0.01, entropy=1.0)
    none = dict.fromkeys(("heldout_reward", "heldout_similarity", "grad_norm", "zero_spread_share"))
    return {"step": step, "drops": {}, "seconds": {"solve": 30.0, "update": 90.0}, **usual, **none, **more}


def probe(name, exploitable):
    side = {"exploitable": exploitable, "reward": {"mean": 0.7}, "margin": {"mean": 0.1}}
    return {"probe": name, "baseline": "sampled answer", "on": side, "off": side}


def audit(*probes):
    usual = [probe(name, False) for name in ("sampled answer", "reference", "another's reference", "empty")]
    return {"judge": "logits", "documents": ["a", "b"], "probes": [*usual, *probes]}


def make_run(folder, steps=(), said=(), audit=None, **settings):
    folder.mkdir(parents=True)
    cfg = asdict(config.Config(**{**config.PRESETS["demo"], "preset": "demo", **settings}))
    (folder / "config.json").write_text(json.dumps(cfg))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in steps))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in said))
    if audit:
        (folder / "audit.json").write_text(json.dumps(audit))
    return folder


@pytest.fixture
def run(tmp_path):
    """Two steps of two groups, of which the last was dropped."""
    dropped = episode(2, problem="", answers=[], drop="proposer/unfinished")
    steps = [metrics(1, reward_mean=0.25), metrics(2, trained_tokens=150, drops={"proposer/unfinished": 1})]
    return make_run(tmp_path / "run", steps, [episode(1), episode(1), episode(2), dropped], audit(), lr=3e-4)


def page_of(*runs):
    """The page without curves: to draw them takes most of the time, and they are tested by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots", lambda runs: {})
        return report.write(runs, runs[0].parent / "page.html").read_text(encoding="utf-8")


def words_of(run, heading):
    return report.facts(report.Run(run))[heading]


# ------------------------------------------------------------------------------------------------------ in words


@pytest.mark.parametrize(
    ("heading", "lines"),
    [
        ("Model", ["smollm2, 4bit"]),
        ("Documents", ["samples, task instructions"]),
        ("Preset", ["demo", "lr 0.0003 instead of 0.0001"]),
        ("Steps", ["2 done of 4 planned, 250 tokens trained on"]),
        ("Reward", ["0.250 in the first 1 of 2 steps, 0.500 in the last 1"]),
        ("Best step", ["none: nothing was measured on held-out documents"]),
        ("Audit", verdict(audit())),
        ("Groups", ["4 played", "1 dropped: proposer/unfinished"]),
        ("Time", ["0:04:00 h in steps", "25% solve", "75% update"]),
        ("Files", ["all there, all whole"]),
    ],
)
def test_the_words_are_those_of_the_files(run, heading, lines):
    assert words_of(run, heading) == lines


def test_a_preset_that_nothing_was_changed_of(tmp_path):
    assert words_of(make_run(tmp_path / "run"), "Preset") == ["demo, nothing changed"]


def test_the_corpus_of_the_task_is_named_where_none_was_given(tmp_path):
    run = make_run(tmp_path / "run", preset="24gb", corpus="", task="health")
    assert words_of(run, "Documents") == ["m42-health/HC4, task health"]


def test_of_many_steps_the_reward_is_of_the_first_and_the_last_tenth(tmp_path):
    run = make_run(tmp_path / "run", [metrics(s, reward_mean=s / 100) for s in range(1, 21)])
    assert words_of(run, "Reward") == ["0.015 in the first 2 of 20 steps, 0.195 in the last 2"]


def test_an_exploitable_answer_is_named(tmp_path):
    found = audit(probe("generic essay", True))
    told = words_of(make_run(tmp_path / "run", audit=found), "Audit")
    assert told == [*verdict(found), *warnings(found)] and "by: generic essay (0.70, margin" in told[-1]


EVALUATIONS = [metrics(s, heldout_similarity=x, heldout_reward=1 - x) for s, x in ((1, 0.5), (2, 0.625), (3, 0.5))]


def best(tmp_path, evaluations=EVALUATIONS, **settings):
    return words_of(make_run(tmp_path / "run", evaluations, **settings), "Best step")


def test_the_best_step_is_that_of_the_highest_similarity(tmp_path):
    assert best(tmp_path) == ["2: held-out similarity 0.625"]


def test_with_best_by_reward_it_is_that_of_the_highest_reward(tmp_path):
    assert best(tmp_path, best_by="reward") == ["1: held-out reward 0.500"]


def test_without_similarities_the_reward_decides(tmp_path):
    assert best(tmp_path, [metrics(s, heldout_reward=0.25 * s) for s in (1, 2)]) == ["2: held-out reward 0.500"]


def test_the_best_step_may_be_before_training(tmp_path):
    before = {"step": 0, "heldout_similarity": 0.75, "heldout_reward": 0.0, "heldout_length": 10.0}
    assert best(tmp_path, [before, *EVALUATIONS]) == ["0, before training: held-out similarity 0.750"]


def test_what_was_measured_before_training_is_no_step(tmp_path):
    before = {"step": 0, "heldout_similarity": 0.75}
    run = make_run(tmp_path / "run", [before, metrics(1)])
    assert words_of(run, "Steps") == ["1 done of 4 planned, 100 tokens trained on"]


def test_replayed_episodes_are_named_with_the_documents(tmp_path):
    run = make_run(tmp_path / "run")
    cfg = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**cfg, "episodes": "other/episodes.jsonl"}))
    assert words_of(run, "Documents")[1:] == ["problems and rubrics of other/episodes.jsonl"]


# -------------------------------------------------------------------------------------------------------- curves


def titles(*runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "svg_of", lambda *_: "")
        return list(curves.plots(runs))


def test_what_is_null_in_all_steps_has_no_plot(run):
    shown = ["Reward, ± spread within groups", "Length of answers", "KL to the base model", "Entropy"]
    assert titles(report.Run(run).metrics) == shown


def test_what_is_known_of_one_step_of_one_run_has_a_plot():
    assert "Held-out reward" in titles([metrics(1)], [metrics(1), metrics(2, heldout_reward=0.5)])


@pytest.mark.parametrize(("points", "lines"), [(60, 1), (61, 2)])
def test_a_curve_of_many_points_is_drawn_faintly_beside_its_mean(points, lines):
    svg = curves.svg_of([[metrics(step) for step in range(points)]], "kl", "nats")
    assert len(re.findall(r"fill: none; stroke: var\(--c0\)", svg)) == lines


@pytest.mark.parametrize(("key", "band"), [("reward_mean", (0.25, 0.75)), ("grade_mean", (0.5, 0.7)), ("kl", None)])
def test_rewards_and_grades_have_a_band_as_wide_as_their_own_spread(key, band):
    axes = Figure().add_subplot()
    curves.draw(axes, [metrics(step, grade_mean=0.6, grade_spread=0.1) for step in (1, 2)], key, "black")
    bands = [path.get_extents() for drawn in axes.collections for path in drawn.get_paths()]
    assert [(box.y0, box.y1) for box in bands] == ([pytest.approx(band)] if band else [])


def test_smoothing_takes_the_mean_of_the_neighbours():
    assert curves.smoothed([0.0, 3.0, 0.0, 0.0]) == [1.5, 1.0, 1.0, 0.0]


def test_every_colour_of_a_plot_is_a_variable_of_the_page():
    svg = "".join(curves.plots([[metrics(1), metrics(2)], [metrics(1), metrics(2)]]).values())
    found = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    assert found == {"none", "var(--c0)", "var(--c1)", "var(--dim)", "var(--line)"} and "#" not in re.sub(
        r"(?:url\(|href=\")#\w+", "", svg
    )


# ------------------------------------------------------------------------------------------------------ episodes


def test_answers_are_ordered_by_reward_and_those_without_come_last(tmp_path):
    run = make_run(tmp_path / "run", said=[episode(1, *(answer(r) for r in (0.25, None, 0.75, 0.0)))])
    group = report.Run(run).groups[0]
    assert [a["reward"] for a in group.episode["answers"]] == [0.75, 0.25, 0.0, None]
    assert group.rewards == [0.75, 0.25, 0.0]


def test_a_group_shows_its_answers_with_rewards_advantages_ratings_and_thoughts(tmp_path):
    worse = answer(0.125, "Cheese.", advantage=-0.25, ratings=[0.5], thoughts=["not in the text"], guards=["length"])
    better = answer(0.625, "Roots.", advantage=0.25, ratings=[1.5], thoughts=["as in the text"])
    html = page_of(make_run(tmp_path / "run", [metrics(1)], [episode(1, worse, better)]))
    group = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", html[html.index("Answers, best first") :]))
    first, second = (
        r"0.625 advantage \+0.250 .*Roots. .*1.5 as in the text",
        "0.125 advantage -0.250 .*length .*Cheese. .*0.5 not in",
    )
    assert re.search(f"{first} .*{second}", group)


def test_a_group_shows_document_problem_reference_and_rubric(run):
    assert all(
        text in page_of(run) for text in ("A text on voles.", "What do voles", "Roots.", "Food", "they eat roots")
    )


def test_a_dropped_group_shows_why_and_what_was_rejected(tmp_path):
    failures = [dict(role="proposer", reason="too short", raw="What?")]
    dropped = episode(1, problem="", answers=[], drop="proposer/too short", failures=failures)
    html = page_of(make_run(tmp_path / "run", [metrics(1)], [dropped]))
    assert re.search(r'<span class="tag bad">proposer/too short</span>(.|\n)*What\?', html)


def test_a_long_document_is_cut_with_a_note(tmp_path):
    html = page_of(make_run(tmp_path / "run", [metrics(1)], [episode(1, document=5000 * "x")]))
    assert 2500 * "x" in html and 2501 * "x" not in html and "5,000 characters in all" in html


def test_highlights_are_the_best_and_the_worst(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICKS", 2)
    rewards = [(0.5, 0.5), (0.25, 1.0), (0.0, 0.125), (0.375, 0.625)]
    run = report.Run(make_run(tmp_path / "run", [], [episode(1, *map(answer, pair)) for pair in rewards]))
    found = {name: [g.id for g in picks] for name, picks in run.highlights.items()}
    assert found == {"Best answers": ["g-2", "g-4"], "Worst answers": ["g-3", "g-2"]}


def test_of_equal_groups_the_newest_are_the_highlights(tmp_path):
    run = report.Run(make_run(tmp_path / "run", [], [episode(s) for s in range(1, 21)]))
    assert [g.step for g in run.highlights["Best answers"]] == list(range(20, 12, -1))


# -------------------------------------------------------------------------------------------- more than one page holds


def test_a_run_that_fits_is_shown_whole_and_without_a_notice(run):
    html = page_of(run)
    assert html.count('class="group"') == 4 and "groups are in this page" not in html


@pytest.fixture
def capped(tmp_path, monkeypatch):
    """capped(bytes) -> the page on 100 steps of one group, and the steps in it. Highlights are of steps 3 and 5."""
    special = {s: [answer(low), answer(high)] for s, low, high in ((3, 0.9, 1.0), (5, 0.1, 0.2))}
    run = make_run(tmp_path / "run", [metrics(1)], [episode(s, *special.get(s, ())) for s in range(1, 101)])
    monkeypatch.setattr(report, "PICKS", 1)

    def page(budget):
        monkeypatch.setattr(report, "BUDGET", budget)
        html = page_of(run)
        return html, [int(step) for step in re.findall(r'id="r0-(\d+)"', html)]

    return page


def test_a_page_that_would_be_too_large_says_what_is_in_it(capped):
    html, steps = capped(90_000)
    assert 40 < len(steps) < 90 and f"{len(steps)} of 100 groups are in this page" in html


def test_it_keeps_the_highlights_and_the_newest_step_whatever_their_size(capped):
    assert capped(0)[1] == [3, 5, 100]


def test_it_keeps_an_even_sample_of_the_rest(capped):
    steps = capped(90_000)[1]
    assert max(b - a for a, b in pairwise(steps)) <= 2 * 100 / len(steps) + 1


def test_2000_episodes_of_8_answers_stay_under_25_mb(tmp_path):
    said = 100 * "The answer. "
    group = episode(0, *[answer(i / 8, said) for i in range(8)], document=3 * said)
    run = make_run(tmp_path / "run", [metrics(1)])
    lines = (json.dumps({**group, "step": 1 + i // 10}) for i in range(2000))
    (run / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    assert 15e6 < report.write([run]).stat().st_size < 25e6


# ---------------------------------------------------------------------------------------------------- several runs


def test_several_runs_are_all_named_in_words_and_in_the_legend(run):
    other = make_run(run.parent / "other", [metrics(1)], [episode(1)])
    html = report.write([run, other], run.parent / "page.html").read_text()
    assert "<th>run</th><th>other</th>" in html and html.count("</i>run</span>") == html.count("</i>other</span>") == 2


def test_runs_of_one_name_are_told_apart_by_their_paths(run):
    other = make_run(run.parent / "again" / "run", [metrics(1)])
    assert f"<th>{run}</th><th>{other}</th>" in page_of(run, other)


def test_groups_of_several_runs_have_ids_of_their_own(run):
    other = shutil.copytree(run, run.parent / "other")
    ids = re.findall(r'class="body" id="([^"]+)"', page_of(run, other))
    assert len(ids) == len(set(ids)) == 8


def test_the_page_of_several_runs_is_written_here(run, monkeypatch):
    other = shutil.copytree(run, run.parent / "other")
    monkeypatch.chdir(run.parent)
    assert report.write([run, other]) == Path("report.html") and Path("report.html").exists()


# ------------------------------------------------------------------------------------------------- damaged, missing


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "episodes.jsonl", "audit.json"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    assert f"there is no {name}" in page_of(run)


@pytest.mark.parametrize("name", ["config.json", "audit.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text('{"cut')
    assert f"{name}: damaged records, left out: 1" in page_of(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "episodes.jsonl"])
def test_a_cut_last_line_is_left_out_and_counted(run, name):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole + whole[: len(whole) // 10])
    assert words_of(run, "Files") == [f"{name}: damaged records, left out: 1"]
    assert words_of(run, "Steps") == ["2 done of 4 planned, 250 tokens trained on"]
    assert words_of(run, "Groups") == ["4 played", "1 dropped: proposer/unfinished"]


def test_lines_that_are_no_episodes_are_counted(run):
    with (run / "episodes.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"step": 3, "document": 5, "problem": 7, "answers": []}\n')
    assert words_of(run, "Files") == ["episodes.jsonl: damaged records, left out: 2"]


def test_fields_that_an_episode_lacks_are_no_trouble(run):
    bare = {
        "document": {"id": "x", "text": "Bare."},
        "problem": "",
        "answers": [{"reward": None, "ids": [], "ratings": [1]}],
    }
    (run / "episodes.jsonl").write_text(json.dumps(bare) + "\n")
    assert "Bare." in page_of(run)


def test_an_audit_of_another_shape_is_no_trouble(run):
    (run / "audit.json").write_text('{"judge": "logits"}')
    assert words_of(run, "Audit") == ["audit.json is not as an audit writes it (KeyError: 'probes')"]


def test_a_run_that_ended_before_its_first_step_has_a_report_that_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "episodes.jsonl").unlink()
    html = page_of(run)
    assert "0 done of 4 planned" in html and "No step has been finished" in html and "No episode has been" in html


def test_numbers_that_are_not_finite_are_left_out_of_curves():
    assert curves.points([metrics(1, kl=float("nan")), metrics(2, kl=0.5)], "kl") == [(2, 0.5)]


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    html = page_of(make_run(tmp_path / "run", [metrics(1)], [episode(1, answer(0.5, "a \ud83d b"))]))
    assert "a ? b" in html


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is no run: .* name a folder"):
        report.write([tmp_path])


def test_a_place_that_cannot_be_written_is_a_clear_error(run):
    with pytest.raises(UserError, match=r"nowhere/page\.html cannot be written: No such file"):
        report.write([run], run / "nowhere" / "page.html")


# ------------------------------------------------------------------------------------------------ at the end of a run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trained(model, tmp_path, monkeypatch):
    """trained() trains a tiny model for two steps, and returns the exit code."""
    training.open_gates(monkeypatch.setattr)
    return lambda **more: pop.main(training.flags(model, tmp_path / "run", **{"steps": 2, **more}))


def test_a_finished_run_has_a_report(trained, tmp_path, capsys):
    assert trained() == 0
    assert f"report in {tmp_path}/run/report.html" in capsys.readouterr().out
    assert "2 done of 2 planned" in (tmp_path / "run" / "report.html").read_text()


def test_an_interrupted_run_has_one_too(trained, tmp_path, monkeypatch):
    real = pop.update

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(pop, "update", interrupted)
    assert trained() == signals.RESUMABLE
    assert "1 done of 2 planned" in (tmp_path / "run" / "report.html").read_text()


def test_it_is_refreshed_at_every_evaluation(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(pop.heldout, "similarities", lambda pairs: None)  # its model takes a second to load
    monkeypatch.setattr(report, "write", lambda runs: seen.append(len(report.Run(runs[0]).metrics)))
    trained(eval_every=1, eval_documents=1)
    assert seen == [2, 3]  # step 0 is what was measured before


def failing(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(report, "embed", fail)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("odd"), KeyboardInterrupt("SIGINT")])
def test_a_report_that_fails_is_one_line(run, monkeypatch, capsys, error):
    failing(monkeypatch, error)
    report.refresh(run)
    said = f"no report ({type(error).__name__}: {error}); to try again: python -m lab.report {run}\n"
    assert capsys.readouterr().out == said


def test_a_report_that_fails_changes_nothing_about_a_run(trained, monkeypatch, capsys):
    failing(monkeypatch, OSError("disk full"))
    assert trained(steps=1) == 0 and "done: adapter in" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- as text

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></details></div></main>"
    '<a href="javascript:document.title=1">here</a><svg onload=alert(1)>"\'>&lt;b&gt; {{ 7*7 }} {% raw %}'
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page on two runs in which everything that somebody else may have written is an attack, {} its place."""

    def attack(place):
        return f"{place}: {HOSTILE}"

    texts = dict(document=attack("document"), problem=attack("problem"), reference=attack("reference"))
    rubric = [dict(name=attack("name"), gold=attack("gold"), description=attack("description"), weight=1.0)]
    said = answer(0.5, attack("answer"), thoughts=[attack("thought")], guards=[attack("guard")])
    failures = [dict(role=attack("role"), reason=attack("reason"), raw=attack("raw"))]
    group = episode(1, said, answer(0.25), rubric=rubric, failures=failures, drop=attack("drop"), **texts)
    group["document"]["id"] = attack("id")
    steps = [metrics(1, seconds={attack("phase"): 1.0})]
    name = "<img src=x onerror=document.title=1> " + 150 * "x"
    folder = tmp_path_factory.mktemp("hostile")
    settings = dict(model=attack("model"), corpus=attack("corpus"))
    run = make_run(folder / name, steps, [group], audit(probe(attack("probe"), True)), **settings)
    return report.write([run, make_run(folder / "plain", [metrics(1)], [episode(1)])], folder / "page.html")


PLACES = "document problem reference name gold description answer thought guard role reason raw drop id phase".split()


def test_no_text_becomes_an_element_of_the_page_which_has_no_script(hostile):
    html = hostile.read_text()
    assert [html.count(tag) for tag in ("<script", "<img", "<svg onload", "<a href")] == [0, 0, 0, 7]


@pytest.mark.parametrize("place", [*PLACES, "model", "corpus", "probe"])
def test_hostile_text_is_in_the_page_as_text(hostile, place):
    assert f"{place}: &lt;script&gt;document.title=" in hostile.read_text()


def test_links_lead_nowhere_but_into_the_page(hostile):
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src|action)="([^"]*)"', hostile.read_text()))


# --------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, path, width=1280, **options):
    """The page, and what it complained of or asked for."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page, noise = context.new_page(), []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page, noise
    context.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Three steps of two groups each, on voles and, in step 2, on owls; a rubric of five criteria."""
    folder = tmp_path_factory.mktemp("shown")
    about = {(2, 1): "Where do owls sleep?"}
    groups = [episode(s, problem=about.get((s, i), f"What do voles eat, {s}-{i}?")) for s in (1, 2, 3) for i in (0, 1)]
    run = make_run(folder / "run", [metrics(s, heldout_reward=0.1 * s) for s in (1, 2, 3)], groups, audit())
    return report.write([run])


looks = pytest.mark.parametrize(("scheme", "width"), [(s, w) for s in ("light", "dark") for w in (1280, 390)])


@needs_browser
@looks
def test_the_page_loads_without_errors_and_without_requests(browser, shown, scheme, width):
    with opened(browser, shown, width, color_scheme=scheme) as (_, noise):
        assert noise == []


@needs_browser
@looks
def test_nothing_is_wider_than_the_screen_even_long_words(browser, hostile, scheme, width):
    with opened(browser, hostile, width, color_scheme=scheme) as (page, _):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser, shown, scheme):
    with opened(browser, shown, color_scheme=scheme) as (page, _):
        ratios = page.evaluate("""() => {
            const light = rgb => rgb.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                .map(v => v < 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const behind = light(getComputedStyle(document.body).backgroundColor) + 0.05;
            return ['body', '.dim', 'a', '.picks b'].map(name => {
                const ink = light(getComputedStyle(document.querySelector(name)).color) + 0.05;
                return Math.max(ink, behind) / Math.min(ink, behind);
            });
        }""")
        assert min(ratios) >= 4.5  # WCAG AA


@needs_browser
def test_dark_is_dark(browser, shown):
    with opened(browser, shown, color_scheme="dark") as (page, _):
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"


@needs_browser
def test_hostile_text_does_not_run(browser, hostile):
    with opened(browser, hostile) as (page, noise):
        assert page.title().endswith("· POP") and noise == []


@needs_browser
def test_hostile_text_makes_no_element(browser, hostile):
    with opened(browser, hostile) as (page, _):
        assert page.locator("img, iframe, script, [onload], [href^=javascript]").count() == 0


@needs_browser
def test_even_a_script_that_got_in_would_not_run(browser, shown, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(shown.read_text().replace("<h2>Curves", "<script>document.title='owned'</script><h2>Curves"))
    with opened(browser, broken) as (page, _):
        assert page.title() != "owned"


@needs_browser
def test_a_highlight_is_one_click_away(browser, shown):
    with opened(browser, shown) as (page, _):
        page.click(".picks a >> nth=0")
        assert page.locator(".body:target").is_visible()


@needs_browser
def test_an_episode_can_be_read_without_javascript(browser, shown):
    with opened(browser, shown, java_script_enabled=False) as (page, _):
        page.click(".step > summary >> text=Step 2")
        page.click(".step[open] >> text=Where do owls sleep?")
        assert page.locator("text=they eat roots >> visible=true").count() == 1
