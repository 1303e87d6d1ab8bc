"""What plan.py promises: sizes worked by hand, and nothing downloaded."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers

from config import PRESETS, TASKS, Config
from data import UserError
from lab import plan
from lab.plan import CONTEXT, GIB, KNOWN, Batch, PeakMemory, Shapes, predict, shapes_of, work_of

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
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
    ],
)
def test_known_models_have_their_published_parameter_counts(name: str, params: int):
    assert shapes_of(name).params == params


def test_qwen_7b_by_hand():
    assert QWEN_7B.linear_params * (0.5 + 1 / 64 + 1 / 4096) / GIB == pytest.approx(3.14, abs=0.005)
    assert QWEN_7B.embedding_params * 2 / GIB == pytest.approx(2.03, abs=0.005)
    assert QWEN_7B.lora_params(32) * 16 / GIB == pytest.approx(1.20, abs=0.005)
    assert QWEN_7B.kv_bytes(2) == 56 * 1024


def test_resident_memory_is_weights_adapters_and_moments():
    loaded = predict(TINY, {}, device="cuda", load_in="fp32", lora_r=4)["load"]
    embedding_as_read = 2 * 64 * 32
    assert loaded == CONTEXT["cuda"] + 4 * (TINY.params + TINY.lora_params(4)) + embedding_as_read
    work = {"solve": Batch(1, 1, 1)}
    new, trained = (predict(TINY, work, device="cuda", lora_r=4, trained=t)["solve"] for t in (False, True))
    assert trained - new == 8 * TINY.lora_params(4)
    on_cpu = predict(TINY, {}, device="cpu", load_in="fp32", lora_r=4)["load"]
    assert on_cpu - CONTEXT["cpu"] == int(1.05 * (loaded - CONTEXT["cuda"]))


def test_tiny_update_by_hand():
    # 3 rows of 5 + 2 x 1 tokens: 21 tokens of which 6 are scored, in fp32.
    inputs = 3 * 21 * 32  # two layers' inputs and the last output
    states = 2 * 6 * 32
    gradients = 21 * 3 * 48
    layer = 21 * (3 * 32 + 4 * 32 + 4 * 48 + 7 * 4) + gradients
    mask = 3 * 7 * 7 * 4
    work = Batch(3, 5, 1, n=2)
    assert plan.update_bytes(TINY, work, 4, lora_r=4) == 4 * (inputs + states + layer) + mask
    kept = 2 * 21 * (6 * 32 + 5 * 32 + 4 * 48 + 7 * 4)
    assert plan.update_bytes(TINY, work, 4, 4, recompute=False) == 4 * (kept + states + gradients) + mask
    assert plan.update_bytes(TINY, Batch(3, 5, 1), 4, 4, recompute=False) < 4 * (kept + states + gradients)


def test_predicted_seconds_by_hand():
    cfg = replace(config_of("demo"), documents=1, group_size=2, max_new_tokens=10, kl_coef=0.0, judge="logits")
    limit = plan.Limits(products=1e9, read=1e6)
    read, written = plan.tokens_of(cfg)["update"]
    linear, lora, head = 2 * TINY.linear_params, 2 * TINY.lora_params(32), 2 * 64 * 32
    seconds = plan.seconds_of(TINY, cfg, limit, 4, dequantized=True)
    forward, backward = read * (linear + lora) + written * head, read * (linear + 2 * lora) + written * head
    assert seconds["update"] == pytest.approx((forward + backward) / 1e9 / plan.REACHED["update"])
    prompt = work_of(cfg)["solve"].prompt
    step = 4 * (TINY.linear_params + 64 * 32) + 2 * (prompt + 5) * TINY.kv_bytes(4)  # bytes: reading takes longest
    expected = prompt * linear / 1e9 / plan.REACHED["reading"] + 10 * step / 1e6 / plan.REACHED["decoding"]
    assert seconds["solve"] == pytest.approx(expected)
    again = plan.seconds_of(TINY, replace(cfg, recompute=True), limit, 4, dequantized=True)["update"]
    assert again - seconds["update"] == pytest.approx(forward / 1e9 / plan.REACHED["update"])


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


def test_the_packaged_model_is_read_from_its_gguf_without_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shapes = shapes_of("smollm2")
    assert shapes.params == 134_515_008
    assert (shapes.layers, shapes.heads, shapes.kv_heads, shapes.head_dim, shapes.tied) == (
        30,
        9,
        3,
        64,
        True,
    )
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
    memory = predict(shapes_of(cfg.model), work_of(replace(cfg, judge=judge)), device="cuda")
    assert set(memory) == {"load", "propose", "solve", "rubric", "judge", "update"}
    assert max(memory.values()) <= 20 * GIB, memory


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


def test_the_logits_judge_holds_the_beginnings_of_one_batch_at_a_time():
    cfg = replace(config_of("24gb"), judge="logits", documents=2, oversample=1.0)
    few, many = (work_of(replace(cfg, documents=n))["judge"] for n in (2, 200))
    # 49,152 tokens are 21 rows of 450 + 512 + 250 + 1,024, or 2 groups of 8 answers that begin alike.
    assert few == many and (many.prompt, many.prefixes, many.rest) == (2_236, 2, 1_024 + plan.QUESTION)
    # In 5,000 there is room for two rows: a group is read in four pieces, its beginning in each.
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
    prompts = [work_of(replace(cfg, rubric_answers=n))["rubric"].prompt for n in (0, 6, 20)]
    assert prompts == [1_400 + 500 + 1_130 + 700 + shown * 800 for shown in (0, 6, 8)]


def test_48gb_preset_fits_44_gib_in_every_phase():
    cfg = config_of("48gb")
    assert max(predict(shapes_of(cfg.model), work_of(cfg), device="cuda").values()) <= 44 * GIB


@pytest.mark.parametrize(("judge", "bf16"), [("generate", True), ("generate", False), ("logits", True)])
def test_16gb_preset_fits_13_gib_in_every_phase_with_its_own_judge_in_fp32_too(judge: str, bf16: bool):
    cfg = replace(config_of("16gb"), judge=judge)
    memory = predict(shapes_of(cfg.model), work_of(cfg), device="cuda", bf16=bf16)
    assert max(memory.values()) <= 13 * GIB, memory


def test_prompts_are_read_in_chunks_so_that_more_documents_cost_only_their_cache():
    cfg = config_of("24gb")
    batch = Batch(prompts=40, prompt=1_000, new=100)
    twice = replace(batch, prompts=80)
    assert (cfg.rollout_tokens, plan.PREFILL_TOKENS["cuda"]) == (49_152, 8_192)
    more = plan.reading_bytes(QWEN_7B, twice, 2, 8_192) - plan.reading_bytes(QWEN_7B, batch, 2, 8_192)
    assert more == 40 * 1_100 * QWEN_7B.kv_bytes(2)


@pytest.mark.parametrize(("preset", "held"), [("16gb", False), ("24gb", False), ("48gb", True)])
def test_the_plan_holds_weights_out_of_4_bits_where_the_card_of_a_preset_has_room(preset: str, held: bool):
    cfg = config_of(preset)
    assert ("out of 4 bits" in plan.plan(cfg)) is held
    assert "out of 4 bits" in plan.plan(replace(cfg, dequantize="on"))
    assert "out of 4 bits" not in plan.plan(replace(cfg, dequantize="off"))


def test_without_a_card_weights_stay_in_4_bits_whatever_card_the_preset_is_made_for():
    assert not plan.dequantizes(config_of("48gb"))


@pytest.mark.parametrize(("free", "held"), [(20, False), (27, True), (79, True)])
def test_weights_are_held_out_of_4_bits_where_the_card_at_hand_has_room(monkeypatch, free: int, held: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 80 * GIB))
    assert plan.dequantizes(config_of("24gb")) is held


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
    assert "fits a 16 GB card" in text and "out of 4 bits" not in text
    assert "arithmetic, not measured" in text


def test_tokens_of_a_step_are_counted_over_every_try_and_answer():
    cfg = replace(config_of("24gb"), documents=2, oversample=1.0, tries=3, group_size=4, judge="logits")
    cfg = replace(cfg, max_new_tokens=10)
    counted = plan.tokens_of(cfg)
    written = {role: tokens for role, (_, tokens) in counted.items()}
    judge, update = work_of(cfg)["judge"], work_of(cfg)["update"]
    # 10 beginnings (a problem with a criterion) once, the rest of 8 answers x 5 criteria; each prompt once.
    assert counted["judge"][0] == 10 * (judge.prompt - judge.rest) + 40 * (10 + plan.QUESTION)
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


def test_peak_memory_sees_a_block_that_is_gone_again():
    before = plan.memory_in_use()
    with PeakMemory() as memory:
        block = np.ones(2**26 // 8)
        for _ in range(20):
            block += 1  # long enough to be sampled
        del block
    assert memory.peak - before >= 60 * 2**20
