import torch

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.names import released
from dsv3.weights.parts import part_of


def every_part(config):
    with torch.device("meta"):
        state = DeepSeekV3(config).state_dict()
    return state, {ours: released(ours, tuple(tensor.shape), config) for ours, tensor in state.items()}


def test_parts_cover_every_tensor_once():
    state, mapping = every_part(ModelConfig.preset("debug", num_nextn_predict_layers=2))
    for ours, tensor in state.items():
        hits = torch.zeros(tensor.shape, dtype=torch.int)
        for part in mapping[ours]:
            if not part.copy:
                part_of(hits, part.start, part.size).add_(1)
        assert (hits == 1).all(), ours


def test_names_of_each_kind():
    config = ModelConfig.preset("debug", num_nextn_predict_layers=2)  # 3 layers
    _, mapping = every_part(config)
    names = {ours: [part.name for part in parts] for ours, parts in mapping.items()}
    assert names["norm.weight"] == ["model.norm.weight"]
    assert names["lm_head.weight"] == [
        "lm_head.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.4.shared_head.head.weight",
    ]
    assert names["embed_tokens.weight"][0] == "model.embed_tokens.weight"
    assert names["mtp.1.eh_proj.weight"] == ["model.layers.4.eh_proj.weight"]
    assert names["mtp.1.block.self_attn.o_proj.weight"] == ["model.layers.4.self_attn.o_proj.weight"]
    assert names["mtp.0.shared_head.norm.weight"] == ["model.layers.3.shared_head.norm.weight"]
    assert names["layers.1.mlp.gate.weight"] == ["model.layers.1.mlp.gate.weight"]
    gate, up = mapping["layers.2.mlp.experts.gate_up_proj"][10:12]
    assert (gate.name, gate.start) == ("model.layers.2.mlp.experts.5.gate_proj.weight", (5, 0, 0))
    assert (up.name, up.start, up.size) == ("model.layers.2.mlp.experts.5.up_proj.weight", (5, 16, 0), (1, 16, 32))
    down = mapping["layers.2.mlp.experts.down_proj"][5]
    assert (down.name, down.shape) == ("model.layers.2.mlp.experts.5.down_proj.weight", (32, 16))
