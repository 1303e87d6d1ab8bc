"""A run's problems and rubrics as a data set for TRL or verl, and the reward that pop.py would give as a function.

python -m lab.export RUN --to trl --out DIR --judge-url http://host:8000/v1   # then, in DIR: trl grpo --config trl.yaml
python -m lab.export RUN/episodes.jsonl --to verl --out DIR --judge-url URL   # then, in DIR: sh verl.sh

DIR holds train.parquet, reward.py (the judge and the guards, to be read and changed) and a configuration. The judge is
any model behind an OpenAI-compatible endpoint: by logits, with the base model of a run in its precision, the rewards
are those of that run.
"""

import argparse
import json
import math
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
from tqdm.auto import tqdm
from transformers import AutoTokenizer

import rubric as judging
from benchmarks.judges import NO_VERDICT, EndpointJudge, Question, Verdict
from config import Config, resolved, settings_of
from data import Answer, Criterion, Document, Episode, UserError
from engine import checkpoint, loading, sources
from engine.parsing import written_ratings
from engine.text import chat

PROJECT = Path(__file__).resolve().parents[1]
# The fields of Config by which replies of a judge become rewards.
SETTINGS = "model judge rubric_gold seed skip_guards max_new_tokens soft_length length_floor".split()

REWARD = '''"""The reward of train.parquet, as pop.py gives it. The judge's key: JUDGE_API_KEY or OPENAI_API_KEY."""

import sys

sys.path.insert(0, {project!r})  # where POP lies, on each machine that computes rewards

from lab.export import Reward

reward = Reward(
    {url!r},
    {judge!r},
    {settings},
)
trl_reward, verl_reward = reward.trl_reward, reward.verl_reward
'''

TRL = """# In this folder: trl grpo --config trl.yaml. reward.py has the limit of the length, too.
{{datasets: [{{path: parquet, data_files: {data}}}], reward_funcs: [reward.trl_reward], output_dir: trained,
 model_name_or_path: {model}, dtype: {dtype}, load_in_4bit: {quantized},
 use_peft: true, lora_r: {cfg.lora_r}, lora_alpha: {alpha}, lora_target_modules: [all-linear],
 learning_rate: {cfg.lr:.1e}, warmup_steps: {cfg.warmup_steps}, max_grad_norm: {cfg.max_grad_norm},
 num_generations: {cfg.group_size}, per_device_train_batch_size: {cfg.group_size},
 gradient_accumulation_steps: {batch}, max_completion_length: {cfg.max_new_tokens}, temperature: {cfg.temperature},
 loss_type: dapo, scale_rewards: none, epsilon: {cfg.clip_low}, epsilon_high: {cfg.clip_high}, beta: {cfg.kl_coef}}}
"""

VERL = """# In this folder, on a machine with 8 GPUs: sh verl.sh. The names are those of verl 0.9.0. Never run.
python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=False \\
  data.train_files={data} data.val_files={data} data.train_batch_size={batch} \\
  data.max_prompt_length=1024 data.filter_overlong_prompts=True data.max_response_length={cfg.max_new_tokens} \\
  reward.custom_reward_function.path={folder}/reward.py reward.custom_reward_function.name=verl_reward \\
  actor_rollout_ref.model.path={model} actor_rollout_ref.model.lora_rank={cfg.lora_r} \\
  actor_rollout_ref.model.lora_alpha={alpha} actor_rollout_ref.rollout.load_format=safetensors \\
  actor_rollout_ref.actor.optim.lr={cfg.lr:.1e} actor_rollout_ref.actor.optim.lr_warmup_steps={cfg.warmup_steps} \\
  actor_rollout_ref.actor.ppo_mini_batch_size={batch} actor_rollout_ref.actor.use_dynamic_bsz=True \\
  actor_rollout_ref.actor.clip_ratio_low={cfg.clip_low} actor_rollout_ref.actor.clip_ratio_high={cfg.clip_high} \\
  actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef={cfg.kl_coef} \\
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.tensor_model_parallel_size=1 \\
  actor_rollout_ref.rollout.n={cfg.group_size} actor_rollout_ref.rollout.temperature={cfg.temperature} \\
  trainer.nnodes=1 trainer.n_gpus_per_node=8 trainer.val_before_train=False 'trainer.logger=["console"]' "$@"
"""
CONFIGURATIONS = {"trl": ("trl.yaml", TRL), "verl": ("verl.sh", VERL)}


