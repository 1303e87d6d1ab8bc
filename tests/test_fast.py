"""Everything in fast.py gives what the plain way gives."""

import contextlib
import copy
import random

import pytest
import torch
from conftest import byte_tokenizer, tiny_llm
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from test_model import END, PROMPTS, greedy, lora_gradients, naive_logps, random_ids
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from data import UserError
from engine import fast, memory
from engine.constrained import Field
from engine.prefill import prefill
from model import LLM

# ---------------------------------------------------------------------------------------------------- weights


def test_an_adapted_layer_computes_and_differentiates_what_pefts_own_does(llm):
    layer = fast.lora_layers(llm.model)[0]
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for forward in (layer.forward, lambda x: type(layer).forward(layer, x)):
        y = forward(x)
        results.append((y, torch.autograd.grad(y.square().sum(), weights)))
    (mine, gradients), (theirs, expected) = results
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_layer_equals_the_product_in_float64(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, rows, 48), (80, 48)))
    b = torch.randn(80, generator=generator) if bias else None
    expected = x.double() @ weight.double().t() + (0 if b is None else b.double())
    torch.testing.assert_close(fast.linear(weight, b)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_prepared_forwards_follow_the_adapters(llm):
    """Trained, switched off and on again: each time the copy is the one that fits."""
    llm.dequantize = True

    def both() -> list:
        fast_way = greedy(llm)
        llm.dequantize = False
        plain = greedy(llm)
        llm.dequantize = True
        assert fast_way == plain
        return plain

    first = both()
    with llm.adapters_off():
        assert both() != first
    assert both() == first
    with torch.no_grad():  # as a checkpoint is loaded, without training()
        for name, p in llm.model.named_parameters():
            if "lora_B" in name:
                p.mul_(-1)
    assert both() != first
    usual = {module: module.forward for module in llm.model.modules() if isinstance(module, LoraLayer)}
    with llm.inference():
        assert all(module.forward is not forward for module, forward in usual.items())
    assert all(module.forward is forward for module, forward in usual.items())


def test_the_copy_of_the_weights_is_let_go_for_training(llm):
    llm.dequantize = True
    greedy(llm)
    assert llm._forwards is not None
    with llm.training():
        assert llm._forwards is None


@pytest.mark.parametrize("dequantize", [False, True])
def test_in_16_bits_adapters_too_small_for_the_weights_rounding_still_count(llm, dequantize):
    """W is 1 everywhere, x adds up to 0: all that is left is the adapter's part, which 1 + 1e-4 would lose in bf16."""
    layer = fast.lora_layers(llm.model)[0]
    layer.base_layer.to(torch.bfloat16)
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.fill_(0.01).mul_(torch.arange(32) % 2)
        layer.lora_B["default"].weight.fill_(0.01)
    x = torch.tensor([1.0, -1.0] * 16, dtype=torch.bfloat16)[None]
    y = fast.prepared_forwards(llm.model, torch.bfloat16, with_adapters=True, dequantize=dequantize)[layer](x)
    expected = -2 * 4 * 0.01 * 0.01 * 16  # scale x rank x B x A x inputs
    torch.testing.assert_close(y.float(), torch.full((1, 32), expected), rtol=0.02, atol=0)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_weights_that_are_not_quantized_are_not_copied_in_16_bits(llm, with_adapters):
    """Of a 7B in bf16 a copy would be 12 GiB for nothing."""
    layers = fast.lora_layers(llm.model)
    for layer in layers:
        layer.base_layer.to(torch.bfloat16)
    made: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "linear", lambda weight, bias: made.append(weight) or (lambda x: x))
        fast.prepared_forwards(llm.model, torch.bfloat16, with_adapters, dequantize=True)
    assert [w.data_ptr() for w in made] == [layer.base_layer.weight.data_ptr() for layer in layers]


