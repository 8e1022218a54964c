from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from dsv3.bench.peers import Setting, continuation, with_our_weights
from dsv3.errors import UserError
from dsv3.inference import runner
from dsv3.inference.engine import Engine, EngineConfig
from dsv3.inference.params import SamplingParams
from dsv3.inference.plan import Plan
from tests.inference.continuing import GREEDY, assert_greedy, continued, drive, random_prompts, tokens_of
from tests.inference.test_blocks import keys_of

PROMPTS = [*random_prompts(5, 150), *([k] * 60 for k in (5, 6, 7))]
"""The last need a second block soon after they were admitted with one."""
VARIANTS = [
    ("debug", {}),
    ("debug", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}),
    ("tiny", {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64}}),
]
SAMPLED = SamplingParams(
    max_tokens=16, ignore_eos=True, seed=3, temperature=1.2, top_p=0.95, top_k=100, min_p=0.001, repetition_penalty=1.1,
    presence_penalty=0.2, frequency_penalty=0.1, logit_bias={7: 1.5}, min_tokens=4,
)  # fmt: skip


@pytest.mark.parametrize(("preset", "changes"), VARIANTS)
def test_greedy_continuations_are_those_of_full_forward_passes(make_model, preset, changes):
    model = make_model(preset, max_position_embeddings=512, **changes)
    assert_greedy(model, PROMPTS, continued(model, PROMPTS, GREEDY)[0])