class DigitJudge(EndpointJudge):
    """Asks for no more than the first token and takes the expected value of 0, 1 and 2, as rubric.judge_by_logits does.

    A digit that is not among the 20 likeliest tokens counts as impossible. From 0.5B on all three are; if not, it says
    so once, unless they could not matter.
    """

    rough = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # With temperature and top_p at 1: some servers report the distribution as these have left it.
        self._create = partial(self._create, logprobs=True, top_logprobs=20, top_p=1.0)

    def _verdict(self, question: Question) -> Verdict:
        if self._silent >= self.give_up:
            return Verdict(question.id, None, "", "the endpoint did not answer")
        choice = self._complete(replace(question, max_tokens=1), temperature=1.0)
        if isinstance(choice, Exception):
            return Verdict(question.id, None, "", self._failed(choice))
        self._count(True)
        tokens = getattr(getattr(choice, "logprobs", None), "content", None)
        likeliest = getattr(tokens[0], "top_logprobs", None) if tokens else None
        where = f"the judge {self.label} at {self.url}"
        if not likeliest:
            self._silent = self.give_up  # the other threads ask no more
            remedy = "vLLM and SGLang do, or export with --judge-by generate"
            raise UserError(f"{where} gives no log-probabilities: {remedy}")
        known = {t.token: math.exp(t.logprob) for t in reversed(likeliest)}
        zero, one, two = (known.get(digit, 0.0) for digit in "012")
        if not (total := zero + one + two):
            return Verdict(question.id, None, "", f"{NO_VERDICT}: its likeliest first tokens are no 0, 1 or 2")
        if 0.0 in (zero, one, two) and min(known.values()) > 0.01 * total and not self.rough:
            self.rough = True
            tqdm.write(f"WARNING: {where} seldom replies 0, 1 or 2, which makes its ratings rough: take a larger one")
        return Verdict(question.id, [(one + 2 * two) / total], "")


class Reward:
    """What pop.py would reward an answer with, by the judge `name` behind an OpenAI-compatible endpoint.

    settings: those of SETTINGS, as in Config; `model` is the policy. Raises UserError as EndpointJudge does.
    """

    def __init__(self, url: str, name: str, **settings: Any) -> None:
        self.cfg = Config(**settings)
        self.judge = (DigitJudge if self.cfg.judge == "logits" else EndpointJudge)(url, name, workers=32)

    def trl_reward(
        self, completions: list[Any], completion_ids: list[Any], problem: list[str], rubric: list[str], **_: Any
    ) -> list[float | None]:
        """For TRL's GRPOTrainer. None, by which TRL leaves an answer out, where the judge gave no rating."""
        texts = [turns[-1]["content"] or "" for turns in completions]
        answers = [Answer(text.strip(), list(ids)) for text, ids in zip(texts, completion_ids, strict=True)]
        rewards, unanswered = self.rewards(problem, rubric, answers)
        if unanswered and set(rewards) == {None}:
            raise UserError(unanswered)
        if unanswered:
            tqdm.write(f"WARNING: {unanswered}")
        return rewards

    def verl_reward(
        self, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any
    ) -> float:
        """For verl, which gives texts alone (their tokens are counted anew) and leaves no answer out: 0 where the
        judge's reply has no rating. Raises UserError where there is no reply."""
        answer = Answer(solution_str.strip())
        if self.cfg.guarded("length"):
            answer.ids = [*self.tokenizer(solution_str, add_special_tokens=False).input_ids, 0]  # 0: the end token
        (reward,), unanswered = self.rewards([extra_info["problem"]], [ground_truth], [answer])
        if unanswered:
            raise UserError(unanswered)
        return reward or 0.0

    def rewards(
        self, problems: Sequence[str], rubrics: Sequence[str], answers: Sequence[Answer]
    ) -> tuple[list[float | None], str]:
        """The reward of each answer, None where a rating is missing; and what got no reply, in words."""
        episodes = [
            Episode(Document("", ""), problem, rubric=[Criterion(**c) for c in json.loads(criteria)], answers=[answer])
            for problem, criteria, answer in zip(problems, rubrics, answers, strict=True)
        ]
        asked = [(k, part, question) for k, e in enumerate(episodes) for part, question in questions(e, k, self.cfg)]
        verdicts: dict[str, Verdict] = {}
        self.judge.ask([q for *_, q in asked], lambda some: verdicts.update({v.question: v for v in some}))
        ratings: list[dict[int, float]] = [{} for _ in episodes]  # of each answer, by the number of the criterion
        for k, part, question in asked:
            value: Any = verdicts[question.id].value
            ratings[k] |= zip(part, value or (), strict=False)
        for e, answer, found in zip(episodes, answers, ratings, strict=True):
            if len(found) == len(e.rubric):
                answer.ratings = [rating for _, rating in sorted(found.items())]
            judging.reward(answer, e, self.cfg)
        reasons = [v.reason for v in verdicts.values() if v.value is None and not v.reason.startswith(NO_VERDICT)]
        said = f"the judge {self.judge.label} at {self.judge.url} left {len(reasons)} of {len(asked)} questions open"
        remedy = "see that it runs there, with a context for problem, answer and criterion"
        return [answer.reward for answer in answers], f"{said}: {reasons[0]}; {remedy}" if reasons else ""

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.cfg.model, trust_remote_code=False)