def test_in_16_bits_adapters_are_rounded_once_for_a_phase():
    """Not at each of the decoding steps, and again once they were trained."""
    llm = tiny_llm()
    llm.model.get_base_model().to(torch.bfloat16)
    for name, p in llm.model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    llm = LLM(llm.model, llm.tokenizer, dtype=torch.bfloat16)
    with llm.inference():
        kept = dict(llm._forwards[1])
    greedy(llm)
    assert llm._forwards[1] == kept and set(kept) == set(fast.lora_layers(llm.model))
    with torch.no_grad():
        for name, p in llm.model.named_parameters():
            if "lora_B" in name:
                p.mul_(-1)
    with llm.inference():
        assert not set(llm._forwards[1].values()) & set(kept.values())


# ------------------------------------------------------------------------------------------------------ cache


def test_a_reserved_cache_holds_what_a_growing_one_holds():
    def some(rows: int, tokens: int) -> list[torch.Tensor]:
        return [torch.randn(rows, 2, tokens, 4) for _ in range(2)]

    torch.manual_seed(0)
    plain, chosen = DynamicCache(), torch.tensor([2, 0, 0])
    first = some(3, 5)
    plain.update(*first, 0)
    reserved = fast.reserve(plain, chosen, 9, keep=True)
    expected = [tensor[chosen] for tensor in first]
    for tokens in (1, 3):
        more = some(3, tokens)
        got = reserved.update(*more, 0)
        expected = [torch.cat(pair, 2) for pair in zip(expected, more, strict=True)]
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    assert reserved.get_seq_length() == 9
    kept = fast.reserve(reserved, torch.tensor([1]), 9)
    assert torch.equal(kept.layers[0].keys, expected[0][[1]]) and reserved.layers[0].keys is None


def test_a_reserved_cache_is_finite_where_nothing_is_written(monkeypatch):
    """Attention multiplies it by 0, which makes NaN of the NaN that new memory may hold."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *shape, **kind: empty(*shape, **kind).fill_(torch.nan))
    layer, states = fast.Reserved(3, 9), torch.ones(2, 2, 5, 4)
    layer.begin(torch.tensor([0, 2]), states, states)
    layer.begin(torch.tensor([1]), states[:1, :, :2], states[:1, :, :2])
    assert layer.get_seq_length() == 5 and all(store.isfinite().all() for store in layer.stores)


def test_long_prompts_are_read_in_chunks_without_a_mask(llm):
    """Rows of a chunk are padded on the right, where causal attention sees no padding, so nothing rules out the
    fastest kernels; each chunk is within the budget of reading."""
    llm.token_budget = 10**6
    read: list[tuple[tuple[int, ...], bool]] = []

    def note(module, args, kwargs):
        read.append((tuple(kwargs["input_ids"].shape), kwargs["attention_mask"] is None))

    prompts = [random_ids(length, seed=length) for length in (500, 300, 400, 450, 30)]
    expected = [greedy(llm, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    decoder = llm.model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(note, with_kwargs=True)
    assert greedy(llm, prompts, n=2, max_new_tokens=8) == [row * 2 for row in expected]
    assert read[:3] == [((2, 499), True), ((2, 399), True), ((1, 29), True)]
    assert all(shape == (10, 1) and not unmasked for shape, unmasked in read[3:5])


def test_a_rehearsal_makes_the_cache_of_each_layer_once(llm, monkeypatch):
    """On a GPU all layers run, so it must not be made again for those that did not."""
    made: list[tuple[int, int]] = []
    usual = fast.Reserved.lazy_initialization

    def count(layer, *states):
        made.append((layer.rows, layer.length))
        usual(layer, *states)

    monkeypatch.setattr(fast.Reserved, "lazy_initialization", count)
    for quickly, llm.cuda_graph in ((True, False), (False, False), (False, True)):
        if not quickly:
            monkeypatch.setattr(memory, "few_layers", lambda llm: contextlib.nullcontext())
        memory.rehearse_rollout(llm, memory.Batch(prompts=2, prompt=20, new=8, n=3))
        assert [shape for shape in made if shape[1] == 28] == [(6, 28)] * 2  # of two layers
        made.clear()


def test_long_texts_behind_a_shared_beginning_are_read_in_chunks_too(llm):
    """As the judge's, which share a problem and its rubric and differ in the answer."""
    llm.token_budget = 10**6
    beginning = random_ids(20, seed=1)
    rows = [[*beginning, i, *random_ids(290 + i, seed=i)] for i in range(10)]
    expected = [greedy(llm, [row], max_new_tokens=4)[0] for row in rows]
    shapes: list[tuple[int, ...]] = []
    embedding = llm.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    assert greedy(llm, rows, max_new_tokens=4) == expected
    assert shapes == [(1, 20), *[(3, 299)] * 3, (1, 299), *[(10, 1)] * 4]


