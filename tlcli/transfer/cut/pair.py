"""Both forms of a network together: what is frozen in both, of which the boundary can be made."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from tlcli.transfer.cut.digest import text_of_node
from tlcli.transfer.cut.graph import Refusal, Traced, mutated
from tlcli.transfer.cut.observe import Map, Observer, Unknown
from tlcli.transfer.cut.state import eval_mode

TRIED = (0, 1, 2)
TRIED_AGAIN = (2, 0)
"""The images of the two batches of every trial, of different sizes; none is at the same place in both."""


@dataclass(frozen=True)
class PerImage:
    """A number that is `n` for each image of the batch."""

    n: int


class Pair:
    """A network's two forms, and what is frozen in both of them: the parts of which the boundary can be made."""

    def __init__(
        self, network: nn.Module, training: Traced, evaluation: Traced, trains: Collection[int], images: Tensor
    ) -> None:
        """Run both on batches of different size, and match their operations. `trains`: the ids of what trains."""
        self.network = network
        self.training = training
        self.evaluation = evaluation
        train, evaluated = Observer(training, trains), Observer(evaluation, trains)
        train.observe(images[list(TRIED_AGAIN)])
        with eval_mode(network):
            evaluated.observe(images)
        self.live, self._turned = train.live, train.turned
        if training.output not in self.live:
            raise Refusal("nothing that trains reaches the output")
        self.twins = _twins((training, train), (evaluation, evaluated))
        self.twin = {node: twins[0] for node, twins in self.twins.items()}
        self.flops = {node: n // len(TRIED_AGAIN) for node, n in train.flops.items()}
        self._values = {node: (train.values[node], evaluated.values[twin]) for node, twin in self.twin.items()}
        folded = {node: _fold(*values) for node, values in self._values.items()}
        self.folded = {node: value for node, value in folded.items() if not isinstance(value, Unknown)}
        self.data = self._from_images()
        self.width = {node: self._bytes(node) for node in self.data}

    def _from_images(self) -> list[fx.Node]:
        """What is frozen and not known without the images, in order: no constants, and no shapes."""
        found: dict[fx.Node, None] = {self.training.images: None}
        for node in self.training.nodes:
            if node not in self.live and node not in self.folded and any(s in found for s in node.all_input_nodes):
                found[node] = None
        return list(found)

    def _bytes(self, node: fx.Node) -> int | None:
        """What a tensor takes for one image in float32; None where it cannot be at the boundary: it is no tensor, has
        no image a row, is not in both forms, or changes later; or is a transposed view, stored as it does not lie."""
        two, three = self._values.get(node, (None, None))
        if not isinstance(two, Map) or not isinstance(three, Map) or two.shape[1:] != three.shape[1:]:
            return None
        if two.shape[:1] != (len(TRIED_AGAIN),) or three.shape[:1] != (len(TRIED),):
            return None
        overwritten = any(u not in self.live and mutated(u, self.training.shell) is node for u in node.users)
        if node in self._turned or overwritten:
            return None
        return 4 * math.prod(two.shape[1:])

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of a tensor of the boundary, for one image."""
        shape: tuple[int, ...] = self._values[node][0].shape
        return shape[1:]


def _fold(two: Any, three: Any) -> Any:
    """A value at any batch size from its values at the two that were tried: a constant or a multiple of the size."""
    if isinstance(two, Map | Unknown) or type(two) is not type(three):
        return Unknown()
    if isinstance(two, tuple | list):
        if len(two) != len(three):
            return Unknown()
        items = [_fold(a, b) for a, b in zip(two, three, strict=True)]
        return Unknown() if any(isinstance(item, Unknown) for item in items) else tuple(items)
    if two == three:
        return two
    if isinstance(two, int) and two * len(TRIED) == three * len(TRIED_AGAIN) and two % len(TRIED_AGAIN) == 0:
        return PerImage(two // len(TRIED_AGAIN))
    return Unknown()


def _twins(training: tuple[Traced, Observer], evaluation: tuple[Traced, Observer]) -> dict[fx.Node, list[fx.Node]]:
    """For each frozen operation of the first form those of the second that do the same: same inputs, same arguments.

    An operation that returned its input as it is (dropout in eval mode) stands for that input.
    """
    numbers: dict[str, int] = {}
    found: dict[int, list[fx.Node]] = {}
    for node, number in _numbered(*evaluation, numbers).items():
        if node in evaluation[1].values and node not in evaluation[1].live:
            found.setdefault(number, []).append(node)
    mine = _numbered(*training, numbers)
    return {node: found[n] for node, n in mine.items() if n in found and node not in training[1].live}


def _numbered(traced: Traced, observer: Observer, numbers: dict[str, int]) -> dict[fx.Node, int]:
    """Each operation's number; those that do the same with the same have the same."""
    found: dict[fx.Node, int] = {}
    for node in traced.nodes:
        if node in observer.same:
            found[node] = found[observer.same[node]]
        else:
            text = text_of_node(node, traced.shell, found)
            found[node] = numbers.setdefault(text, len(numbers))
    return found