def test_greedy_continuations_are_those_of_transformers(make_model):
    model = make_model("debug", num_nextn_predict_layers=0, max_position_embeddings=512)
    (peer,) = with_our_weights(model, [Setting(torch.float32, "eager", "eager")])
    for prompt, tokens in zip(PROMPTS, continued(model, PROMPTS, GREEDY)[0], strict=True):
        assert tokens == continuation(peer.eval(), torch.tensor([prompt]), 16)[0].tolist()


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 40},
        {"num_blocks": 5},
        {"num_speculative_tokens": 1},
        {"num_speculative_tokens": 2, "max_num_batched_tokens": 40},
        {"num_speculative_tokens": 3, "num_blocks": 5},
        {"num_speculative_tokens": 4, "prefix_caching": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_do_not_depend_on_how_they_are_computed(drafting_model, params, sizes):
    """Alone, in chunks, after preemptions, and with drafts, also of seeded sampling with everything on."""
    expected, _ = continued(drafting_model, PROMPTS, params)
    found, engine = continued(drafting_model, PROMPTS, params, **sizes)
    assert found == expected
    stats = engine.stats()
    assert (stats.preemptions > 0) == ("num_blocks" in sizes)
    assert stats.generation_tokens == 8 * 16
    if drafts := sizes.get("num_speculative_tokens"):
        assert stats.draft_tokens >= stats.drafts > 0
        assert len(stats.accepted_per_position) == drafts
        assert sum(stats.accepted_per_position) == stats.accepted_tokens
        assert list(stats.accepted_per_position) == sorted(stats.accepted_per_position, reverse=True)
        assert 0.2 < stats.accepted_per_position[0] / stats.drafts < 0.98


@pytest.mark.parametrize("drafts", [1, 3])
def test_wrong_drafts_leave_nothing_in_the_first_modules_cache(drafting_model, drafts):
    """It is that of one pass over what is known. Deeper modules read drafts that may be wrong: see docs/log.md."""

    def begun(tokens, steps):
        engine = Engine(drafting_model, None, EngineConfig(num_blocks=8, num_speculative_tokens=drafts))
        engine.add("0", tokens, replace(GREEDY, max_tokens=100))
        for _ in range(steps):
            engine.step()
        [[request]] = engine.requests.values()
        return engine, request

    engine, request = begun(PROMPTS[0], 20)
    stats = engine.stats()
    assert 0 < stats.accepted_per_position[0] < stats.drafts
    once, whole = begun(request.tokens, 1)
    found, expected = (
        each.runner.cache.read(drafting_model.mtp[0].block.name, one.blocks).flatten(0, 1)[: request.computed]
        for each, one in ((engine, request), (once, whole))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_a_draft_asked_for_ahead_is_the_one_asked_for_afterwards(drafting_model, monkeypatch, drafts, params):
    ahead, engine = continued(drafting_model, PROMPTS, params, num_speculative_tokens=drafts)
    calls = []
    monkeypatch.setattr(runner.Runner, "first_draft", lambda *_: calls.append(None))
    afterwards, other = continued(drafting_model, PROMPTS, params, num_speculative_tokens=drafts)
    assert ahead == afterwards
    assert engine.stats() == other.stats()
    assert calls


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_batch_that_others_join_and_leave(drafting_model, drafts):
    """What was gathered for the batch before is not read; 20 blocks are too few for some of these batches."""
    params = [replace(GREEDY, max_tokens=5 + 7 * (k % 4)) for k in range(len(PROMPTS))]
    expected = [continued(drafting_model, [prompt], own)[0][0] for prompt, own in zip(PROMPTS, params, strict=True)]
    for blocks in (64, 20):
        sizes = {"num_speculative_tokens": drafts, "num_blocks": blocks, "max_num_seqs": 4}
        found, engine = continued(drafting_model, PROMPTS, params, **sizes)
        assert found == expected
        assert engine.runner.cache.gathered


def test_drafts_save_passes(drafting_model):
    passes = []
    for drafts in (0, 2):
        engine = Engine(drafting_model, None, EngineConfig(num_blocks=64, num_speculative_tokens=drafts))
        passes.append(len(drive(engine, PROMPTS[2:3], replace(GREEDY, max_tokens=60))[0, 0]))
    assert passes[0] == 60
    assert passes[1] < 45


def test_a_cached_prefix_changes_nothing_but_is_not_computed_again(drafting_model):
    shared = random_prompts(1, 150, seed=1)[0] + list(range(200))
    prompts = [shared + tail for tail in ([1], [2, 3], [1])]
    cold, _ = continued(drafting_model, prompts, GREEDY, prefix_caching=False)
    for drafts in (0, 2):
        engine = Engine(drafting_model, None, EngineConfig(num_blocks=64, num_speculative_tokens=drafts))
        for prompt, expected in zip(prompts, cold, strict=True):
            deltas = drive(engine, [prompt], GREEDY)[0, 0]
            assert tokens_of(deltas) == expected
            held = 0 if prompt is prompts[0] else len(shared) // 64 * 64
            assert {delta.num_cached_tokens for delta in deltas} == {held}
        stats = engine.stats()
        assert stats.prefix_cache_hits == 2 * (len(shared) // 64 * 64)
        assert stats.prefix_cache_queries == sum(map(len, prompts))
        [delta] = drive(engine, [shared], replace(GREEDY, max_tokens=1), salt="another tenant")[0, 0]
        assert delta.num_cached_tokens == 0


def test_a_conversation_goes_on_from_what_was_generated(drafting_model):
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=64))
    prompt = PROMPTS[0][:60]
    answer = tokens_of(drive(engine, [prompt], replace(GREEDY, max_tokens=80))[0, 0])
    deltas = drive(engine, [prompt + answer + [5]], GREEDY)[0, 0]
    assert deltas[0].num_cached_tokens == 128
    assert [tokens_of(deltas)] == continued(drafting_model, [prompt + answer + [5]], GREEDY)[0]


def test_weights_changed_in_place_are_used_and_old_prefixes_forgotten(make_model):
    model, prompt = make_model("debug", max_position_embeddings=512), list(range(130))
    engine = Engine(model, None, EngineConfig(num_blocks=64))
    before = tokens_of(drive(engine, [prompt], GREEDY)[0, 0])
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.mul_(-1)
    engine.weights_changed()
    deltas = drive(engine, [prompt], GREEDY)[0, 0]
    assert deltas[0].num_cached_tokens == 0
    assert tokens_of(deltas) != before
    assert_greedy(model, [prompt], [tokens_of(deltas)])


def test_blocks_carried_to_another_cache_go_on_there(drafting_model):
    """Layer by layer, as a machine that prefills would send them to one that decodes."""
    prompt = list(range(130))
    first, second = (Engine(drafting_model, None, EngineConfig(num_blocks=n)) for n in (20, 30))
    expected = tokens_of(drive(first, [prompt], GREEDY)[0, 0])
    theirs = [first.scheduler.pool.known[key] for key in keys_of(prompt, 64)]
    pool = second.scheduler.pool
    pool.release([pool.take() for _ in range(4)][::-1])
    ours = [pool.take() for _ in theirs]
    for layer in second.runner.cache.held:
        second.runner.cache.write(layer, ours, first.runner.cache.read(layer, theirs))
    for k, (number, key) in enumerate(zip(ours, keys_of(prompt, 64), strict=True)):
        pool.remember(number, key, prompt[64 * k : 64 * (k + 1)])
    deltas = drive(second, [prompt], GREEDY)[0, 0]
    assert deltas[0].num_cached_tokens == 128
    assert tokens_of(deltas) == expected


def test_plans_travel_as_json(drafting_model):
    params = replace(SAMPLED, logprobs=2, prompt_logprobs=1)
    expected, _ = continued(drafting_model, PROMPTS[:3], params)
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=64, num_speculative_tokens=2))
    run, seen, adapter = engine.runner.run, [], TypeAdapter(Plan)

    def over_the_wire(plan):
        received = adapter.validate_json(adapter.dump_json(plan))
        assert received == plan
        seen.append(received)
        return run(received)

    engine.runner.run = over_the_wire
    deltas = drive(engine, PROMPTS[:3], params)
    assert [tokens_of(deltas[k, 0]) for k in range(3)] == expected
    assert seen


