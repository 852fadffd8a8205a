"""Which output channels share their columns: a grouping under which V x 1 pruning loses little importance.

    scores [K, columns], V = 2            grouped 0 1 | 2 3: every column       grouped 0 2 | 1 3: half of the
      0   9 1 9 1                         holds 10, any half of them is as      columns hold 18, those remain
      1   1 9 1 9                         good as the other
      2   9 1 9 1
      3   1 9 1 9

A grouping is worth the sum over its vectors of max(score of the vector - tau, 0), with tau the score that the best
``density`` of all vectors reach. From a greedy start it is improved round by round: one channel leaves each group, and
all of them are assigned anew, exactly, by the Hungarian method. No round makes it worse.

On nets trained on shapes (3 seeds, 90%, V = 16, |w|; ``benchmarks/permutation.py``) neighbours keep 0.143 of a net's
importance, this grouping 0.159, simulated annealing of a minute a layer 0.159; single weights keep 0.260.

Pool and Yu, "Channel permutations for N:M sparsity", NeurIPS 2021, swap channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .patterns import Layout, find_pattern, lowest_units

ROUNDS = 60  # without a gain, after which a grouping counts as good
SETTLED = 20  # times that tau follows the grouping; a tau that never rests lets two groupings take turns for ever


@dataclass(frozen=True)
class Permutation:
    """A grouping of output channels, and the share of all importance that each way of grouping keeps, in 0..1."""

    order: Tensor  # int64 [K]: each V in turn are a group; what SparseConv2d.from_dense takes as ``permute``
    kept_unstructured: float
    kept_consecutive: float
    kept_permuted: float

    def __str__(self) -> str:
        return (
            f"kept importance: unstructured {self.kept_unstructured:.4f}, consecutive {self.kept_consecutive:.4f}, "
            f"permuted {self.kept_permuted:.4f}"
        )


def kept_importance(scores: Tensor, vector: int, sparsity: float, layout: Layout, order: Tensor | None = None) -> float:
    """The share of a layer's importance that is left after V x 1 pruning at a sparsity."""
    units = find_pattern(f"{vector}x1").units(scores, layout, order)
    pruned = lowest_units(units.scores, units.sizes, round(sparsity * scores.numel()))
    total = float(scores.double().sum())
    return float(scores.double()[units.mask(pruned, scores.shape)].sum()) / total if total else 1.0


def choose_permutation(
    scores: Tensor, vector: int, sparsity: float, layout: Layout | None = None, seed: int = 0
) -> Permutation:
    """Groups the output channels of a layer.

    Args:
        scores: of the weight's shape, at least 0 (what is below counts as 0).
        vector: V. Channels stay within their convolution group; its last group of channels may be smaller.
        sparsity: fraction of the layer's weights that will go, in [0, 1).
        seed: of the order in which channels leave their groups; nothing else is drawn.
    """
    layout = layout or Layout()
    scores = scores.detach().clamp(min=0)
    rows = layout.rows(scores).flatten(1)  # [K, columns]
    per_group = rows.shape[0] // layout.groups
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for group in range(layout.groups):
        own = rows[group * per_group : (group + 1) * per_group].double().cpu()
        # Whole numbers, whose sums are exact: ties are ties, and the last digit of a score (another order of summation,
        # sharded weights) does not decide between groupings that are as good.
        own = (own / own.amax().clamp_min(1e-300) * 2**24).round() if own.numel() else own
        parts.append(_grouped(own, vector, sparsity, generator) + group * per_group)
    order = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    arguments = (scores.cpu(), vector, sparsity, layout)
    kept = kept_importance(*arguments), kept_importance(*arguments, order)
    if kept[1] < kept[0]:  # the neighbours may be the best grouping there is
        order, kept = torch.arange(len(order)), (kept[0], kept[0])
    unstructured = kept_importance(scores.cpu(), 1, sparsity, layout)
    return Permutation(order.to(scores.device), unstructured, *kept)


def _grouped(rows: Tensor, vector: int, sparsity: float, generator: torch.Generator) -> Tensor:
    """An order of ``rows [k, columns]`` of which each ``vector`` in turn are a group."""
    count = rows.shape[0]
    if vector <= 1 or count <= vector or rows.numel() == 0:
        return torch.arange(count)
    groups = -(-count // vector)
    kept = max(round((1 - sparsity) * groups * rows.shape[1]), 1)
    # Rows of zeros fill up the last group, where they stay.
    padded = torch.cat([rows, rows.new_zeros(groups * vector - count, rows.shape[1])])
    members = _greedy(padded, count, vector, kept)  # [groups, V]
    return _improved(padded, members, count, kept, generator)


def _threshold(sums: Tensor, kept: int) -> Tensor:
    return sums.flatten().kthvalue(max(sums.numel() - kept + 1, 1)).values


def _greedy(rows: Tensor, count: int, vector: int, kept: int) -> Tensor:
    """Groups filled one after the other with the channel that adds most above what a member's share of tau is."""
    share = _threshold(rows[:count], min(kept * vector, count * rows.shape[1]))
    free = torch.ones(rows.shape[0], dtype=torch.bool)
    free[count:] = False
    filling = list(range(count, rows.shape[0]))
    groups = rows.shape[0] // vector
    members = []
    for group in range(groups):
        chosen = filling if group == groups - 1 else []
        held = rows.new_zeros(rows.shape[1])
        while len(chosen) < vector:
            left = free.nonzero().flatten()
            if held.any():
                size = len(chosen) + 1 - (len(filling) if group == groups - 1 else 0)
                worth = (held + rows[left] - size * share).clamp_(min=0).sum(1)
            else:
                worth = (rows[left] - share).clamp_(min=0).sum(1)
            best = int(left[worth.argmax()])
            free[best] = False
            chosen = [*chosen, best]
            held = held + rows[best]
        members.append(chosen)
    return torch.tensor(members)


def _improved(rows: Tensor, members: Tensor, count: int, kept: int, generator: torch.Generator) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    groups, vector = members.shape
    every = torch.arange(groups)
    sums = rows[members].sum(1)  # [groups, columns]
    tau, quiet, turn = _threshold(sums, kept), 0, 0
    while groups > 1 and quiet < max(ROUNDS, 2 * vector):
        place = torch.randint(vector, (groups,), generator=generator)
        # The filling stays in the last group.
        real = (members[-1] < count).nonzero().flatten()
        place[-1] = real[int(torch.randint(len(real), (1,), generator=generator))]
        leaving = members[every, place]
        rest = sums - rows[leaving]
        # gain[i, g]: what group g is worth with channel i for the one that left it.
        gain = torch.stack([(other + rows[leaving] - tau).clamp_(min=0).sum(1) for other in rest], dim=1)
        _, to = linear_sum_assignment(gain.numpy(), maximize=True)
        to = torch.from_numpy(to)
        better = float(gain[every, to].sum() - gain.diagonal().sum())
        turn += 1
        if better > 1e-9 * float(gain.diagonal().sum()):
            members[to, place[to]] = leaving
            sums[to] = rest[to] + rows[leaving]
            quiet = 0
        else:
            quiet += 1
        if turn % vector == 0 and turn <= SETTLED * vector:
            tau = _threshold(sums, kept)
    ordered = members.sort(1).values
    # The group that is filled up comes last, its filling at the end.
    return ordered.flatten()[:count] if count % vector else ordered[ordered[:, 0].argsort()].flatten()
