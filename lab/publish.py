"""A run's adapter as a folder for the hub, with a model card, and its upload.

python -m lab.publish RUN --repo USER/NAME --dry-run       # only writes RUN/published
python -m lab.publish RUN --repo USER/NAME --merged        # base and adapter added up in 16 bits, for vLLM or GGUF
"""

import argparse
import gc
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import PeftModel
from tqdm.auto import tqdm

import model
from benchmarks import results
from config import Config, settings_of
from data import HUB_CORPORA, UserError, brief, read_episodes
from engine import checkpoint, fast, loading
from eval import Adapter, find_adapter
from lab import report

CARD = """---
{metadata}
---

# {name}

{base}, trained by rubric-based self-play on documents for the task `{task}`: the model wrote problems from documents,
answered them without, wrote rubrics with them, graded its answers and was trained on the grades with GRPO. The method
is POP (Huang, Chou, Zhang, Cardie, [arXiv 2604.20051](https://arxiv.org/abs/2604.20051)).

```python
from {package} import {loader}

model = {loader}.from_pretrained("{repo}", dtype="auto")
```

## Training

{facts}

## Evaluation

{evaluated}

## Limits

- The problems, rubrics and grades that it was trained on are the base model's own, checked by filters and never by
  people. It may have learned what its judge likes and not what is right: see the audit above.
- It was trained beside weights in {load_in}. Beside other weights of the same base, such as those in 16 bits, it is
  another model, as they are rounded differently: {agreed}.
- It has the base model's faults and licence.

## Citation

```bibtex
@article{{huang2026pop,
  title  = {{Bootstrapping Post-training Signals for Open-ended Tasks via Rubric-based Self-play on Pre-training Text}},
  author = {{Huang and Chou and Zhang and Cardie}},
  journal = {{arXiv:2604.20051}},
  year   = {{2026}}
}}
```
"""


@torch.no_grad()
def likeliest(cfg: Config, adapter: Adapter, load_in: str, texts: Sequence[tuple[str, str]]) -> list[torch.Tensor]:
    """The likeliest next token at each token of the answers in texts, (problem, answer): one (C,) for each."""
    llm = model.load(cfg.model, load_in=load_in)
    llm.take_adapter(adapter.folder)
    found = []
    for problem, answer in tqdm(texts, desc=f"agreement, {load_in}"):
        prompt, said = llm.encode(problem), llm.text_ids(answer)
        ids = torch.tensor([[*prompt, *said]], device=llm.device)
        with llm.autocast():
            states = llm.hidden(ids, None, torch.arange(ids.shape[1], device=llm.device)[None])
            found.append(llm.model.get_output_embeddings()(states[0, len(prompt) - 1 : -1]).argmax(-1).cpu())
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return found


def agreement(cfg: Config, adapter: Adapter, n: int) -> str:
    """How often the model as it was trained and the one in 16 bits find the same next token likeliest, in words."""
    path = adapter.run / "episodes.jsonl" if adapter.run else None
    episodes = read_episodes(path) if n and path and path.exists() else []
    texts = [(e.problem, e.reference) for e in episodes if e.reference][-n:]
    if not texts or cfg.load_in != "4bit":
        return "not measured"
    pairs = zip(*(likeliest(cfg, adapter, load_in, texts) for load_in in ("4bit", "bf16")), strict=True)
    same = torch.cat([a == b for a, b in pairs])
    shown = f"{same.float().mean():.0%} of the likeliest next tokens, on {len(texts)} references"
    return f"with the adapter apart the two agree on {shown}"


