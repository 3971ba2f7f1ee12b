"""The minimum cut of a graph."""

import itertools
import math
import random

import pytest

from tlcli.transfer.graph import minimum_cut


@pytest.mark.parametrize("seed", range(30))
def test_the_cut_is_the_latest_of_the_least(seed: int) -> None:
    """Against every set of operations that may run again, on random graphs of eight."""
    draw = random.Random(seed)
    nodes = [f"n{i}" for i in range(8)]
    users: dict[str, list[str]] = {node: [] for node in nodes}
    for i in range(1, 8):
        for source in draw.sample(nodes[:i], min(i, draw.choice([1, 1, 2]))):
            users[source].append(nodes[i])
    needed = {nodes[-1], draw.choice(nodes[1:])}
    width = {node: draw.choice([1, 4, 8, 16, None]) for node in nodes} | {nodes[0]: 9}
    price = {node: draw.choice([0, 1, 3, 7]) for node in nodes}
    costs = {}
    for flags in itertools.product([False, True], repeat=7):
        again = {node for node, flag in zip(nodes[1:], flags, strict=True) if flag}
        crossing = [n for n in nodes if (n in needed or again & {*users[n]}) and n not in again]
        if all(width[n] is not None for n in crossing):
            cost = sum(width[n] for n in crossing) + sum(price[n] for n in again)
            costs[tuple(crossing)] = min((cost, len(again)), costs.get(tuple(crossing), (math.inf, 0)))
    found = minimum_cut(users, needed, width, price)  # type: ignore[arg-type]
    assert costs[tuple(found)] == min(costs.values())
