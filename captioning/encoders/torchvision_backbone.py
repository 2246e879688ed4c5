"""torchvision's classifiers as encoders, truncated before their last pooling with torch.fx.

ResNet, MobileNet, VGG, Inception, ConvNeXt and others need no special code. `resnet18.layer3` truncates earlier,
after that layer, for a finer map at a lower cost.

torchvision's `create_feature_extractor` is not used: it takes the names of nodes, and the input of the last
pooling must be found in the same graph anyway; its module returns a dict and holds two graphs, where
activation checkpointing needs one that returns a tensor.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx, nn
from torchvision import models

from captioning.encoders.protocol import BodyOptions, EncoderFamily, no_class_vector, suggest
from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from captioning.runtime.signals import defer_signals

POOLINGS = ("adaptive_avg_pool2d", "mean")  # the functions and methods that torchvision's classifiers pool with
TRANSFORMS_INPUT = ("inception_v3", "googlenet")  # their published weights expect inputs in -1..1
OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


class TorchvisionFamily(EncoderFamily):
    """See captioning.encoders.protocol.EncoderFamily."""

    def licence(self, name: str) -> str:
        """torchvision grants none of its own for weights, beside that of its code."""
        return (
            "published with torchvision, whose code is BSD-3-Clause; trained on ImageNet, whose own terms are for "
            "research that is not commercial"
        )

    def build(self, name: str, options: BodyOptions) -> fx.GraphModule:
        """The truncated classifier `name`, or NAME.LAYER. Raises UserError like `truncate_classifier`."""
        if options.class_vector:
            raise no_class_vector(name)
        if options.drop_path:
            raise UserError(f"--drop-path {options.drop_path}: requires a timm/ encoder, not {name}; leave it out")
        return truncate_classifier(name)

    def published_weights(self, name: str, options: BodyOptions) -> dict[str, Tensor]:
        """The first ImageNet weights that torchvision published, which the papers use, from torch.hub's cache.

        Raises UserError if they cannot be downloaded.
        """
        weights = next(iter(models.get_model_weights(name.partition(".")[0])))
        try:
            return weights.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            message = f"{weights.url}: cannot be downloaded ({reason(error)}); download it and pass --weights FILE"
            raise UserError(message) from None

    def convert(self, state: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
        """Rename DenseNets' entries of before 2017, which torchvision's own files still have: norm.1 is norm1."""
        return {OLD_DENSENET_NAME.sub(r"\1", name): value for name, value in state.items()}


def truncate_classifier(name: str) -> fx.GraphModule:
    """The classifier's graph up to the input of its last pooling, or up to the end of a named layer.

    Raises UserError for an unknown classifier or layer, and for one that cannot be traced or has no pooled map.
    """
    model_name, _, layer = name.partition(".")
    model = _build_classifier(model_name)
    graph = _trace(model, model_name)
    end = _end_of_layer(graph, layer) if layer else _input_of_last_pooling(graph, model)
    if end is None:
        layers = ", ".join(child for child, _ in model.named_children())
        problem = f"no layer {layer!r} (it has {layers})" if layer else "does not end in a pooled spatial map"
        raise UserError(f"--encoder {name}: {problem}; try resnet101 or mobilenet_v2")
    return _truncate(model, graph, end)


def _build_classifier(model_name: str) -> nn.Module:
    known = models.list_models(module=models)
    if model_name not in known:
        advice = suggest(model_name, known, "", "for example resnet101, mobilenet_v2, vgg16, or timm/NAME")
        raise UserError(f"--encoder {model_name}: not a torchvision classifier; {advice}")
    extra = {"transform_input": True, "init_weights": True} if model_name in TRANSFORMS_INPUT else {}
    return models.get_model(model_name, weights=None, **extra).eval()


def _trace(model: nn.Module, model_name: str) -> fx.Graph:
    with defer_signals():
        try:
            return fx.symbolic_trace(model).graph
        except Exception:
            raise UserError(
                f"--encoder {model_name}: its graph cannot be traced; try resnet101 or mobilenet_v2"
            ) from None


def _input_of_last_pooling(graph: fx.Graph, model: nn.Module) -> fx.Node | None:
    for node in reversed(graph.nodes):
        if node.op == "call_module":
            is_pooling = isinstance(model.get_submodule(node.target), nn.AdaptiveAvgPool2d)
        elif node.op in ("call_function", "call_method"):
            is_pooling = getattr(node.target, "__name__", node.target) in POOLINGS
        else:
            is_pooling = False
        if is_pooling:
            return node.args[0]
    return None


def _end_of_layer(graph: fx.Graph, layer: str) -> fx.Node | None:
    """The last node that was traced inside the layer."""
    end = None
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        if layer in stack or any(path == layer for path, _ in stack.values()):
            end = node
    return end


def _truncate(model: nn.Module, graph: fx.Graph, end: fx.Node) -> fx.GraphModule:
    """A module that returns the value of `end`, without the modules that it does not need."""
    (output,) = [node for node in graph.nodes if node.op == "output"]
    graph.erase_node(output)
    graph.output(end)
    graph.eliminate_dead_code()
    body = fx.GraphModule(model, graph)
    body.delete_all_unused_submodules()
    return body.to(memory_format=torch.channels_last)