def test_the_continuations_of_one_prompt_differ_and_share_it(drafting_model):
    prompt, params = list(range(130)), replace(SAMPLED, n=3)
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=64))
    engine.add("first", [1, 2], params)
    loads = [engine.stats(), engine.step() and engine.stats()]
    assert [(each.running, each.waiting) for each in loads] == [(0, 3), (1, 2)]
    engine.abort("first")
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=64))
    deltas = drive(engine, [prompt], params)
    found = [tokens_of(deltas[0, index]) for index in range(3)]
    assert len({tuple(tokens) for tokens in found}) == 3
    assert [deltas[0, index][0].num_cached_tokens for index in range(3)] == [0, 128, 128]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.prefix_cache_hits) == (3 * 130, 2 * 128)
    assert stats.tokens_read == 130 + 2 * 2 + 3 * 15  # the last of 16 tokens is not read
    assert found[0] == tokens_of(drive(engine, [prompt], SAMPLED)[0, 0])


def test_without_a_seed_every_call_differs_and_torchs_own_state_stays(drafting_model):
    before = torch.get_rng_state()
    runs = [continued(drafting_model, PROMPTS[:1], replace(SAMPLED, seed=None))[0] for _ in range(3)]
    assert runs[0] != runs[1] or runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_ends_a_continuation(drafting_model, tokenizer, drafts):
    def ended(**changes):
        engine = Engine(drafting_model, tokenizer, EngineConfig(num_blocks=64, num_speculative_tokens=drafts))
        deltas = drive(engine, PROMPTS[:1], SamplingParams(**{"temperature": 0, "max_tokens": 40, **changes}))[0, 0]
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        assert not engine.has_work
        text = "".join(delta.text for delta in deltas)
        return tokens_of(deltas), text, deltas[-1].finish_reason, deltas[-1].stop_reason

    plain, text, *why = ended(ignore_eos=True)
    assert (len(plain), *why) == (40, "length", None)
    token = plain[10]
    first = plain.index(token) + 1
    assert ended(ignore_eos=True, stop_token_ids=[token])[0::2] == (plain[:first], "stop")
    assert ended(ignore_eos=True, stop_token_ids=[token])[3] == token
    later = ended(ignore_eos=True, stop_token_ids=[token], min_tokens=first + 1)[0]
    assert token not in later[: first + 1]
    assert later[: first - 1] == plain[: first - 1]
    stop = next(c for c in text[3:] if c not in "\ufffd")
    assert ended(ignore_eos=True, stop=stop)[1:] == (text[: text.index(stop)], "stop", stop)
    whole = ended(ignore_eos=True, stop=stop, include_stop_str_in_output=True)[1]
    assert whole == text[: text.index(stop) + 1]