def test_no_row_of_a_mask_sees_nothing():
    """Some kernels return NaN there, which ends in a token outside of the vocabulary."""
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1]])
    assert fast.visible(mask, 2)[:, 0].int().tolist() == [
        [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]],
        [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
    ]


# --------------------------------------------------------------------------------------------------- batching


@settings(derandomize=True, database=None, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=12))
def test_groups_of_rows_begin_alike_and_leave_no_more_to_read(rows):
    groups = fast.shared_prefixes(rows)
    assert sorted(i for members, _ in groups for i in members) == list(range(len(rows)))
    for members, common in groups:
        assert len({tuple(rows[i][:common]) for i in members}) == 1
        assert all(common < len(rows[i]) for i in members)
    read = sum(common + sum(len(rows[i]) - common for i in members) for members, common in groups)
    assert read <= sum(map(len, rows))


def test_copies_of_a_prompt_are_read_but_for_the_last_token():
    a, b = [1, 2, 3, 4], [1, 2, 7]
    assert fast.shared_prefixes([a, b, a, b, a, b]) == [([0, 2, 4], 3), ([1, 3, 5], 2)]


# --------------------------------------------------------------------------------------------------- decoding


def test_draw_never_takes_a_token_of_probability_zero_and_follows_the_rest():
    scores = torch.full((30_000, 6), -torch.inf)
    scores[:, [1, 3]] = torch.tensor([0.0, 1.0])
    torch.manual_seed(0)
    counts = torch.bincount(fast.draw(scores), minlength=6) / 30_000
    assert counts[[0, 2, 4, 5]].sum() == 0
    assert counts[3] == pytest.approx(1 / (1 + torch.e**-1), abs=0.01)


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53])
def test_draw_finds_a_token_at_both_ends_of_the_unit_interval(monkeypatch, number):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: torch.full(shape, number, **kind))
    scores = torch.log(torch.tensor([[0.0, 0.1, 0.2, 0.7, 0.0]]))
    assert fast.draw(scores).tolist() == [1 if number == 0 else 3]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_finished_rows_leave_the_batch_once_they_are_a_quarter_of_it(llm, cuda_graph):
    """Rows of forced lengths; the others write what they write alone."""
    widths: list[int] = []
    head = llm.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: widths.append(len(output)))
    stops = [2, 9, 9, 5, 3]

    class Stop:
        def __init__(self, stops):
            self.stops, self.step = stops, 0

        def keep(self, rows):
            self.stops = [self.stops[i] for i in rows]

        def __call__(self, input_ids, scores):
            self.step += 1
            for i, stop in enumerate(self.stops):
                end = scores[i, END].clone() + 1e4
                scores[i, [END, 258]] = -torch.inf
                if self.step == stop:
                    scores[i, END] = end
            return scores

    def written(prompts, stops):
        ids, mask, cache = prefill(llm, prompts, 12)
        llm.cuda_graph = cuda_graph
        output = fast.decode(llm, ids, mask, cache, 12, [END], processors=[Stop(stops)])
        return [row[:stop].tolist() for row, stop in zip(output, stops, strict=True)]

    together = written(PROMPTS, stops)
    assert widths == [5, 5, 5, 3, 3, 2, 2, 2, 2]  # one of five ends, then another, then one of three
    assert together == [written([prompt], [stop])[0] for prompt, stop in zip(PROMPTS, stops, strict=True)]


