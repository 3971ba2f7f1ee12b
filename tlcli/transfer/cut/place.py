"""Where to cut: the boundary that costs least, the latest of several."""

import math
from collections.abc import Collection, Sequence

from torch import fx

from tlcli.transfer.cut.graph import Refusal, closure, weighs
from tlcli.transfer.cut.pair import Pair

FLOPS_A_BYTE = 4000
"""So many operations run again cost as much as one more byte kept: 200 GFLOP/s, two CPU cores, against 50 MB/s, a slow
disk. A residual block's input then beats two maps inside it, and a deep map is never given up for the images."""
DECODING = 20_000
"""Operations that reading a pixel of an image again, from a JPEG file, is worth: some 5 ms for 224 x 224."""
ROW = 16384
"""Bytes: a smaller row is read as slowly as this one. So the input of a head crosses, not the somewhat smaller input of
a layer before it."""


def boundary_of(pair: Pair) -> list[fx.Node]:
    """The frozen tensors that cross, in order: fewest bytes, with a price for frozen work that the suffix does again.

    Raises Refusal where the images themselves would cross.
    """
    price = {node: pair.flops[node] for node in pair.data}
    width = {node: None if n is None else max(n, ROW) * FLOPS_A_BYTE for node, n in pair.width.items()}
    _, *sides = pair.shape(pair.training.images)
    width[pair.training.images] = (width[pair.training.images] or 0) + math.prod(sides) * DECODING
    users = {node: [user for user in node.users if user in pair.width] for node in pair.data}
    live = {node for node in pair.data if any(user in pair.live for user in node.users)}
    crossing = minimum_cut(pair.data, users, live, width, price)
    prefix = closure((pair.twin[node] for node in crossing), ())
    if pair.training.images in crossing or not any(weighs(node, pair.evaluation.shell) for node in prefix):
        raise Refusal(_nothing_leads(pair, live))
    return crossing


def _nothing_leads(pair: Pair, live: Collection[fx.Node]) -> str:
    why = next(reason for reason in pair.live.values() if reason is not None)
    if all(not weighs(node, pair.training.shell) for node in closure(live, ())):
        return f"nothing leads: {why}"
    return f"too little leads: {why}, and what is frozen before it costs less to run again than to keep"


def minimum_cut(
    nodes: Sequence[fx.Node],
    users: dict[fx.Node, list[fx.Node]],
    needed: Collection[fx.Node],
    width: dict[fx.Node, int | None],
    price: dict[fx.Node, int],
) -> list[fx.Node]:
    """The nodes whose results cross. Of several least cuts the latest.

    A node is an edge as wide as its result (None: it cannot cross): where that is cut, the result crosses. An edge from
    the source to its start is as wide as the price of running it again: where that is cut, the suffix runs it. The
    first node is the input.
    """
    import networkx  # here, for it takes 50 ms

    flow = networkx.DiGraph()
    for node in nodes:
        size = width[node]
        flow.add_edge((node, "in"), (node, "out"), capacity=math.inf if size is None else size)
        flow.add_edge("source", (node, "in"), capacity=math.inf if node is nodes[0] else price[node])
        if node in needed:
            flow.add_edge((node, "out"), "sink")  # without a capacity: never cut
        for user in users[node]:
            flow.add_edge((node, "out"), (user, "in"))
    # The sink's side is all that leads to it in the residual network: the smallest of all least cuts
    algorithm = networkx.algorithms.flow.boykov_kolmogorov
    _, (early, late) = networkx.minimum_cut(flow, "source", "sink", flow_func=algorithm)
    return [node for node in nodes if (node, "in") in early and (node, "out") in late]