def questions(e: Episode, number: int, cfg: Config) -> list[tuple[list[int], Question]]:
    """What rubric.judge asks about an episode's one answer, each with the numbers of the criteria that it is about."""
    order, text = list(range(len(e.rubric))), e.answers[0].text
    random.Random(f"{cfg.seed} {e.problem}").shuffle(order)
    asked = []
    for part in [order] if cfg.judge == "generate" else [[k] for k in order]:
        criteria, gold = [e.rubric[k] for k in part], cfg.rubric_gold
        if cfg.judge == "logits":
            prompt = judging.rate_prompt(e.problem, criteria[0], text, gold)
        else:
            prompt = judging.judge_prompt(e.problem, criteria, text, gold)
        read = partial(written_ratings, criteria=len(part))
        asked.append((part, Question(f"{number}/{part}", chat(prompt), [], read)))
    return asked


def row(e: Episode, index: int, cfg: Config, to: str) -> dict[str, Any]:
    """An episode in the columns that the trainer documents; its prompt is what the solver is given."""
    told = {"problem": e.problem, "reference": e.reference, "document": e.document.id}
    criteria = json.dumps([asdict(c) for c in e.rubric], ensure_ascii=False)
    if to == "trl":
        return {"prompt": chat(e.problem), "rubric": criteria, **told}
    truth, extra = {"style": "rule", "ground_truth": criteria}, {"split": "train", "index": index, **told}
    return dict(data_source="pop", prompt=chat(e.problem), ability=cfg.task, reward_model=truth, extra_info=extra)


def read(args: argparse.Namespace) -> tuple[Config, list[Episode]]:
    """The settings of a run, or the default ones for a file, and the episodes whose rubric is fit to be used."""
    run = args.source.is_dir()
    if run and not (args.source / "config.json").exists():
        raise UserError(f"{args.source}: no run's folder (no config.json in it)")
    given = {"model": args.model, "max_new_tokens": args.max_new_tokens, "judge": args.judge_by}
    settings = settings_of(args.source) if run else {}
    cfg = resolved(Config(**{**settings, **{name: value for name, value in given.items() if value is not None}}))
    if cfg.rubric == "holistic":
        raise UserError(f"{args.source} was judged without criteria (--rubric holistic): there is no rubric to export")
    path = args.source / "episodes.jsonl" if run else args.source
    episodes = sources.read(str(path), answers=False, flag="")
    fit = [e for e in episodes if e.rubric and not (e.drop or "").startswith("rubric/")]
    if not fit:
        raise UserError(f"{path}: none of its {len(episodes)} episodes has a rubric")
    print(f"{len(fit)} of {len(episodes)} episodes have a rubric")
    return replace(cfg, model=loading.resolve(cfg.model)), fit


def export(args: argparse.Namespace) -> None:
    folder = args.out.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {args.out} is not empty: remove it, or choose another")
    cfg, episodes = read(args)
    name, settings = args.judge or cfg.model, {field: getattr(cfg, field) for field in SETTINGS}
    reward = Reward(args.judge_url, name, **settings)
    told = ",\n    ".join(f"{field}={value!r}" for field, value in settings.items())
    kind, template = CONFIGURATIONS[args.to]
    quote: Any = json.dumps if args.to == "trl" else shlex.quote
    named = dict(data=f"{folder}/train.parquet", folder=str(folder), model=cfg.model)
    configuration = template.format(
        cfg=cfg,
        alpha=2 * cfg.lora_r,
        batch=min(cfg.documents, len(episodes)),
        dtype="float32" if cfg.load_in == "fp32" else "bfloat16",
        quantized=json.dumps(cfg.load_in == "4bit"),
        **{key: quote(value) for key, value in named.items()},
    )
    module = REWARD.format(project=str(PROJECT), url=args.judge_url, judge=name, settings=told)
    rows = [row(e, k, cfg, args.to) for k, e in enumerate(episodes)]
    with checkpoint.writing(folder, folder, "the same command"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with checkpoint.written_whole(folder) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary / "train.parquet")
            (temporary / "reward.py").write_text(module, encoding="utf-8")
            (temporary / kind).write_text(configuration, encoding="utf-8")
    print(f"written: {folder} (train.parquet, reward.py, {kind}), judged by {name} at {args.judge_url}")
    try:  # the judge need not be there yet
        first = row(episodes[0], 0, cfg, "trl")
        (found,) = reward.trl_reward([[{"content": first["reference"]}]], [()], [first["problem"]], [first["rubric"]])
        print(f"the judge was asked: the first reference would be rewarded with {found}")
    except UserError as error:
        print(f"WARNING: {error}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, metavar="RUN_OR_EPISODES", help="a run's folder, or an episodes.jsonl")
    parser.add_argument("--to", required=True, choices=CONFIGURATIONS)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--judge-url", required=True, metavar="URL", help="its key: JUDGE_API_KEY or OPENAI_API_KEY")
    parser.add_argument("--judge", metavar="NAME", help="the judge's name there; default: the run's base model")
    parser.add_argument("--judge-by", choices=("logits", "generate", "each"), help="default: as the run, or logits")
    parser.add_argument("--model", help="what is to be trained; default: the run's base model, or Config's")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="an answer's limit; default: the run's or Config's"
    )
    export(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
