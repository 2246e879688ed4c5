"""A classifier's own graph (torch.fx), cut where a caption's decoder wants it.

ResNets, MobileNets, VGG, Inception, ConvNeXt and the rest need no code of their own. `resnet18.layer3` cuts earlier,
after that layer: a finer, cheaper map.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torchvision import models

from captioning.errors import UserError
from captioning.runtime.signals import defer_signals

POOLINGS = ("adaptive_avg_pool2d", "mean")  # how torchvision's classifiers pool, as a function or a method


def truncate_classifier(name: str) -> fx.GraphModule:
    """The classifier's graph up to the input of its last pooling, or up to the end of a named layer."""
    model_name, _, layer = name.partition(".")
    if model_name not in models.list_models(module=models):
        raise UserError(
            f"--encoder {model_name}: not a torchvision classifier; for example resnet101, mobilenet_v2, vgg16"
        )
    # Inception and GoogLeNet: their published weights want inputs in -1..1, which they make themselves when told
    extra = {"transform_input": True, "init_weights": True} if model_name in ("inception_v3", "googlenet") else {}
    model = models.get_model(model_name, weights=None, **extra).eval()
    with defer_signals():
        try:
            graph = fx.symbolic_trace(model).graph
        except Exception:
            raise UserError(
                f"--encoder {model_name}: its graph cannot be traced; try resnet101 or mobilenet_v2"
            ) from None
    last = _end_of_layer(graph, layer) if layer else _before_last_pooling(graph, model)
    if last is None:
        choices = ", ".join(child for child, _ in model.named_children())
        wanted = f"no layer {layer!r} (it has {choices})" if layer else "does not end in a pooled spatial map"
        raise UserError(f"--encoder {name}: {wanted}; try resnet101 or mobilenet_v2")
    for node in reversed(graph.nodes):
        if node.op == "output":
            graph.erase_node(node)
            break
    graph.output(last)
    graph.eliminate_dead_code()
    body = fx.GraphModule(model, graph)
    body.delete_all_unused_submodules()
    return body.to(memory_format=torch.channels_last)


def _before_last_pooling(graph: fx.Graph, model: nn.Module) -> fx.Node | None:
    for node in reversed(graph.nodes):
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        called = getattr(node.target, "__name__", node.target) if node.op.startswith("call_") else None
        if isinstance(module, nn.AdaptiveAvgPool2d) or called in POOLINGS:
            return node.args[0]
    return None


def _end_of_layer(graph: fx.Graph, layer: str) -> fx.Node | None:
    inside = [
        node
        for node in graph.nodes
        if layer in dict(node.meta.get("nn_module_stack", {}))
        or any(path == layer for path, _ in node.meta.get("nn_module_stack", {}).values())
    ]
    return inside[-1] if inside else None


def checkpoint_segments(body: fx.GraphModule, photo: Tensor) -> list[fx.GraphModule]:
    """The body as a chain of pieces that share its modules: body(x) = last(... first(x)). photo (1, 3, S, S) float32.

    Of the places where one tensor alone passes, about the square root of their number are taken, with as many
    activations in each piece: what is kept and what is computed anew at a time are then both small (Chen et al. 2016).
    """
    ShapeProp(body).propagate(photo)
    nodes = [node for node in body.graph.nodes if node.op != "output"]
    sizes = torch.tensor([_elements(node) for node in nodes]).cumsum(0)
    cuts = _single_tensors(body, nodes)
    pieces = max(1, math.isqrt(len(cuts)))
    ends = {min(cuts, key=lambda cut: abs(sizes[cut] - sizes[-1] * piece / pieces)) for piece in range(1, pieces)}
    begins = [1, *(end + 1 for end in sorted(ends)), len(nodes)]  # node 0 is the input
    return [_piece(body, nodes[begin - 1], nodes[begin:end]) for begin, end in pairwise(begins)]


def _elements(node: fx.Node) -> int:
    made = node.meta.get("tensor_meta")
    return math.prod(made.shape) if hasattr(made, "shape") else 0


def _single_tensors(body: fx.GraphModule, nodes: list[fx.Node]) -> list[int]:
    """The places after which only that node's own output is still needed, and nobody overwrites it."""
    position = {node: place for place, node in enumerate(nodes)}
    found, reach = [], 0  # reach: the last use of anything made before
    for place, node in enumerate(nodes[:-1]):
        if place and reach <= place and not any(_works_in_place(body, user) for user in node.users):
            found.append(place)
        reach = max([reach, *(position.get(user, len(nodes)) for user in node.users)])
    return found


def _works_in_place(body: fx.GraphModule, node: fx.Node) -> bool:
    """Would this node overwrite its input, which must be kept for the second computation?"""
    if node.op == "call_module":
        return getattr(body.get_submodule(node.target), "inplace", False)
    name = getattr(node.target, "__name__", str(node.target))
    return name in ("iadd", "imul") or name.endswith("_") or bool(node.kwargs.get("inplace"))


def _piece(body: fx.GraphModule, before: fx.Node, nodes: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {before: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(body, graph)
