import torch

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.training.ema import Average

CONFIG = ModelConfig.preset("debug", num_hidden_layers=2)


def change(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in model.state_dict().values():
            each.add_(torch.randn(each.shape, generator=generator))


def test_it_is_the_average_of_the_equation_of_weights_and_biases():
    model = DeepSeekV3(CONFIG).initialize("fan_in")
    average = Average(model.state_dict(), 0.5)
    expected = {name: each.clone().double() for name, each in model.state_dict().items()}
    for n in range(1, 13):
        change(model, n)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        for name, each in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * each.double()
    assert any(name.endswith("e_score_correction_bias") for name in expected)
    for name, each in average.tensors().items():
        torch.testing.assert_close(each.double(), expected[name], rtol=1e-5, atol=1e-5)
        assert each.device.type == "cpu"


def test_the_model_gets_its_own_weights_back_to_the_bit():
    model = DeepSeekV3(CONFIG).initialize("fan_in")
    average = Average(model.state_dict(), 0.9)
    change(model, 1)
    average.update()
    own = {name: each.clone() for name, each in model.state_dict().items()}
    with average.in_place():
        for name, each in model.state_dict().items():
            assert torch.equal(each, average.tensors()[name])
            assert not torch.equal(each, own[name])
    assert all(torch.equal(each, own[name]) for name, each in model.state_dict().items())
    change(model, 2)
    average.update()  # and goes on
    assert average.updates == 2


def test_a_change_right_after_the_update_is_not_in_it():
    model, other = (DeepSeekV3(CONFIG).initialize("fan_in") for _ in range(2))
    slow, quick = Average(model.state_dict(), 0.9), Average(other.state_dict(), 0.9)
    for n in range(20):
        for each in (model, other):
            change(each, n)
        slow.update()
        slow.wait()
        quick.update()  # the thread works while the weights change
    for name, each in quick.tensors().items():
        assert torch.equal(each, slow.tensors()[name]), name
