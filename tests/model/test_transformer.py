import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dsv3.model.block import Pass
from dsv3.model.config import ModelConfig
from dsv3.model.rope import rotations
from dsv3.model.transformer import DeepSeekV3
from dsv3.precision.deferred import WeightGradients

DEBUG = ModelConfig.preset("debug")
DEEP = ModelConfig.preset("debug", num_nextn_predict_layers=3)


def model_of(config=DEBUG, seed=0):
    model = DeepSeekV3(config).initialize(0.2, seed)
    for block in model.blocks():
        if block.moe:
            block.moe.gate.e_score_correction_bias.uniform_(-0.3, 0.1, generator=torch.Generator().manual_seed(seed))
    return model


def rows(*shape, seed=0):
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(seed))


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def assert_same(found, expected, atol=1e-6):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


def test_parameter_counts_of_the_released_model():
    """The published checkpoint's own sums, reference section 5; its counts include the routing biases."""
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.preset("deepseek-v3"))
    counts = Counter()
    for name, tensor in model.state_dict().items():
        counts["mtp" if name.startswith("mtp.") else "main"] += tensor.numel()
    assert counts["main"] == 671_026_419_200
    assert counts["mtp"] == 11_610_068_224

    def count(module):
        return sum(tensor.numel() for tensor in module.state_dict().values())

    assert count(model.layers[0].self_attn) == 187_107_328
    assert count(model.layers[2].mlp) == 396_361_728
    assert count(model.layers[2]) == 583_483_392
    assert count(model.layers[3]) == 11_507_286_272
    assert count(model.layers[3].mlp.gate) == 1_835_264
    assert count(model.layers[3].mlp.experts) == 256 * 44_040_192
    assert count(model.embed_tokens) == count(model.lm_head) == 926_679_040
    assert count(model.mtp[0].eh_proj) == 102_760_448


def test_blocks_are_those_of_the_model_and_of_its_mtp_modules():
    model = DeepSeekV3(DEEP)
    assert [block.name for block in model.blocks()] == ["0", "1", "2", "mtp.0", "mtp.1", "mtp.2"]
    assert [block.moe is not None for block in model.blocks()] == [False, True, True, True, True, True]


def test_a_block_is_its_five_phases():
    model = model_of()
    block, x = model.layers[1], torch.randn(2, 5, 32)
    shared = Pass(rotations(DEBUG, torch.arange(5).unsqueeze(0)))
    expected, routing = block(x, shared)
    carry = block.attend(x, shared)
    for phase in (block.dispatch, block.experts, block.combine):
        phase(carry)
    assert torch.equal(block.merge(carry), expected)
    assert int(routing.load.sum()) == 2 * 5 * DEBUG.num_experts_per_tok


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("chosen", [1, 2])
def test_moe_is_the_weighted_sum_of_its_experts(tokens, training, chosen):
    """Equation (12), token by token: few tokens take other ways to their experts, in training all take one."""
    with torch.set_grad_enabled(training):
        assert_weighted_sum(model_of(DEBUG.replace(num_experts_per_tok=chosen)).layers[1].mlp, torch.randn(tokens, 32))


def assert_weighted_sum(moe, x):
    routing = moe.gate(x, 1, 0.0)
    rows_RD, weight_R, counts, handle = moe.dispatcher.dispatch(x, routing)
    found = moe.dispatcher.combine(moe.experts(rows_RD, counts, weight_R), handle)
    for t in range(len(x)):
        total = torch.zeros(32)
        for expert, weight in zip(routing.expert[t], routing.weight[t], strict=True):
            gate, up = moe.experts.gate_up_proj[expert].chunk(2)
            total += weight * (moe.experts.down_proj[expert] @ (F.silu(gate @ x[t]) * (up @ x[t])))
        torch.testing.assert_close(found[t], total, atol=1e-5, rtol=1e-4)


def mtp_losses_by_the_equations(model, tokens):
    """Equations (21) to (24), one position at a time; `tokens` is one row of T + 1."""
    length, losses = len(tokens) - 1, []
    hidden = list(model(tokens[None, :-1]).hidden[0])
    for k, module in enumerate(model.mtp, start=1):
        joined = []
        for i in range(length - k):
            embedding = model.embed_tokens.weight[tokens[i + k]]
            joined.append(module.eh_proj(torch.cat((module.enorm(embedding), module.hnorm(hidden[i])))))
        shared = Pass(rotations(model.config, torch.arange(length - k).unsqueeze(0)))
        states, _ = module.block(torch.stack(joined)[None], shared)
        hidden = list(module.shared_head.norm(states[0]))
        log_p = [F.log_softmax(model.lm_head.weight @ h, dim=0) for h in hidden]
        losses.append(-sum(log_p[i][tokens[i + k + 1]] for i in range(length - k)) / length)
    return losses