def card(cfg: Config, adapter: Adapter, repo: str, evaluations: Sequence[Path], agreed: str, merged: bool) -> ModelCard:
    """The model card: what it is, how to load it, how it was trained, what was measured, limits, citation."""
    corpus = cfg.corpus or HUB_CORPORA[cfg.task][0]
    local = [Path(name).exists() or name in ("samples", "smollm2") for name in (cfg.model, corpus)]
    data = ModelCardData(
        base_model=None if local[0] else cfg.model,
        datasets=None if local[1] else [corpus],
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["grpo", "self-play", "rubric", *([] if merged else ["lora"])],
    )
    loader = ("transformers", "AutoModelForCausalLM") if merged else ("peft", "AutoPeftModelForCausalLM")
    assert adapter.run is not None
    told = report.facts(report.Run(adapter.run))
    return ModelCard(
        CARD.format(
            metadata=data.to_yaml(),
            name=repo.rpartition("/")[2],
            base=Path(cfg.model).name,
            task=cfg.task,
            package=loader[0],
            loader=loader[1],
            repo=repo,
            facts="\n".join(f"- **{name}**: {'; '.join(lines)}" for name, lines in told.items() if name != "Files"),
            evaluated=results.side_by_side(evaluations) if evaluations else "Not evaluated on a benchmark.",
            load_in=cfg.load_in,
            agreed=agreed,
        )
    )


@torch.no_grad()
def merge(cfg: Config, adapter: Adapter, folder: Path) -> None:
    """The base with the adapter added to its weights, which are rounded to 16 bits once, after the sum."""
    base, tokenizer, _ = loading.pretrained(cfg.model, "bf16")
    adapted: Any = PeftModel.from_pretrained(base, str(adapter.folder))
    for layer in fast.lora_layers(adapted):
        a, b, scale = fast.lora_of(layer)
        weight = layer.base_layer.weight
        weight.copy_(weight.float().addmm_(b.float(), a.float(), alpha=scale))
    adapted.unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish(args: argparse.Namespace) -> None:
    adapter = find_adapter(args.run)
    if adapter.run is None:
        raise UserError(f"{args.run}: no run's folder (no config.json in it)")
    cfg = Config(**settings_of(adapter.run))
    if Path(adapter.base).name != Path(loading.resolve(cfg.model)).name:
        raise UserError(f"{adapter.folder} is an adapter of {adapter.base}, but the run's model is {cfg.model}")
    folder = args.output or adapter.run / "published"
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or choose another by --output")
    if args.repo.count("/") != 1 or not all(args.repo.split("/")):
        raise UserError(f"--repo {args.repo}: want USER/NAME")
    made = card(cfg, adapter, args.repo, args.evaluations, agreement(cfg, adapter, args.prompts), args.merged)
    with checkpoint.writing(folder, adapter.run, "the same command"), checkpoint.written_whole(folder) as temporary:
        if args.merged:
            merge(cfg, adapter, temporary)
        else:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(adapter.folder / name, temporary)
        (temporary / "README.md").write_text(str(made), encoding="utf-8")
    print(f"written: {folder}")
    if Path(adapter.base).exists() and not args.merged:
        print(f"WARNING: its base is {adapter.base} on this machine: elsewhere it cannot be loaded by its name")
    if not args.dry_run:
        try:
            HfApi().create_repo(args.repo, exist_ok=True)
            print(f"uploaded: {HfApi().upload_folder(repo_id=args.repo, folder_path=folder)}")
        except Exception as error:  # from several libraries: no login, no right, no connection
            raise UserError(
                f"not uploaded ({brief(error)}): `hf auth login`, then `hf upload {args.repo} {folder}`"
            ) from None


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.publish", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="a run's folder, or one in it such as RUN/best")
    parser.add_argument("--repo", required=True, metavar="USER/NAME")
    parser.add_argument("--output", type=Path, help="default: RUN/published")
    parser.add_argument("--evaluations", type=Path, nargs="+", default=[], metavar="FOLDER", help="eval.py's, to quote")
    parser.add_argument("--prompts", type=int, default=20, help="for the agreement with 16 bits; 0: it is not measured")
    parser.add_argument("--merged", action="store_true", help="base and adapter added up, in 16 bits")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and upload nothing")
    publish(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
