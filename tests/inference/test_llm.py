from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.tokenizer import TextStream
from dsv3.errors import UserError
from dsv3.inference.llm import LLM, _Part
from dsv3.inference.sampling import SamplingParams
from dsv3.weights.checkpoint import save_checkpoint

END = 999


def part_of(pieces, stop):
    """A continuation whose tokens stand for these bytes."""
    tokenizer = SimpleNamespace(token_bytes=lambda token: pieces[token])
    tokenizer.stream = lambda: TextStream(tokenizer)
    return _Part(tokenizer, stop)


def run(pieces, stop, ends_by_token):
    """What is shown after each token, and why it ended."""
    part, shown = part_of(pieces, stop), []
    for token in range(len(pieces)):
        last = token == len(pieces) - 1 and not ends_by_token
        shown.append(part.push(token, {END}, last))
        if part.reason == "stop":
            return shown, part
    if ends_by_token:
        shown.append(part.push(END, {END}, True))
    return shown, part


def cut_at_stop(text, stops):
    """The definition: character by character, until a stop text is complete; the longest of those that are."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


ALPHABET = st.sampled_from("ab\né😀")


@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans())
def test_stop_texts_are_never_shown_however_the_text_comes(data, ends_by_token):
    text = data.draw(st.text(ALPHABET, min_size=1, max_size=14))
    stops = data.draw(st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(raw) - 1, 1)), max_size=8)))
    bounds = [0, *[cut for cut in cuts if cut < len(raw)], len(raw)]
    pieces = [raw[a:b] for a, b in pairwise(bounds)]
    shown, part = run(pieces, stops, ends_by_token)
    expected, stopped = cut_at_stop(text, stops)
    assert "".join(shown) == expected
    assert "\ufffd" not in "".join(shown)
    assert part.reason == ("stop" if stopped or ends_by_token else "length")
    assert END not in part.ids


def test_text_that_may_begin_a_stop_is_held_back_until_it_does_not():
    shown, part = run([b"ab", b"\n", b"c", b"\n", b"\n", b"d"], ["\n\n"], ends_by_token=False)
    assert shown == ["ab", "", "\nc", "", ""]
    assert part.reason == "stop"
    shown, part = run([b"a", b"\n"], ["\n\n"], ends_by_token=False)
    assert shown == ["a", "\n"]  # nothing follows
    assert part.reason == "length"


def test_a_character_is_shown_whole_and_a_cut_one_at_the_end_is_marked():
    raw = "é😀".encode()
    shown, _ = run([raw[:1], raw[1:4], raw[4:]], [], ends_by_token=True)
    assert shown == ["", "é", "😀", ""]
    shown, _ = run([b"x", raw[:1]], [], ends_by_token=False)
    assert shown == ["x", "\ufffd"]


@pytest.fixture(scope="module")
def llm(make_model, tokenizer):
    return LLM.of(make_model("debug"), tokenizer)


PROMPTS = ["def add(", "", "日本"]


def test_generate_and_stream_agree(llm):
    params = SamplingParams(temperature=1.5, max_tokens=20, seed=1)
    for prompt in PROMPTS:
        [whole] = llm.generate([prompt], params)
        pieces = list(llm.stream(prompt, params))
        assert "".join(pieces) == whole.text
        assert len(pieces) == len(whole.token_ids) + (whole.finish_reason == "stop")
        assert llm.tokenizer.decode(whole.token_ids) == whole.text


def test_prompts_of_a_batch_are_continued_as_alone(llm):
    params = SamplingParams(temperature=0, max_tokens=10)
    together = llm.generate(PROMPTS, params)
    assert together == [llm.generate([prompt], params)[0] for prompt in PROMPTS]
    assert [each.prompt for each in together] == PROMPTS
    assert llm.generate([], params) == []


def test_token_ids_are_continued_as_they_are(llm):
    params = SamplingParams(temperature=0, max_tokens=10)
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("def add(")]
    assert llm.generate([ids], params)[0].token_ids == llm.generate(["def add("], params)[0].token_ids


def test_a_stop_text_and_a_stop_token_end_one_continuation_alone(llm):
    params = SamplingParams(temperature=0, max_tokens=12)
    plain = llm.generate(PROMPTS, params)
    # A character that the first text has and the others lack is where the first one shall stop.
    stop = next(c for c in plain[0].text[2:] if c not in plain[1].text + plain[2].text + "\ufffd")
    stopped = llm.generate(PROMPTS, replace(params, stop=stop))
    assert stopped[0].text == plain[0].text[: plain[0].text.index(stop)]
    assert stopped[0].finish_reason == "stop"
    assert stopped[1:] == plain[1:]
    token = plain[2].token_ids[3]
    ended = llm.generate(PROMPTS[2:], replace(params, stop_token_ids=(token,)))[0]
    assert ended.token_ids == plain[2].token_ids[: plain[2].token_ids.index(token)]
    assert ended.finish_reason == "stop"


def test_the_tokenizers_end_of_sentence_ends_and_is_not_shown(make_model, tokenizer):
    model = make_model("debug")
    # A head whose every logit is 0 but the end's: the first token is it.
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.norm.weight.fill_(1.0)
    llm = LLM.of(model, tokenizer)
    with torch.no_grad():
        hidden = model(torch.tensor([[tokenizer.bos_id]])).hidden[0, -1]
        model.lm_head.weight[tokenizer.eos_id] = hidden
    [found] = llm.generate([""], SamplingParams(temperature=0, max_tokens=5))
    assert (found.text, found.token_ids, found.finish_reason) == ("", [], "stop")
    [found] = llm.generate([""], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert len(found.token_ids) == 5
    assert found.finish_reason == "length"


def test_refusals(llm):
    with pytest.raises(UserError, match="prompt 0 is empty"):
        llm.generate([[]])
    with pytest.raises(UserError, match="more than the model's max_position_embeddings = 128"):
        llm.generate(["日本" * 100])
    with pytest.raises(UserError, match="more than the model's max_position_embeddings = 128"):
        next(llm.stream("x", SamplingParams(max_tokens=127)))


def test_a_checkpoint_on_disk_continues_as_the_model_in_memory(llm, tmp_path):
    llm.tokenizer.save(tmp_path / "tokenizer")
    save_checkpoint(
        tmp_path / "checkpoints" / "step-00000001",
        {"model": llm.model.state_dict()},
        {"model": llm.model.config.to_hf()},
        {"tokenizer": tmp_path / "tokenizer"},
    )
    params = SamplingParams(temperature=0, max_tokens=8)
    assert LLM(tmp_path, device="cpu").generate(PROMPTS, params) == llm.generate(PROMPTS, params)