def test_a_prompt_is_scored_piece_by_piece(drafting_model, monkeypatch):
    rows, head = [], drafting_model.head
    monkeypatch.setattr(runner, "SCORED", 8)
    monkeypatch.setattr(drafting_model, "head", lambda hidden: rows.append(len(hidden)) or head(hidden))
    prompt = max(PROMPTS, key=len)
    drive(Engine(drafting_model, None, EngineConfig(num_blocks=64)), [prompt], replace(GREEDY, prompt_logprobs=0))
    assert max(rows) == 8
    assert rows.count(8) >= (len(prompt) - 1) // 8


def test_logprobs_of_continuation_and_prompt(drafting_model, monkeypatch):
    """Of the model itself, whatever was sampled how; in pieces and in chunks, after preemption and with drafts."""
    monkeypatch.setattr(runner, "SCORED", 7)
    params = [replace(SAMPLED, logprobs=2, prompt_logprobs=n, temperature=t) for n, t in ((0, 0.0), (3, 1.5), (1, 1.0))]
    for sizes in ({}, {"max_num_batched_tokens": 24}, {"num_speculative_tokens": 2}, {"num_blocks": 5}):
        engine = Engine(drafting_model, None, EngineConfig(**{"num_blocks": 64, **sizes}))
        drive(engine, PROMPTS[:3], GREEDY)  # so that the prompts are in the cache
        deltas = drive(engine, PROMPTS[:3], params)
        for number, prompt in enumerate(PROMPTS[:3]):
            own = deltas[number, 0]
            tokens = prompt + tokens_of(own)
            with torch.inference_mode():
                log = drafting_model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            assert all(delta.prompt_logprobs is None for delta in own[1:])
            scores = [*own[0].prompt_logprobs, *(each for delta in own for each in delta.logprobs)]
            assert scores[0] is None
            assert len(scores) == len(tokens)
            for place, each in enumerate(scores[1:]):
                row, wanted = log[place], params[number].prompt_logprobs if place + 1 < len(prompt) else 2
                assert each.token_id == tokens[place + 1]
                assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
                assert abs(each.rank - 1 - int((row > row[each.token_id]).sum())) <= 1
                assert list(each.top.values()) == pytest.approx(row.topk(wanted).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("drafts", [0, 2])
def test_routing_is_what_the_token_before_chose(drafting_model, drafts):
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=64, num_speculative_tokens=drafts))
    prompt = PROMPTS[1]
    deltas = drive(engine, [prompt], GREEDY, return_routing=True)[0, 0]
    tokens, found = prompt + tokens_of(deltas), [each for delta in deltas for each in delta.routing]
    with torch.inference_mode():
        routing = drafting_model(torch.tensor([tokens[:-1]])).routing
    for place, by_block in enumerate(found, len(prompt) - 1):
        assert by_block == [each.expert[place].tolist() for each in routing.values()]
    assert len(found) == 16


def test_an_aborted_request_gives_everything_back(drafting_model):
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=64, max_num_seqs=2, max_num_batched_tokens=100))
    for number in range(4):
        engine.add(str(number), PROMPTS[number] * 2, replace(GREEDY, n=2, max_tokens=4))
    expected = continued(drafting_model, [PROMPTS[3] * 2], replace(GREEDY, max_tokens=4))[0]
    seen = []
    for step in range(30):
        if step in (0, 1, 3):
            engine.abort(str({0: 2, 1: 0, 3: 1}[step]))  # one that waits, and two that run
            engine.abort("0")
        seen += engine.step()
    assert {delta.request_id for delta in seen[-4:]} == {"3"}
    assert [tokens_of([delta for delta in seen if (delta.request_id, delta.index) == ("3", 0)])] == expected
    assert (engine.has_work, engine.stats().kv_cache_usage) == (False, 0)
    assert engine.stats().running == engine.stats().waiting == 0


