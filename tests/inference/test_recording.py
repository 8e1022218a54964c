from dataclasses import replace

import pytest
import torch

from dsv3.errors import RunError
from dsv3.inference.engine import Engine, EngineConfig
from dsv3.inference.recording import Recorder, pays, program
from tests.inference.continuing import GREEDY, continued, random_prompts


@pytest.mark.parametrize("drafts", [0, 2])
def test_replayed_passes_choose_the_tokens_of_passes_in_python(drafting_model, monkeypatch, drafts):
    """Across pages, which take a recording of their own, and with requests that end earlier."""
    prompts = random_prompts(3, 70)
    sizes = {"num_speculative_tokens": drafts}
    found, engine = continued(drafting_model, prompts, GREEDY, **sizes)
    assert engine.runner.passes.recorded
    monkeypatch.setattr("dsv3.inference.passes.pays", lambda *_: False)
    expected, engine = continued(drafting_model, prompts, GREEDY, **sizes)
    assert not engine.runner.passes.recorded
    assert found == expected


@pytest.mark.parametrize("drafts", [0, 1])
def test_one_recording_serves_a_batch_that_shrinks(drafting_model, drafts):
    """Passes have room for eight, and nothing else tells them apart."""
    model, prompts = drafting_model, [[k + 1] * 9 for k in range(8)]
    engine = Engine(model, None, EngineConfig(num_blocks=64, num_speculative_tokens=drafts))
    for k, prompt in enumerate(prompts):
        engine.add(str(k), prompt, replace(GREEDY, max_tokens=8 + 6 * k))
    while len(engine.requests) > 4:
        engine.step()
    assert len(engine.runner.passes.recorded) == 1 + drafts


def test_when_it_pays(make_model):
    model = make_model("debug")
    most = 128 // model.config.n_routed_experts
    assert pays(model, 8)
    assert pays(model, most)
    assert not pays(model, most + 1)  # then tokens are sorted by expert, in Python
    assert not pays(make_model("debug", num_experts_per_tok=1), 8)
    assert not pays(make_model("debug", vocab_size=2**18), 8)

    class Elsewhere(type(model.layers[1].moe.dispatcher)):
        pass

    model = make_model("debug")
    model.layers[1].moe.dispatcher = Elsewhere()
    assert not pays(model, 8)


def replayed(function, first, second):
    """`function` recorded on one tensor, replayed on another of the same shape: its result there."""
    given = first.clone()
    with Recorder() as recorder:
        result = function(given)
    steps = program(recorder.calls, [given], {})
    given.copy_(second)
    for called, args, kwargs in steps:
        called(*args, **kwargs)
    return result, steps


WEIGHT = torch.arange(12.0).view(4, 3)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda x: x.view(3, 2).t()[:, 1:], 0),  # views
        (lambda x: (x + WEIGHT.square().sum()) * 2, 2),  # what depends on constants alone
        (lambda x: torch.nn.functional.linear(x, WEIGHT), 1),
        (lambda x: torch.nn.functional.silu(x).flatten(), 1),  # cannot be told where to write
        (lambda x: x.t().flatten().sort().values, 2),  # a copy that looks like a view; a tuple
        (lambda x: torch.zeros(2, 3).masked_fill_(x > 0, 1.0).mul_(3), 4),  # a constant that is written to
        (lambda x: torch.zeros(2, 3).index_add_(0, torch.tensor([1, 1]), x), 2),
        (lambda x: x.new_ones(4, 3).__setitem__(slice(2), x) or x[0].clone().fill_(7).sum() + x.sum(), 7),
        (lambda x: x.clone().__iadd__(x)[1], 2),
        (lambda x: torch.add(x, 1, out=torch.empty(2, 3)) * x, 3),
    ],
)
@torch.inference_mode()
def test_replaying_is_calling_again(function, calls):
    first, second = torch.tensor([[1.0, -2, 3], [4, 5, -6]]), torch.tensor([[-7.0, 8, 9], [10, -11, 12]])
    result, steps = replayed(function, first, second)
    torch.testing.assert_close(result, function(second), rtol=0, atol=0)
    assert len(steps) == calls


@pytest.mark.parametrize(
    "looks", [torch.Tensor.tolist, lambda x: x.sum() > 0 and 1, lambda x: int(x.sum()), lambda x: x[0, 0].item()]
)
def test_what_python_decides_by_looking_cannot_be_recorded(looks):
    with pytest.raises(RunError, match=r"this pass cannot be recorded: .* reads a tensor that is another in the next"):
        replayed(looks, torch.ones(2, 3), torch.zeros(2, 3))
    replayed(lambda x: x * len(WEIGHT.tolist()), torch.ones(2, 3), torch.zeros(2, 3))  # a constant may be read