def test_mtp_losses_follow_the_equations_at_depth_3():
    model, tokens = model_of(DEEP), rows(2, 12)
    losses = model.loss(tokens, mtp_weight=0.3)
    by_row = [mtp_losses_by_the_equations(model, row) for row in tokens]
    expected = [torch.stack(each).mean() for each in zip(*by_row, strict=True)]
    for found, loss in zip(losses.mtp, expected, strict=True):
        torch.testing.assert_close(found, loss.detach(), atol=1e-5, rtol=1e-5)
    main = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(losses.main, main.detach(), atol=1e-5, rtol=1e-5)
    total = main + 0.3 / 3 * torch.stack(expected).sum()
    torch.testing.assert_close(losses.total, total, atol=1e-5, rtol=1e-5)
    assert_same(gradients(losses.total, model), gradients(total, model), atol=1e-5)
    assert set(losses.load) == {"1", "2", "mtp.0", "mtp.1", "mtp.2"}
    assert int(losses.load["mtp.2"].sum()) == 2 * (11 - 3) * DEEP.num_experts_per_tok


def test_without_weight_the_mtp_modules_are_left_out():
    model = model_of(DEEP)
    losses = model.loss(rows(1, 12), mtp_weight=0.0)
    assert losses.mtp == []
    assert set(losses.load) == {"1", "2"}
    assert all((grad == 0).all() for grad in torch.autograd.grad(losses.total, list(model.mtp.parameters()), materialize_grads=True))  # fmt: skip


def test_a_model_of_depth_3_learns_at_every_depth():
    model, tokens = DeepSeekV3(DEEP).initialize("fan_in"), rows(2, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    history = []
    for _ in range(8):
        losses = model.loss(tokens, mtp_weight=0.3)
        history.append(losses.mtp)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < 0.5 * first


def losses_by_hand(model, tokens, valid, segments, positions):
    """Main and MTP losses with every target that does not count left out, divided by the main targets that do."""
    logits = [model(tokens[:, :-1], positions=positions[:, :-1], segment_ids=segments[:, :-1]).logits]
    hidden = model(tokens[:, :-1], positions=positions[:, :-1], segment_ids=segments[:, :-1]).hidden
    length = tokens.shape[1] - 1
    for k, module in enumerate(model.mtp, start=1):
        shared = Pass(rotations(model.config, positions[:, : length - k]), segments[:, : length - k])
        hidden, _ = module(hidden[:, : length - k], model.embed_tokens(tokens[:, k:length]), shared)
        logits.append(model.head(hidden))
    sums, count = [], 0
    for k, each in enumerate(logits):
        total = 0.0
        for b in range(len(tokens)):
            for i in range(length - k):
                target = i + k + 1
                if valid[b, target] and segments[b, target] == segments[b, i]:
                    total = total - F.log_softmax(each[b, i], dim=0)[tokens[b, target]]
                    count += k == 0
        sums.append(total)
    return [total / count for total in sums]


def test_targets_that_are_invalid_or_of_another_document_do_not_count():
    model, tokens = model_of(ModelConfig.preset("debug", num_nextn_predict_layers=2)), rows(2, 15)
    segments = torch.zeros(2, 15, dtype=torch.long)
    segments[0, 6:], segments[1, 3:], segments[1, 13:] = 1, 1, 2
    positions = torch.stack((torch.arange(15), torch.arange(15)))
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[0, 10:13] = False
    losses = model.loss(tokens, valid=valid, segment_ids=segments, positions=positions, mtp_weight=0.6)
    main, *mtp = losses_by_hand(model, tokens, valid, segments, positions)
    torch.testing.assert_close(losses.main, main.detach(), atol=1e-5, rtol=1e-5)
    for found, expected in zip(losses.mtp, mtp, strict=True):
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.total, main + 0.3 * sum(mtp), atol=1e-5, rtol=1e-5)


def test_two_micro_batches_give_the_gradient_of_the_whole_batch():
    model, tokens = model_of(), rows(4, 13)
    valid = torch.ones(4, 13, dtype=torch.bool)
    valid[0, 3:], valid[3, 7:] = False, False  # unequal numbers of targets
    options = dict(mtp_weight=0.3, balance_alpha=0.1)
    whole = gradients(model.loss(tokens, valid=valid, **options).total, model)
    divisor = float(valid[:, 1:].sum()) / 2
    parts = [
        gradients(model.loss(tokens[at], valid=valid[at], scale=0.5, divisor=divisor, **options).total, model)
        for at in (slice(0, 2), slice(2, 4))
    ]
    assert_same([a + b for a, b in zip(*parts, strict=True)], whole)


def balance_by_the_equations(affinity, sequences, k):
    """Equations (17) to (20) on the affinities [T, E] of equally long sequences, averaged over them."""
    losses = []
    for part in affinity.chunk(sequences):
        length, experts = part.shape
        chosen = [set(sorted(range(experts), key=lambda e: -row[e])[:k]) for row in part.tolist()]
        f = [experts / (k * length) * sum(e in each for each in chosen) for e in range(experts)]
        p = [sum(row[e] / row.sum() for row in part) / length for e in range(experts)]
        losses.append(sum(f[e] * p[e] for e in range(experts)))
    return sum(losses) / sequences


