"""A tiny random model and a byte tokenizer: tests of the code's logic run in seconds, without files."""

import os
import signal
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are compared with those of a CPU; lab/gpu.py is for a card

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell's background jobs ignore some of them
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
torch.set_num_threads(1)  # tiny matrices on shared cores: more threads only wait for each other

CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte and three special tokens; <|end|> is end and pad at once, <|stop|> a second end.

    `merges` adds tokens, each of two that there are, in the alphabet of byte-level BPE (Ġ is the space).
    """
    tokens = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)])
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|start|>", "<|stop|>"],
    )
    wrapped.chat_template = CHAT
    return wrapped


def tiny_model(vocab: int, seed: int = 0, width: int = 32, context: int = 8192) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,  # wide enough that the tokens' probabilities differ
    )
    return LlamaForCausalLM(config)


def tiny_llm(seed: int = 0, token_budget: int = 32_768, trained: bool = True, **options):
    """An LLM of two layers. `trained`: LoRA's B is not zero, so the adapters change the output. options: LLM's own."""
    from model import LLM

    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer), seed)
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, stop], top_p=0.5, top_k=3, repetition_penalty=1.5
    )
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return LLM(model, tokenizer, token_budget=token_budget, **options)


@pytest.fixture
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An ordinary model folder, with widths that divide into NF4's blocks of 64."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tiny_model(len(tokenizer), width=64).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
