"""On a device that no tensor of the CPU may meet, everything works and gives what it gives on the CPU; and what a
decoding step costs there, however small the model, does not depend on the number of rows."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import fakedevice
import pytest
import torch
from conftest import tiny_llm
from test_model import PROMPTS, ROWS, laid_out, random_ids, scramble
from test_pop import group
from torch.nn.attention import SDPBackend, sdpa_kernel

import pop
from engine import fast, loading, memory
from engine.constrained import Field
from engine.prefill import prefill
from model import LLM, Completion, load

pytestmark = pytest.mark.skipif(not fakedevice.available, reason="no hook for a device in Python, or a real GPU")

FORM = [
    Field("a: ", choices=("0", "1", "12")),
    Field("b:", 6, min_tokens=2),
    Field("c: ", choices=("x", "yy"), distinct=True),
    Field("d:", 5),
    Field("e: ", choices=("x", "yy"), distinct=True),
    Field("f:", 3, optional=True),
]
SHORT = [Field("label: ", 4)]


def on_both(work: Callable[[LLM], Any], make: Callable[[], LLM] = tiny_llm) -> tuple[Any, Any]:
    """What it gives on the device and on the CPU, with the same random numbers and the same way of attention."""
    results = []
    for llm in (fakedevice.move(make()), make()):
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.MATH):
            results.append(work(llm))
    return results[0], results[1]


def copies(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().cpu().clone() for tensor in tensors]


def written(groups: list[list[Completion]]) -> list[list[int]]:
    return [completion.ids for group in groups for completion in group]


# ------------------------------------------------------------------------------------------------ same results


def test_the_device_refuses_a_tensor_of_the_cpu_and_nothing_else():
    there, here = torch.arange(3, device=fakedevice.DEVICE), torch.arange(3)
    for mixed in (lambda: there + here, lambda: there[here], lambda: here[there], lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="on the device, others on the CPU"):
            mixed()
    assert ((there + here.to(there.device)) * 2 + torch.tensor(1)).tolist() == [1, 5, 9]


def test_the_device_counts_what_costs_time():
    with fakedevice.counted() as counts:
        x = torch.tensor([1.0, -2.0], device=fakedevice.DEVICE)
        y = (x.view(2, 1) * x)[0]  # a view, a product, a view
        assert counts.syncs.total() == 0 and counts.uploads.total() == 1 and counts.launches["mul.Tensor"] == 1
        assert y.cpu()[1] == -2 and y[0].item() == 1 and len(x[x > 0]) == 1
    assert counts.syncs.total() == 3 and counts.uploads.total() == 1


def test_what_is_checked_at_load():
    loading.check_exact(fakedevice.move(tiny_llm()))


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_rows_that_end_at_different_times(temperature, cuda_graph):
    def work(llm):
        llm.cuda_graph = cuda_graph
        return written(llm.generate(PROMPTS, n=4, max_new_tokens=60, temperature=temperature))

    there, here = on_both(work)
    assert there == here
    assert len({len(ids) for ids in here}) > 2  # the batch shrank


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forms(temperature, cuda_graph):
    def work(llm):
        llm.cuda_graph = cuda_graph
        forms = [FORM, SHORT] * len(PROMPTS)
        return written(llm.generate(PROMPTS, n=2, max_new_tokens=70, temperature=temperature, templates=forms))

    there, here = on_both(work)
    assert there == here
    assert max(map(len, here)) > 30 > min(map(len, here))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_watched_replies(cuda_graph):
    def work(llm):
        llm.cuda_graph = cuda_graph
        groups = llm.generate(PROMPTS, n=4, max_new_tokens=60, temperature=1.5, watch=("0", "1", "2"))
        return written(groups), [probs for group in groups for c in group for probs in c.watched]

    (ids, there), (others, here) = on_both(work)
    assert ids == others and len(there) == sum(map(len, ids))
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), rtol=1e-4, atol=1e-5)


def test_in_fp32_prompts_are_read_with_a_mask():
    """Without one, heads that share keys end in a kernel that holds all scores in memory."""
    llm = fakedevice.move(tiny_llm())
    masks: list[torch.Tensor | None] = []
    decoder = llm.model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(lambda *call: masks.append(call[2]["attention_mask"]), with_kwargs=True)
    llm.generate(PROMPTS, max_new_tokens=2, temperature=0.0)
    assert len(masks) == 3 and all(mask is not None for mask in masks)


def test_probabilities_of_choices():
    rows = [*PROMPTS, [*PROMPTS[2], 7], [*PROMPTS[2], 8, 9]]
    there, here = on_both(lambda llm: llm.choice_probs(rows, [48, 49, 50]))
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_log_probabilities_and_gradients(masked):
    rows = [(prompt, [completion]) for prompt, completion in ROWS]
    if masked:  # several completions in a row
        rows = [(ROWS[0][0], [completion for _, completion in ROWS]), rows[1]]

    def work(llm):
        with llm.training():
            logps, entropy = llm.logps(*fast.segments_of(rows, llm.pad_id), 0.7, chunk_bytes=5 * 4 * 259)
            logps.sum().backward()
        return copies([logps, entropy, *(p.grad for p in pop.trainable(llm))])

    for there, here in zip(*on_both(work), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "dpo"])
def test_updates(loss):
    """Gradients of two optimizer steps, the metrics, and that weights changed."""
    cfg = pop.Config(loss=loss, updates_per_batch=2, kl_coef=0.1, lr=1e-3, max_new_tokens=16)

    def work(llm):
        episodes = [group(llm, [0.1 * seed, 0.5, 0.9, 0.2], seed, "Why?" * seed) for seed in (1, 2, 5)]
        state = pop.new_state(llm, cfg)
        before = copies(pop.trainable(llm))
        gradients: list[torch.Tensor] = []
        state.optimizer.register_step_pre_hook(lambda *_: gradients.extend(copies(p.grad for p in pop.trainable(llm))))
        metrics = pop.update(llm, state, episodes, cfg)
        assert not any(torch.equal(a, b) for a, b in zip(before, copies(pop.trainable(llm)), strict=True))
        return metrics, gradients

    (metrics, gradients), (expected, others) = on_both(work)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-6) and metrics["kl"] > 0
    assert len(gradients) == 2 * 28  # A and B of 7 linear layers in each of 2 layers, twice
    for there, here in zip(gradients, others, strict=True):
        assert (there - here).norm() <= 1e-3 * here.norm()


def test_rehearsals():
    llm = fakedevice.move(tiny_llm())
    gradients: list[bool] = []
    for p in pop.trainable(llm):
        p.register_hook(lambda grad: gradients.append(bool(grad.cpu().isfinite().all())))
    memory.rehearse_rollout(llm, memory.Batch(prompts=3, prompt=30, new=8, n=2))
    memory.rehearse_rollout(llm, memory.Batch(prompts=2, prompt=30, n=2))
    memory.rehearse_update(llm, memory.Batch(prompts=2, prompt=30, new=8, n=2))
    assert len(gradients) == 28 and all(gradients)
    cfg = replace(pop.Config(), max_words=60, max_new_tokens=16, documents=1, group_size=2, rubric_answers=1)
    llm.token_budget = 400
    assert memory.rehearse(llm, cfg, 400) == llm.token_budget == 400


@pytest.mark.parametrize("dequantize", [False, True])
def test_weights_in_4_bits(folder, dequantize):
    def make():
        llm = load(str(folder), load_in="4bit", lora_r=4, lora_alpha=8, dequantize=dequantize)
        torch.manual_seed(1)
        scramble(llm)
        return llm

    def work(llm):
        tokens = written(llm.generate(PROMPTS, n=2, max_new_tokens=20, temperature=0.0))
        probs = llm.choice_probs(PROMPTS, [48, 49])
        with llm.training():
            llm.logps(*laid_out(ROWS, "right"), 0.7)[0].sum().backward()
        return tokens, probs, copies([p.grad for p in pop.trainable(llm)])

    (tokens, probs, gradients), (expected, others, also) = on_both(work, make)
    assert tokens == expected
    torch.testing.assert_close(probs, others, rtol=1e-3, atol=1e-5)
    for there, here in zip(gradients, also, strict=True):
        assert (there - here).norm() <= 1e-4 * here.norm()


# ------------------------------------------------------------------------------------------------ cost of a step


def step_of(rows: int, forms: bool, cuda_graph: bool, watch: tuple[str, ...] = ()) -> dict[str, Counter[str]]:
    """What one decoding step asks of the device: what 24 steps do beyond 8, where no row ends."""
    llm = fakedevice.move(tiny_llm())
    llm.cuda_graph = cuda_graph
    if not forms:
        llm.eos_ids = [259]  # no token that there is
    prompts = [random_ids(5 + i % 9, seed=i) for i in range(rows)]
    endless = [Field("a:", 40, min_tokens=40)], [Field("longer:", 40, min_tokens=40)]
    totals = []
    for new in (8, 24):
        with fakedevice.counted() as counts:
            filled = [endless[i % 2] for i in range(rows)] if forms else None
            ids = written(llm.generate(prompts, max_new_tokens=new, temperature=1.0, templates=filled, watch=watch))
        assert [len(row) for row in ids] == [new] * rows
        totals.append(vars(counts))
    few, many = totals
    return {kind: Counter({k: n / 16 for k, n in (many[kind] - few[kind]).items()}) for kind in many}


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("forms", [False, True])
def test_a_decoding_step_costs_the_same_for_any_number_of_rows(forms, cuda_graph):
    step = step_of(4, forms, cuda_graph)
    assert step["syncs"].total() <= 3 and step["uploads"].total() <= 4, step
    assert step_of(32, forms, cuda_graph) == step


def test_to_watch_replies_takes_one_more_kernel_a_step_and_no_waiting():
    usual, watching = (step_of(4, forms=False, cuda_graph=False, watch=watch) for watch in ((), ("0", "1", "2")))
    assert watching["syncs"] == usual["syncs"] and watching["uploads"] == usual["uploads"]
    assert watching["launches"] - usual["launches"] == Counter({"index_select": 1})


@torch.no_grad()
def test_a_fixed_step_never_waits_and_uploads_nothing():
    """Or it could not be captured as a CUDA graph."""
    llm = fakedevice.move(tiny_llm())
    ids, mask, cache = prefill(llm, PROMPTS, 4)
    room = fast.additive(torch.nn.functional.pad(mask, (0, 4), value=1).bool(), torch.float32)[:, None, None]
    step = fast.FixedStep(llm.model, cache, room, written=ids.shape[1])
    step.ids.copy_(ids[:, -1:])
    with fakedevice.counted() as counts:
        step.forward()
    assert not counts.syncs and not counts.uploads and counts.launches
