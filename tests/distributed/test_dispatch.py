"""Experts on ranks against the local dispatcher: outputs, gradients, bytes."""

import pytest
import torch

from dsv3.ops.tiles import TILE
from dsv3.recipe.parallel import ParallelSection
from tests.distributed.dispatching import CONFIG, KINDS, TOKENS, by_copies, check, forms, without_looking

LAYOUTS = [(8, 8), (8, 2), (4, 1), (2, 2)]
"""(ranks with experts, ranks a node): at once, over four nodes of two, over nodes of one, two groups of ranks."""


def wire_bytes(fp8):
    """Of one row in FP32 in the forward pass: (on the way there, with its experts and their weights; on the way back)."""
    hidden = CONFIG.hidden_size
    there = hidden + 4 * -(-hidden // TILE) if fp8 else 4 * hidden
    return there + 8 * CONFIG.num_experts_per_tok, 4 * hidden


@pytest.mark.parametrize(("expert", "per_node"), LAYOUTS)
def test_outputs_and_gradients_are_those_of_one_process(eight_ranks, expert, per_node):
    for deviations, _, _ in eight_ranks.run(check, ParallelSection(data=8, expert=expert), per_node):
        assert len(deviations) == 5  # output, tokens, router, both weights of the experts
        assert max(deviations) < 2e-6


@pytest.mark.parametrize("per_node", [8, 2])
def test_all_tokens_to_one_rank_and_none_to_others(eight_ranks, per_node):
    """Six of eight ranks get nothing, two get all, which is eight times their share."""
    for deviations, _, _ in eight_ranks.run(check, ParallelSection(data=8, expert=8), per_node, "first"):
        assert max(deviations) < 2e-6


def test_a_rank_without_tokens(eight_ranks):
    for deviations, _, _ in eight_ranks.run(check, ParallelSection(data=8, expert=8), 2, "router", 3):
        assert max(deviations) < 2e-6


@pytest.mark.parametrize("fp8", [False, True])
def test_wire_bytes_are_those_of_the_formula(eight_ranks, fp8):
    """Each token once to each of the nodes, and there once to each of the ranks, that have an expert of its."""
    nodes, per_node = 4, 2
    found = eight_ranks.run(check, ParallelSection(data=8, expert=8), per_node, "router", None, torch.float32, fp8)
    there, back = wire_bytes(fp8)
    between = within = 0
    for rank, (_, _, expert) in enumerate(found):
        node, place = divmod(rank, per_node)
        for chosen in (expert // (CONFIG.n_routed_experts // 8)).tolist():
            reached = {each // per_node for each in chosen}
            between += len(reached - {node})
            within += sum(each % per_node != place for each in set(chosen))
            assert len(reached) <= CONFIG.topk_group
    sent = {name: sum(traffic[name] for _, traffic, _ in found) for name in ("rail", "node")}
    assert 0 < between < 8 * TOKENS * CONFIG.topk_group
    assert sent["rail"] == between * (there + back) + 8 * (nodes - 1) * 16
    assert sent["node"] == within * (there + back) + 8 * (per_node - 1) * 16


@pytest.mark.parametrize("per_node", [8, 2])
def test_fp8_on_the_way_is_within_its_rounding(eight_ranks, per_node):
    """Three bits of mantissa: half of 2^-3 of an element at most, less in a sum."""
    found = eight_ranks.run(check, ParallelSection(data=8, expert=8), per_node, "router", None, torch.bfloat16, True)
    worst = [max(deviations[i] for deviations, _, _ in found) for i in range(5)]
    assert 1e-3 < worst[0] < 0.05
    assert max(worst) < 0.1


@pytest.mark.parametrize(("expert", "per_node"), [(2, 2), (4, 4), (8, 2)])
def test_bounded_legs_give_what_exact_ones_do(eight_ranks, expert, per_node):
    """To the bit; every rank sends each other rank as many rows as there are tokens, which the formula knows."""
    section, nodes = ParallelSection(data=8, expert=expert), expert // per_node
    there, back = wire_bytes(False)
    settings = [(kind, torch.float32, False, 0) for kind in KINDS]
    for rank in eight_ranks.run(forms, section, per_node, settings):
        for made, sent, (exact, bounded) in rank:
            same(made)
            assert exact == (bounded[1], bounded[1])
            assert bounded[0] == expert * TOKENS * min(CONFIG.num_experts_per_tok, CONFIG.n_routed_experts // expert)
            slabs = {"rail": nodes - 1, "node": nodes * (per_node - 1)}
            assert sent[1] == {name: count * TOKENS * (there + back) for name, count in slabs.items()}


@pytest.mark.parametrize("per_node", [4, 2])
def test_bounded_legs_in_fp8_and_with_aligned_groups(eight_ranks, per_node):
    settings = [("router", torch.bfloat16, True, alignment) for alignment in (0, 16)]
    for rank in eight_ranks.run(forms, ParallelSection(data=8, expert=4), per_node, settings):
        for made, _, (exact, bounded) in rank:
            same(made)
            assert exact[1] == bounded[1]


def same(made):
    for exact, bounded in zip(*made, strict=True):
        assert torch.equal(exact, bounded)


@pytest.mark.parametrize("per_node", [4, 2])
def test_the_host_reads_nothing_of_a_bounded_exchange(eight_ranks, per_node):
    for wide, narrow in eight_ranks.run(without_looking, ParallelSection(data=8, expert=4), per_node):
        assert wide < 1e-6
        assert narrow < 0.1


@pytest.mark.parametrize(("per_node", "fp8"), [(4, False), (2, True)])
def test_slabs_through_memory_that_all_see_are_those_sent(eight_ranks, tmp_path, per_node, fp8):
    """Within each node; windows are opened anew where more bytes come, and two are there at a time."""
    found = eight_ranks.run(by_copies, ParallelSection(data=8, expert=4), per_node, str(tmp_path), fp8)
    for made, sent, opened in found:
        same(made)
        assert sent[0] == sent[1] > 0
        assert opened in (2, 4, 6)