def test_logits_that_are_not_finite_end_one_request_alone(drafting_model):
    """A prompt with a token whose embedding is not a number, twice, so that its blocks are neither found nor spread."""
    expected, _ = continued(drafting_model, PROMPTS, GREEDY)
    bad = next(token for token in range(320) if not any(token in each for each in [*PROMPTS, *expected]))
    weight = drafting_model.embed_tokens.weight
    kept = weight[bad].clone()
    with torch.no_grad():
        weight[bad] = float("nan")
    try:
        engine = Engine(drafting_model, None, EngineConfig(num_blocks=12, num_speculative_tokens=2))
        poison = [5] * 100 + [bad] + [6] * 30
        for _ in range(2):
            deltas = drive(engine, [*PROMPTS[:3], poison, *PROMPTS[3:]], GREEDY)
            [last] = deltas.pop((3, 0))
            assert (last.token_ids, last.finish_reason, last.num_cached_tokens) == ([], "abort", 0)
            assert [tokens_of(own) for _, own in sorted(deltas.items())] == expected
    finally:
        with torch.no_grad():
            weight[bad] = kept
    assert engine.stats().kv_cache_usage == 0


def test_a_cache_in_fp8_takes_fewer_bytes_and_says_nearly_the_same(make_model):
    model = make_model("debug", max_position_embeddings=512, kv_lora_rank=128)
    engine = Engine(model, None, EngineConfig(num_blocks=16, fp8_cache=True))
    held = engine.runner.cache.held["0"]
    # The latent's 128 elements in a byte each, their scale, and the rotated key in BF16.
    assert (held.dtype, held.shape[2]) == (torch.uint8, 128 + 4 + 2 * model.config.qk_rope_head_dim)
    for prompt in PROMPTS[:2]:
        tokens = tokens_of(drive(engine, [prompt], GREEDY)[0, 0])
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
        below = logits.amax(1) - logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert below.median() == 0
        assert below.max() < 0.2
    with pytest.raises(UserError, match=r"kv_lora_rank = 16 is no multiple .* leave fp8_cache"):
        Engine(make_model("debug"), None, EngineConfig(fp8_cache=True))


def test_refusals(drafting_model, make_model):
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=4))
    params = SamplingParams(max_tokens=8)
    engine.add("a", [1], params)
    for arguments, said in [
        (("a", [1], params), "there is a request 'a' already"),
        (("b", [], params), "the prompt is empty"),
        (("b", [320], params), "outside the vocabulary: expected 0 to 319"),
        (("b", [-1], params), "outside the vocabulary"),
        (("b", [1] * 249, params), "249 tokens and max_tokens = 8 are more than the 256 tokens"),
        (("b", [1], SamplingParams(stop_token_ids=[320])), "name tokens of the vocabulary"),
        (("b", [1], SamplingParams(logit_bias={-1: 0.5})), "name tokens of the vocabulary"),
    ]:
        with pytest.raises(UserError, match=said):
            engine.add(*arguments)
    for sizes, said in [
        ({"num_speculative_tokens": 17}, "expected 0 to 16"),
        ({"max_num_seqs": 0}, "max_num_seqs = 0: expected 1 or more"),
        ({"num_blocks": 1, "num_speculative_tokens": 16, "max_model_len": 33}, None),
    ]:
        if said is None:
            assert Engine(drafting_model, None, EngineConfig(**sizes)).max_model_len == 32
            continue
        with pytest.raises(UserError, match=said):
            Engine(drafting_model, None, EngineConfig(**sizes))
    with pytest.raises(UserError, match="the model has no MTP modules"):
        Engine(make_model("debug", num_nextn_predict_layers=0), None, EngineConfig(num_speculative_tokens=1))
