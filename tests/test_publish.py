"""lab/publish.py: what is published loads as its card says, and nothing is lost or told by mistake."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import training
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import UserError
from lab import publish

PROMPTS = [f"What is {name}, and why?" for name in "abcdefghijklmnopqrst"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    argv = training.flags(model, run, load_in="4bit", lr=3e-2, warmup_steps=0, steps=2)
    assert training.finish(argv, run.with_suffix(".log")) == 0
    return run


def command(run: Path, output: Path, *more: str) -> list[str]:
    return [str(run), "--repo", "someone/otters", "--output", str(output), "--dry-run", "--prompts", "0", *more]


@torch.no_grad()
def greedy(llm, tokenizer) -> list[list[int]]:
    rows = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    return [llm.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist() for ids in rows]


def test_adapter_and_merged_model_load_as_the_cards_say_and_write_the_adapters_tokens(trained, model, tmp_path):
    publish.main(command(trained, tmp_path / "adapter"))
    publish.main(command(trained, tmp_path / "merged", "--merged"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16 and not any("lora" in name for name, _ in merged.named_parameters())
    for name, layer in adapter.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            added = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
            wanted = layer.base_layer.weight.float() + layer.scaling["default"] * added
            assert torch.allclose(merged.get_submodule(name).weight.float(), wanted, rtol=2**-8, atol=0)
    wrote, wanted, plain = (
        torch.tensor(greedy(llm, tokenizer))[:, :1]  # a random model's tokens are near ties: rounding adds up
        for llm in (merged, adapter, AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))
    )
    assert (wrote == wanted).float().mean() >= 0.9 > (wanted == plain).float().mean()


def test_the_card_says_how_to_load_it_how_it_was_trained_and_what_was_measured(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "HUB_CORPORA", {"instructions": ("someone/pages", "text")})
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / "adapter" / name).write_bytes((trained / "adapter" / name).read_bytes())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "corpus": ""}))
    publish.main(command(tmp_path / "run", tmp_path / "out"))
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "datasets": ["someone/pages"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "self-play", "rubric", "lora"],
    }  # no base_model: it is a folder of this machine
    assert 'AutoPeftModelForCausalLM.from_pretrained("someone/otters", dtype="auto")' in card.text
    assert "**Audit**: none" in card.text and "Not evaluated on a benchmark." in card.text
    assert "beside weights in 4bit" in card.text and "rounded differently: not measured" in card.text


def test_the_agreement_with_16_bits_is_the_share_of_equal_likeliest_tokens(trained, monkeypatch):
    found = {"4bit": [torch.tensor([1, 2, 3]), torch.tensor([4])], "bf16": [torch.tensor([1, 2, 9]), torch.tensor([4])]}
    monkeypatch.setattr(publish, "likeliest", lambda cfg, adapter, load_in, texts: found[load_in])
    adapter = publish.find_adapter(str(trained))
    cfg = publish.Config(**publish.settings_of(trained))
    told = publish.agreement(cfg, adapter, 2)
    assert told == "with the adapter apart the two agree on 75% of the likeliest next tokens, on 2 references"


def test_the_likeliest_tokens_are_those_of_a_plain_pass(trained):
    adapter, cfg = publish.find_adapter(str(trained)), publish.Config(**publish.settings_of(trained))
    (found,) = publish.likeliest(cfg, adapter, "fp32", [("Why?", "Because it is.")])
    llm = publish.model.load(cfg.model, load_in="fp32")
    llm.take_adapter(adapter.folder)
    prompt, said = llm.encode("Why?"), llm.text_ids("Because it is.")
    with torch.no_grad():
        logits = llm.model(torch.tensor([[*prompt, *said]])).logits[0]
    assert found.tolist() == logits.argmax(-1)[len(prompt) - 1 : -1].tolist() and len(found) == len(said)


def test_an_upload_that_fails_is_one_line_without_the_token_and_keeps_the_folder(trained, tmp_path, monkeypatch):
    def refuse(self, repo, **_):
        raise OSError("401: no such right")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    asked = command(trained, tmp_path / "out")
    asked.remove("--dry-run")
    remedy = r"not uploaded \(OSError: 401: no such right\): `hf auth login`, then `hf upload someone/otters .*/out`"
    with pytest.raises(UserError, match=remedy) as error:
        publish.main(asked)
    assert "hf_secret" not in str(error.value) and (tmp_path / "out" / "README.md").exists()
    assert "hf_secret" not in (tmp_path / "out" / "README.md").read_text()


def test_mistakes_are_one_line_and_write_nothing(trained, tmp_path):
    with pytest.raises(UserError, match="out exists: remove it"):
        (tmp_path / "out").mkdir()
        publish.main(command(trained, tmp_path / "out"))
    with pytest.raises(UserError, match="--repo otters: want USER/NAME"):
        publish.main([str(trained), "--repo", "otters", "--dry-run"])
    with pytest.raises(UserError, match="no run's folder"):
        publish.main(command(trained / "checkpoints" / "step-000002" / "adapter", tmp_path / "new"))
    stolen = tmp_path / "other"
    (stolen / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (stolen / "adapter" / name).write_bytes((trained / "adapter" / name).read_bytes())
    config = json.loads((trained / "config.json").read_text())
    (stolen / "config.json").write_text(json.dumps({**config, "model": "Qwen/Qwen2.5-7B-Instruct"}))
    with pytest.raises(UserError, match=r"but the run's model is Qwen/Qwen2\.5-7B-Instruct"):
        publish.main(command(stolen, tmp_path / "new"))
    assert not (tmp_path / "new").exists() and not (trained / "published").exists()