@pytest.mark.parametrize("n", [1, 3])
def test_steps_as_a_graph_needs_them_write_what_others_write(llm, n):
    """A cache of full length, written at a column in a tensor; rows that leave; a row that begins with one token."""
    prompts = [*PROMPTS, [65], [*PROMPTS[0][:5], 7, 8]]
    usual = greedy(llm, prompts, n=n, max_new_tokens=60)
    llm.cuda_graph = True
    assert greedy(llm, prompts, n=n, max_new_tokens=60) == usual
    assert greedy(llm, [[65]], n=n, max_new_tokens=60) == [usual[len(PROMPTS)]]  # nothing is in its cache at first
    form = [Field("a: ", choices=("0", "1", "2")), Field("b:", 6, min_tokens=2)]
    forms = [form] * (n * len(prompts))
    with_forms = greedy(llm, prompts, n=n, max_new_tokens=30, templates=forms)
    llm.cuda_graph = False
    assert greedy(llm, prompts, n=n, max_new_tokens=30, templates=forms) == with_forms


def test_the_check_of_a_new_model_keeps_each_step_s_logits_where_a_graph_writes_them_to_the_same_memory(monkeypatch):
    usual = fast.FixedStep.forward

    def as_a_graph(step):
        logits = usual(step)
        return vars(step).setdefault("memory", torch.empty_like(logits)).copy_(logits)

    monkeypatch.setattr(fast.FixedStep, "forward", as_a_graph)
    tiny_llm(cuda_graph=True)


def test_a_fixed_step_writes_to_the_cache_it_is_given_and_gives_it_up_with_it(llm):
    """Where rows leave, their cache must not stay in memory beside the smaller one."""
    ids, _, cache = prefill(llm, PROMPTS, 4)
    width = ids.shape[1] + 4
    stores = [store.data_ptr() for layer in cache.layers for store in layer.stores]
    step = fast.FixedStep(llm.model, cache, torch.zeros(len(PROMPTS), 1, 1, width), written=ids.shape[1])
    step(ids[:, -1:], torch.zeros_like(ids[:, -1:]), ids.shape[1] - 1)
    assert [store.data_ptr() for layer in step.cache.layers for store in layer.stores] == stores
    fast.reserve(step.cache, torch.tensor([0]), width)
    for layers in (cache.layers, step.cache.layers):
        assert all(layer.stores == [] and layer.keys is None for layer in layers)


def sliding_llm(window: int | None) -> LLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, use_sliding_window=bool(window),
        sliding_window=window, max_window_layers=1, eos_token_id=END,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    return LLM(get_peft_model(model, LoraConfig(target_modules="all-linear")), byte_tokenizer())


def test_within_its_window_a_sliding_window_model_writes_as_without_and_beyond_is_refused():
    assert sliding_llm(None).context == 512
    llm = sliding_llm(60)
    prompts = [random_ids(30, seed=i) for i in range(3)]
    assert greedy(llm, prompts, n=2, max_new_tokens=30) == greedy(sliding_llm(None), prompts, n=2, max_new_tokens=30)
    with pytest.raises(UserError, match=r"takes 61 tokens, the model's attention window, .* is 60"):
        greedy(llm, prompts, max_new_tokens=31)


# ------------------------------------------------------------------------------------------------- the update


GROUPS = [  # prompt, completions
    (random_ids(6, seed=1), [random_ids(n, seed=n) for n in (4, 9, 1)]),
    (random_ids(11, seed=2), [random_ids(5, seed=50)]),
    (random_ids(3, seed=3), [random_ids(n, seed=n) for n in (7, 2)]),
]


