"""Tiny models of many architectures: each is trained exactly as the plain computation says, or refused by name."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from peft import PeftModel
from test_fast import GROUPS
from test_model import END, PROMPTS, greedy, lora_gradients, naive_logps, random_ids
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GenerationConfig,
    Glm4Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    StableLmConfig,
)

from data import UserError
from engine import fast, memory
from model import LLM, load

TOKENS = dict(
    vocab_size=len(byte_tokenizer()),
    initializer_range=0.3,  # wide enough that the tokens' probabilities differ
    pad_token_id=None,  # a pad id's embedding begins as zero
    bos_token_id=None,
    eos_token_id=END,
)
LAYERS = TOKENS | dict(hidden_size=32, num_hidden_layers=2)
HEADS = LAYERS | dict(num_attention_heads=4, max_position_embeddings=512)
USUAL = HEADS | dict(intermediate_size=64, num_key_value_heads=2)
FALCON = HEADS | dict(ffn_hidden_size=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

TRAINED = {
    "qwen2": Qwen2Config(**USUAL),
    "qwen3": Qwen3Config(**USUAL, head_dim=8),
    "llama": LlamaConfig(**USUAL),
    "mistral": MistralConfig(**USUAL),
    "phi3": Phi3Config(**USUAL),
    "gemma3_text": Gemma3TextConfig(
        **USUAL, head_dim=8, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": GPTNeoXConfig(**HEADS, intermediate_size=64),
    "opt": OPTConfig(**HEADS, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3),  # its dropout is 0.1
    "falcon, one key head": FalconConfig(**FALCON, alibi=False),
    "falcon, newer": FalconConfig(**FALCON, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "olmo2": Olmo2Config(**USUAL),
    "smollm3": SmolLM3Config(**USUAL, no_rope_layers=[1, 0]),
    "stablelm": StableLmConfig(**USUAL),
    "glm4": Glm4Config(**USUAL, head_dim=8),
}

REFUSED = {
    # experts, a router: no linear layers to put adapters on
    "mixtral": MixtralConfig(**USUAL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**USUAL, **EXPERTS, head_dim=8),
    "deepseek_v3": DeepseekV3Config(
        **USUAL | dict(num_key_value_heads=4),
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    ),
    "gpt_oss": GptOssConfig(**USUAL, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    # a state that runs through the row: completions in one row would see each other
    "qwen3_next": Qwen3NextConfig(
        **USUAL, **EXPERTS, head_dim=8, layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "lfm2": Lfm2Config(**USUAL, layer_types=["conv", "full_attention"]),
    "mamba": MambaConfig(**LAYERS, state_size=4),
    # ALiBi takes positions from the columns of the batch, padding and other completions included
    "bloom": BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(**TOKENS, d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
    "falcon": FalconConfig(**FALCON, alibi=True),
}  # fmt: skip


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    """A folder with a random model of this configuration and the byte tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases begin as zero, the factors of norms as one: a mistake would not show
                p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Pair:
    """One model twice: as POP loads it, with adapters that change its output, and as peft and transformers do."""

    llm: LLM
    plain: Any  # in float64


def pair_of(folder: Path) -> Pair:
    llm = load(str(folder), load_in="fp32", lora_r=4, lora_alpha=8)
    for name, parameter in llm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    llm.model.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    plain = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).double().eval()
    return Pair(llm, plain)


def assert_trained_exactly(pair: Pair) -> None:
    """Log-probs, and LoRA's gradients of a weighted sum of them: completions in shared rows as each of them alone."""
    alone = [(prompt, completion) for prompt, completions in GROUPS for completion in completions]
    weights = torch.randn(sum(len(c) for _, c in alone), generator=torch.Generator().manual_seed(0))
    with pair.llm.training():
        logps, _ = pair.llm.logps(*fast.segments_of(GROUPS, END), 0.7, chunk_bytes=5 * 4 * 259)
        gradients = lora_gradients(pair.llm.model, weights @ logps)
    expected, _ = naive_logps(pair.plain, alone, 0.7)
    torch.testing.assert_close(logps.double(), expected, atol=3e-5, rtol=1e-5)
    naive = lora_gradients(pair.plain, weights.double() @ expected)
    assert set(gradients) == set(naive)
    for name, wanted in naive.items():
        assert wanted.norm() > 0, name
        assert (gradients[name] - wanted).norm() < 3e-5 * wanted.norm(), name


# -------------------------------------------------------------------------------------------------- accepted


@pytest.fixture(scope="module", params=TRAINED)
def pair(request, tmp_path_factory) -> Pair:
    return pair_of(saved(TRAINED[request.param], tmp_path_factory.mktemp("model")))


BEGINNING = random_ids(14, seed=14)
ROWS = [*PROMPTS, [65], *(BEGINNING + random_ids(n, seed=n) for n in (3, 6))]  # the last two begin alike


@pytest.mark.parametrize("dequantize", [False, True])
def test_greedy_text_is_what_plain_generate_writes_after_each_prompt_alone(pair, dequantize, monkeypatch):
    monkeypatch.setattr(pair.llm, "dequantize", dequantize)
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=END, pad_token_id=END)
    expected = []
    for row in ROWS:
        ids = torch.tensor([row])
        output = pair.plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        expected.append([output[0, len(row) :].tolist()] * 2)
    assert greedy(pair.llm, ROWS, n=2, max_new_tokens=12) == expected


@pytest.mark.parametrize("dequantize", [False, True])
def test_choice_probs_are_the_softmax_over_the_choices_of_each_row_alone(pair, dequantize, monkeypatch):
    monkeypatch.setattr(pair.llm, "dequantize", dequantize)
    choices = [16, 17, 200]
    with torch.no_grad():
        logits = torch.stack([pair.plain(input_ids=torch.tensor([row])).logits[0, -1, choices] for row in ROWS])
    probs = pair.llm.choice_probs(ROWS, choices)
    torch.testing.assert_close(probs.double(), logits.softmax(-1), atol=1e-5, rtol=0)


def test_log_probs_and_gradients_of_shared_rows_are_those_of_each_completion_alone(pair):
    assert_trained_exactly(pair)


def test_rehearsals_run_on_every_architecture(pair):
    memory.rehearse_rollout(pair.llm, memory.Batch(prompts=2, prompt=12, new=4, n=2))
    memory.rehearse_update(pair.llm, memory.Batch(prompts=2, prompt=12, new=4, n=2))


def test_a_config_that_asks_for_eager_attention_changes_no_gradient(tmp_path):
    folder = saved(LlamaConfig(**USUAL, tie_word_embeddings=True), tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "eager"}))
    assert_trained_exactly(pair_of(folder))


# --------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("load_in", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_trained_exactly_is_refused_by_its_type(kind, load_in, tmp_path_factory):
    folder = str(saved(REFUSED[kind], tmp_path_factory.mktemp("model")))
    with pytest.raises(UserError) as error:
        load(folder, load_in=load_in, lora_r=4)
    message = str(error.value).replace(folder, "")
    assert re.search(rf"\b{kind}\b", message) and "\n" not in message


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_model_that_is_trained_exactly_is_taken_in_16_bits_too(kind, cuda_graph, tmp_path_factory):
    """Where rounding alone lets layouts differ."""
    load(str(saved(TRAINED[kind], tmp_path_factory.mktemp("model"))), load_in="bf16", lora_r=4, cuda_graph=cuda_graph)
