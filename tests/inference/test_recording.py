import pytest
import torch

from dsv3.errors import RunError
from dsv3.inference import generate as generation
from dsv3.inference import recording
from dsv3.inference.cache import LatentCache
from dsv3.inference.generate import generate
from dsv3.inference.recording import Recorder, Recording, pays, program
from dsv3.inference.sampling import SamplingParams

VARIANTS = [
    ("debug", {}),
    ("debug", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}),
    ("tiny", {}),
    ("tiny", {"num_experts_per_tok": 8, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32}}),
]


def started(model, lengths, dtype=torch.float32):
    """A cache that has read random prompts of these lengths, with all tokens of the batch and the lengths."""
    batch, longest = len(lengths), max(lengths)
    tokens = torch.randint(
        0, model.config.vocab_size, (batch, longest + 12), generator=torch.Generator().manual_seed(0)
    )
    names = [layer.name for layer in model.layers]
    cache = LatentCache(model.config, names, batch, longest + 12, dtype, torch.device("cpu"))
    model(tokens[:, :longest], positions=cache.begin(torch.arange(longest).expand(batch, -1), longest), cache=cache)
    return cache, tokens, torch.tensor(lengths)


@pytest.mark.parametrize("lengths", [[5], [4, 9, 6], [3] * 16])
@pytest.mark.parametrize(("preset", "changes"), VARIANTS)
@torch.inference_mode()
def test_a_replayed_pass_equals_the_pass_in_python(make_model, preset, changes, lengths):
    """For other tokens, which choose other experts, and at later positions than it was recorded for."""
    model = make_model(preset, **changes)
    (cache, tokens, at), (twin, _, _) = started(model, lengths), started(model, lengths)
    recorded, routes = None, set()
    for step in range(10):
        new, end = tokens.gather(1, at.unsqueeze(1)).squeeze(1), max(lengths) + step + 1
        recorded = recorded or Recording(model, cache, new, at, end)
        found = recorded(new, at)
        out = model(new.unsqueeze(1), positions=twin.begin(at.unsqueeze(1), end), cache=twin)
        torch.testing.assert_close(found, out.logits[:, 0], atol=1e-5, rtol=1e-5)
        routes.add(str(out.routing["1"].expert.tolist()))
        at = at + 1
    assert len(routes) > 1 or model.config.num_experts_per_tok == model.config.n_routed_experts
    for name in cache.values:
        torch.testing.assert_close(cache.values[name], twin.values[name], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_it_computes_in_the_models_dtype_and_leaves_the_model_alone(make_model):
    model = make_model("debug")
    model.compute_dtype = torch.bfloat16
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    cache, tokens, at = started(model, [5, 7], torch.bfloat16)
    cache.begin(at.unsqueeze(1), 8)
    expected = model(tokens[:, :1], positions=at.unsqueeze(1), cache=cache).logits[:, 0]
    found = Recording(model, cache, tokens[:, 0], at, 8)(tokens[:, 0], at)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.stride() == before[name][1]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_generation_is_the_same_with_and_without(make_model, monkeypatch, params):
    """Unequal prompts, one of which ends early, and more positions than one recording spans."""
    model, made = make_model("debug"), []

    class Counted(Recording):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((len(args[2]), self.end))

    def run():
        tokens = [[] for _ in range(3)]
        params_ = SamplingParams(**params, max_tokens=80, seed=3, ignore_eos=True)
        steps = generate(model, [[5, 6, 7, 8], [40], [9, 9]], params_)
        new = next(steps)
        for step in range(79):
            for each in new:
                tokens[each.sequence].append(each.token)
            new = steps.send({1} if step == 40 else None)
        return tokens

    monkeypatch.setattr(generation, "Recording", Counted)
    monkeypatch.setattr(recording, "FEWEST_PASSES", 1000)
    expected = run()
    assert made == []
    monkeypatch.setattr(recording, "FEWEST_PASSES", 1)
    monkeypatch.setattr(recording, "SPAN", 16)
    assert run() == expected
    assert made == [(3, 23), (3, 40), (3, 57), (2, 63), (2, 80), (2, 84)]


def test_when_it_pays(make_model):
    model = make_model("debug")
    config = model.config
    most = 128 // config.n_routed_experts
    assert pays(model, 1, 16)
    assert pays(model, most, 1000)
    assert not pays(model, 1, 15)
    assert not pays(model, most + 1, 1000)  # then tokens are sorted by expert, in Python
    assert not pays(make_model("debug", num_experts_per_tok=1), 1, 16)
    assert not pays(make_model("debug", vocab_size=2**18), 1, 16)

    class Elsewhere(type(model.layers[1].moe.dispatcher)):
        pass

    model = make_model("debug")
    model.layers[1].moe.dispatcher = Elsewhere()
    assert not pays(model, 1, 16)


def replayed(function, first, second):
    """`function` recorded on one tensor, replayed on another of the same shape: its result there."""
    given = first.clone()
    with Recorder() as recorder:
        result = function(given)
    steps = program(recorder.calls, [given])
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