def test_completions_that_share_a_row_have_the_log_probs_and_gradients_they_have_alone(llm):
    alone = [(prompt, completion) for prompt, completions in GROUPS for completion in completions]
    weights = torch.randn(sum(len(c) for _, c in alone), generator=torch.Generator().manual_seed(0))
    with llm.training():
        logps, entropy = llm.logps(*fast.segments_of(GROUPS, END), 0.7, chunk_bytes=5 * 4 * 259)
        gradients = lora_gradients(llm.model, weights @ logps)
    reference = copy.deepcopy(llm.model).double()
    expected, expected_entropy = naive_logps(reference, alone, 0.7)
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    for name, wanted in lora_gradients(reference, weights.double() @ expected).items():
        assert (gradients[name] - wanted).norm() < 1e-5 * wanted.norm(), name


def test_segments_positions_and_masks_of_a_row_worked_by_hand():
    ids, segments = fast.segments_of([([1, 2], [[3, 4], [5]]), ([6], [[7, 8]])], pad_id=9)
    assert ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 9]]
    assert segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, -1, -1]]
    assert fast.segment_positions(segments)[0].tolist() == [0, 1, 2, 3, 2]
    assert fast.segment_positions(segments)[1].tolist() == [0, 1, 2, 3, 4]  # on padding too
    rows, columns = fast.predictors(segments)
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 0, 1, 1], [1, 2, 1, 0, 1])
    mask = fast.segment_mask(segments)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert fast.segment_mask(segments[1:]) is None  # causal attention does the same


def test_rows_of_one_completion_each_are_attended_to_without_a_mask(llm):
    """With one, CUDA could not use FlashAttention; transformers makes one where it finds several texts in a row."""
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*args, attn_mask=None, **more):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        llm.logps(*fast.segments_of([([1, 2, 3], [[4, 5, 6, 7]]), ([8, 9], [[10]])], END), temperature=1.0)
    assert masks and masks == [None] * len(masks)


@settings(derandomize=True, database=None, deadline=None)
@given(
    prompt=st.integers(1, 200),
    completions=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    budget=st.integers(1, 2000),
    pairs_a_token=st.floats(1, 1e5),
)
def test_each_completion_is_in_one_row_and_rows_of_several_keep_to_the_budget(
    prompt, completions, budget, pairs_a_token
):
    rows = list(fast.share_prompts(prompt, completions, budget, pairs_a_token))
    assert sorted(i for row in rows for i in row) == list(range(len(completions)))
    for row in rows:
        assert len(row) == 1 or prompt + sum(completions[i] for i in row) <= budget


def test_a_prompt_is_shared_as_long_as_attention_costs_less_than_reading_it_again():
    # Joining 10 and 10 behind a prompt of 5 relates 25^2 pairs where two rows relate 2 x 15^2: 175 more.
    assert list(fast.share_prompts(5, [10, 10], 100, pairs_a_token=35.1)) == [[0, 1]]
    assert list(fast.share_prompts(5, [10, 10], 100, pairs_a_token=34.9)) == [[0], [1]]
    # A mask that takes twice as long: 2 x 25^2 - 2 x 15^2 = 800 more. A third one then adds 2 x (35^2 - 25^2) - 15^2.
    assert list(fast.share_prompts(5, [10, 10], 100, pairs_a_token=160.1, masked=2)) == [[0, 1]]
    assert list(fast.share_prompts(5, [10, 10], 100, pairs_a_token=159.9, masked=2)) == [[0], [1]]
    assert list(fast.share_prompts(5, [10, 10, 10], 100, pairs_a_token=195.1, masked=2)) == [[0, 1, 2]]
    assert list(fast.share_prompts(5, [10, 10, 10], 100, pairs_a_token=194.9, masked=2)) == [[0, 1], [2]]


def test_random_rows_of_forms_and_lengths_survive_compaction(llm):
    """Greedy text of many prompts in one batch is that of each alone, though rows leave at different times."""
    rng = random.Random(0)
    prompts = [random_ids(rng.randint(2, 30), seed=i) for i in range(24)]
    assert greedy(llm, prompts, max_new_tokens=40) == [greedy(tiny_llm(), [p], max_new_tokens=40)[0] for p in prompts]
