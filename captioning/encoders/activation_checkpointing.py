"""Splits a traced network into segments for activation checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174).

Letters: S pixels per side.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp


def checkpoint_segments(body: fx.GraphModule, photo: Tensor) -> list[fx.GraphModule]:
    """Split the body into a chain of segments that share its modules: body(x) = segments[-1](... segments[0](x)).

    photo: (1, 3, S, S) float32, to measure the activations. The body can be cut wherever a single tensor carries all
    information. Of those n cuts about sqrt(n) are used, with equal activation memory per segment: this balances the
    activations that are stored with those that are recomputed at a time.
    """
    ShapeProp(body).propagate(photo)
    nodes = [node for node in body.graph.nodes if node.op != "output"]
    sizes = torch.tensor([_num_elements(node) for node in nodes]).cumsum(0)
    cuts = _find_cuts(body, nodes)
    count = max(1, math.isqrt(len(cuts)))
    ends = set()
    for segment in range(1, count):
        target = sizes[-1] * segment / count
        ends.add(min(cuts, key=lambda cut: abs(sizes[cut] - target)))
    starts = [1, *(end + 1 for end in sorted(ends)), len(nodes)]  # node 0 is the input
    return [_segment(body, nodes[start - 1], nodes[start:end]) for start, end in pairwise(starts)]


def _num_elements(node: fx.Node) -> int:
    output = node.meta.get("tensor_meta")
    return math.prod(getattr(output, "shape", [0]))  # nodes that return no tensor count as empty


def _find_cuts(body: fx.GraphModule, nodes: list[fx.Node]) -> list[int]:
    """The nodes after which only their own output is still needed, and is not overwritten in place."""
    position = {node: index for index, node in enumerate(nodes)}
    cuts = []
    last_use = 0  # of any output of an earlier node
    for index, node in enumerate(nodes[:-1]):
        if index and last_use <= index and not any(_is_in_place(body, user) for user in node.users):
            cuts.append(index)
        last_use = max([last_use, *(position.get(user, len(nodes)) for user in node.users)])
    return cuts


def _is_in_place(body: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node overwrites its input, which recomputation needs."""
    if node.op == "call_module":
        return getattr(body.get_submodule(str(node.target)), "inplace", False)
    name = getattr(node.target, "__name__", str(node.target))
    return name in ("iadd", "imul") or name.endswith("_") or bool(node.kwargs.get("inplace"))


def _segment(body: fx.GraphModule, before: fx.Node, nodes: list[fx.Node]) -> fx.GraphModule:
    """The nodes as a separate module, whose input replaces `before`."""
    graph = fx.Graph()
    copies = {before: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(body, graph)
