import math

import pytest

from dsv3.errors import UserError
from dsv3.inference.params import SamplingParams


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n": 0}, "n = 0: expected 1 or more"),
        ({"temperature": -0.1}, "temperature = -0.1: expected 0 or more"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0: expected more than 0 and at most 1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"top_k": -2}, "top_k = -2"),
        ({"min_p": 1.1}, "min_p = 1.1: expected 0 to 1"),
        ({"max_tokens": 0}, "max_tokens = 0: expected 1 or more"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9: expected 0 to max_tokens"),
        ({"logprobs": -1}, "logprobs = -1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"presence_penalty": math.nan}, "presence_penalty = nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty = inf"),
        ({"stop": ("a", "")}, "stop holds an empty text"),
        ({"stop": ""}, "stop holds an empty text"),
        ({"logit_bias": {3: math.inf}}, "logit_bias holds a value that is not finite"),
    ],
)
def test_refusals(values, said):
    with pytest.raises(UserError, match=said):
        SamplingParams(**values)


def test_one_stop_text_may_stand_alone():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