def affinities_of(model, tokens, **options):
    """The affinities of every MoE block during one loss, with the losses."""
    affinities = []

    def keep(gate, args):
        affinities.append((args[0] @ gate.weight.t()).sigmoid())

    hooks = [block.moe.gate.register_forward_pre_hook(keep) for block in model.blocks() if block.moe]
    losses = model.loss(tokens, **options)
    for hook in hooks:
        hook.remove()
    return affinities, losses


@pytest.mark.parametrize("batch_wise", [False, True])
def test_balance_loss_joins_the_gradients_and_leaves_the_values_alone(batch_wise):
    model, tokens, alpha = model_of(), rows(2, 11), 0.7
    affinities, plain = affinities_of(model, tokens, mtp_weight=0.3)
    balanced = model.loss(tokens, mtp_weight=0.3, balance_alpha=alpha, batch_wise=batch_wise)
    assert len(affinities) == 3  # MTP's block included
    assert torch.equal(balanced.total, plain.total)
    assert torch.equal(balanced.main, plain.main)
    assert plain.balance == 0
    parts = 1 if batch_wise else 2
    balance = sum(balance_by_the_equations(each, parts, DEBUG.num_experts_per_tok) for each in affinities)
    torch.testing.assert_close(balanced.balance, balance.detach())

    explicit = gradients(plain.total + alpha * balance, model)
    assert_same(gradients(balanced.total, model), explicit)
    assert not all(
        torch.allclose(a, b)
        for a, b in zip(explicit, gradients(model.loss(tokens, mtp_weight=0.3).total, model), strict=True)
    )


def test_balance_loss_counts_once_under_recompute():
    model, tokens = model_of(), rows(2, 11)
    options = dict(mtp_weight=0.3, balance_alpha=0.7)
    expected = model.loss(tokens, **options)
    expected_gradients = gradients(expected.total, model)
    passes = []
    for block in model.blocks():
        forward = block.forward
        block.forward = lambda x, shared, forward=forward: checkpoint(forward, x, shared, use_reentrant=False)
        block.input_layernorm.register_forward_hook(lambda *args: passes.append(args))
    found = model.loss(tokens, **options)
    torch.testing.assert_close(found.balance, expected.balance)
    assert_same(gradients(found.total, model), expected_gradients)
    assert len(passes) == 2 * 4  # every block ran forward twice


def test_initialisation_depends_on_the_seed_alone_and_has_the_asked_scale():
    a, b, c = (DeepSeekV3(ModelConfig.preset("tiny")).initialize(seed=seed) for seed in (1, 1, 2))
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name
        if x.dim() == 1:
            assert (x == 1).all(), name
        else:
            assert float(x.detach().std()) == pytest.approx(0.006, rel=0.1), name
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    fan_in = DeepSeekV3(ModelConfig.preset("tiny")).initialize("fan_in")
    assert float(fan_in.embed_tokens.weight.detach().std()) == pytest.approx(1, rel=0.05)
    assert float(fan_in.layers[1].self_attn.o_proj.weight.detach().std()) == pytest.approx((128 * 8) ** -0.5, rel=0.05)
    assert float(fan_in.lm_head.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.05)


def test_weights_in_float32_compute_in_bfloat16():
    model = DeepSeekV3(DEBUG, compute_dtype=torch.bfloat16).initialize(0.1)
    tokens = rows(2, 12)
    exact = DeepSeekV3(DEBUG).initialize(0.1)
    output = model(tokens)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), exact(tokens).logits, atol=0.1, rtol=0.1)
    losses = model.loss(tokens, mtp_weight=0.3, balance_alpha=0.01)
    assert losses.main.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in gradients(losses.total, model))


@pytest.mark.parametrize("recompute", [[], ["norms", "mla_up", "swiglu"]])
def test_weight_gradients_of_linear_layers_can_wait(recompute):
    model, tokens, waiting = model_of(), rows(8, 40), WeightGradients()
    model.recompute(recompute)
    expected = gradients(model.loss(tokens, mtp_weight=0.3, balance_alpha=0.1).total, model)
    model.zero_grad()
    model.defer_weight_gradients(waiting)
    with waiting.deferred() as later:
        model.loss(tokens, mtp_weight=0.3, balance_alpha=0.1).total.backward()
    missing = {name for name, each in model.named_parameters() if each.grad is None}
    assert missing == {
        name for name, _ in model.named_parameters() if re.search(r"_proj(_with_mqa)?(\.weight)?$", name)
    }
    for add in later:
        add()
    assert_same([each.grad for each in model.parameters()], expected)
