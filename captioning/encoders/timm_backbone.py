"""timm's networks as encoders: `--encoder timm/NAME` or `timm/NAME.TAG`, where TAG names published weights.

CNNs of any stride, vision transformers (CLIP, SigLIP, DINOv2 and v3, EVA, BEiT), Swin and other hierarchical
transformers need no special code. A transformer's patch tokens are the cells; class and register tokens are left out.
Its cells are normalised: where timm averages before the last norm (`fc_norm`), that norm is applied to each token,
as in these networks' masked-image pre-training.

Mean, std, interpolation and size of the photos come from timm's configuration of the weights.

Letters: B photos, S pixels per side, C channels, h x w native cells, N = h w.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captioning.encoders.images import Transform
from captioning.encoders.protocol import BODY_PREFIX, BodyOptions, EncoderFamily, no_class_vector, suggest
from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from captioning.runtime.quiet import quiet

try:
    import timm
except ImportError:
    raise UserError("--encoder timm/NAME: timm is not installed; run: pip install -e '.[timm]'") from None

NOISY = ("timm", "huggingface_hub")  # they warn of entries that are left out on purpose, and of an absent network
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of a network's weights, the preferred one first
# What timm raises for sizes and settings that a network cannot have
BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, IndexError, ZeroDivisionError)


class NoSpatialMapError(Exception):
    """The features of a network cannot be arranged as a map. The text says why."""


class TimmFamily(EncoderFamily):
    """See captioning.encoders.protocol.EncoderFamily."""

    published = "pretrained"

    def full_name(self, name: str) -> str:
        """NAME.TAG, with the tag of timm's default weights unless the name has one. Raises UserError."""
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            advice = suggest(architecture, timm.list_models(), "timm/", "timm.list_models() lists them")
            raise UserError(f"--encoder timm/{name}: not a network of timm {timm.__version__}; {advice}")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            known = f"it has {', '.join(sorted(tags))}" if tags else "leave the tag out"
            raise UserError(f"--encoder timm/{name}: timm knows no weights {tag!r} of {architecture} ({known})")
        default = timm.get_pretrained_cfg(architecture)
        tag = tag or (default.tag if default and default.tag in tags else "")
        return f"{architecture}.{tag}" if tag else architecture

    def transform(self, name: str) -> Transform:
        """The size, mean, std and interpolation of timm's configuration; the whole photo is resized."""
        config = _configuration(name)
        return Transform(
            image_size=config.input_size[-1],
            mean=tuple(config.mean),
            std=tuple(config.std),
            interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",  # timm's default
        )

    def licence(self, name: str) -> str:
        """The licence in timm's configuration, such as apache-2.0."""
        return _configuration(name).license or ""

    def build(self, name: str, options: BodyOptions) -> TimmBody:
        """The network `name` as a body. Raises UserError if it has no spatial map, or for an unsuitable size."""
        outline = _outline(name, options)  # first: it costs no memory, and it finds all mistakes
        body = TimmBody(_create(name, options), options.class_vector, outline.grid_size)
        for parameter in outline.unused:
            owner, _, last = parameter.rpartition(".")
            body.get_submodule(owner).register_parameter(last, None)
        return body.to(memory_format=torch.channels_last)

    def published_weights(self, name: str, options: BodyOptions) -> dict[str, Tensor]:
        """The weights NAME.TAG from the hub's cache, or downloaded to it, fitted to the size of the photos by timm.

        Raises UserError if there are none, or if they cannot be downloaded.
        """
        config = _configuration(name)
        if not config.has_weights:
            raise UserError(f"--encoder timm/{name}: has no published weights; give --weights FILE, or random")
        print(_describe_download(name, config))
        try:
            with quiet(*NOISY):
                _download(config)
                network = _create(name, options, pretrained=True)
        except Exception as error:  # the hub's client and its HTTP library raise many unrelated classes
            source = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise UserError(
                f"--encoder timm/{name}: its weights cannot be downloaded ({reason(error)}); download "
                f"{HUB_FILES[0]} of {source} on another machine, and pass --weights FILE"
            ) from None
        return network.state_dict()

    def convert(self, state: dict[str, Tensor], body: Any) -> dict[str, Tensor]:
        """timm's names for the entries of any release: its own, the authors', or open_clip's.

        Position embeddings and relative position biases of another grid are resampled. timm's `checkpoint_filter_fn`
        does both.
        """
        named = {BODY_PREFIX + name: value for name, value in state.items()}
        wanted = body.state_dict()
        fits = all(name in named and named[name].shape == value.shape for name, value in wanted.items())
        if fits and not self.unexpected(named.keys() - wanted.keys(), body):
            return named
        convert = getattr(sys.modules[type(body.network).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            return named
        with quiet(*NOISY):
            converted = convert(dict(state), body.network)
        return {BODY_PREFIX + name: value for name, value in converted.items() if isinstance(value, Tensor)}

    def unexpected(self, names: Iterable[str], body: Any) -> list[str]:
        """The names below the body's own parts: further blocks, say. Classifiers and text towers lie elsewhere."""
        parts = {name for name, _ in body.network.named_children()}
        used = {name.split(".")[1] for name, _ in body.named_parameters()}
        return [name for name in names if name.split(".")[1] in parts & used]


class TimmBody(nn.Module):
    """A network of timm without its head: photos (B, 3, S, S) -> a map (B, C, h, w), or also class vectors (B, C)."""

    def __init__(self, network: Any, class_vector: bool, grid_size: tuple[int, int] | None = None):
        """grid_size: (h, w), unless the network returns a map. It is checked at the first photo if it is None."""
        super().__init__()
        self.network: Any = network
        self.class_vector = class_vector
        self.grid_size = grid_size

    def forward(self, photos: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """See the class."""
        features = self.network.forward_features(photos)
        if not isinstance(features, Tensor) or features.dim() not in (3, 4):
            raise NoSpatialMapError("its features are not one tensor")
        normalised = features
        if features.dim() == 3 and isinstance(getattr(self.network, "fc_norm", None), nn.Module):
            normalised = self.network.fc_norm(features)
        cells = self._to_map(normalised)
        return (cells, self._class_vector(features, normalised)) if self.class_vector else cells

    def _to_map(self, features: Tensor) -> Tensor:
        """Tokens (B, N, C), or a map in either layout -> (B, C, h, w), without a copy."""
        if features.dim() == 4:
            is_channels_last = str(getattr(self.network, "output_fmt", "NCHW")) == "NHWC"
            return features.permute(0, 3, 1, 2) if is_channels_last else features
        first: int = getattr(self.network, "num_prefix_tokens", 0)
        cells = features[:, first:]
        if self.grid_size is None:
            side = math.isqrt(cells.shape[1])
            self.grid_size = side, side  # photos are squares
        height, width = self.grid_size
        if height * width != cells.shape[1] or cells.shape[1] == 1:
            raise NoSpatialMapError(f"its {cells.shape[1]} tokens are not a square of cells")
        return cells.transpose(1, 2).unflatten(2, self.grid_size)

    def _class_vector(self, features: Tensor, normalised: Tensor) -> Tensor:
        """(B, C): the class token, else what attention pooling makes of the features."""
        if normalised.dim() == 3 and _has_class_token(self.network):
            return normalised[:, 0]
        return self.network.forward_head(features, pre_logits=True)

    def checkpoint_activations(self) -> None:
        """Store only the activations between blocks, and recompute the others in the backward pass.

        Raises UserError if timm cannot do that for this network.
        """
        try:
            self.network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            message = "--checkpoint-activations: timm cannot recompute the activations of this encoder; leave it out"
            raise UserError(message) from None

    def layer_depths(self) -> dict[str, int]:
        """The depth of each parameter, by its name: 0 for the stem, then one per block (CNNs: per stage).

        Raises UserError if timm does not know the order of the network's layers.
        """
        is_transformer = hasattr(self.network, "patch_embed")
        matcher = getattr(self.network, "group_matcher", None)
        if matcher is None:
            raise UserError("--layer-decay: timm does not know the order of this encoder's layers; leave it out")
        group_parameters: Any = timm.models.group_parameters
        patterns = matcher(coarse=not is_transformer)
        depths = group_parameters(self.network, patterns, reverse=True)
        return {BODY_PREFIX + name: depth for name, depth in depths.items()}


class _Outline(NamedTuple):
    """What is known of a body before it is built."""

    grid_size: tuple[int, int] | None  # (h, w) of a transformer's tokens
    unused: list[str]  # the parameters that its outputs do not depend on, such as a classifier's norm


def _outline(name: str, options: BodyOptions) -> _Outline:
    """Run the body on torch's meta device, which computes shapes alone. Raises UserError if it does not suit."""
    size = options.image_size
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        body = TimmBody(_create(name, options), options.class_vector)
        _check_multiple_of_patch(name, body.network, size)
        if options.class_vector and not (_has_class_token(body.network) or _has_attention_pooling(body.network)):
            raise no_class_vector(f"timm/{name}")
        try:
            outputs = body(torch.zeros(1, 3, size, size))
        except NoSpatialMapError as error:
            raise UserError(f"--encoder timm/{name}: has no spatial map ({error}); try timm/resnet50") from None
        except BUILD_ERRORS as error:
            raise _size_error(name, size, error) from None
        cells, *vectors = outputs if options.class_vector else (outputs,)
        if 0 in cells.shape:  # old versions of torch do not raise an error on the meta device
            raise _size_error(name, size, ValueError("it is smaller than a cell"))
        if vectors and vectors[0].shape != cells.shape[:2]:
            raise no_class_vector(f"timm/{name}")
        sum(output.sum() for output in (cells, *vectors)).backward()
    unused = [parameter for parameter, value in body.named_parameters() if value.grad is None]
    return _Outline(body.grid_size, unused)


def _create(name: str, options: BodyOptions, pretrained: bool = False) -> nn.Module:
    """timm's network in eval mode, without its classifier."""
    config = _configuration(name)
    settings: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained}
    if options.drop_path:
        settings["drop_path_rate"] = options.drop_path
    if config.fixed_input_size:
        settings["img_size"] = options.image_size
    try:
        with quiet(*NOISY):
            return timm.create_model(name, **settings).eval()
    except BUILD_ERRORS as error:
        if pretrained:
            raise
        if options.drop_path and "drop_path" in str(error):
            raise UserError(f"--drop-path {options.drop_path}: timm/{name} cannot skip layers; leave it out") from None
        raise _size_error(name, options.image_size, error) from None


def _configuration(name: str) -> Any:
    """timm's configuration of the weights NAME.TAG: size, mean, std, interpolation, source, licence."""
    return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def _size_error(name: str, size: int, error: Exception) -> UserError:
    return UserError(f"--image-size {size}: not possible with timm/{name} ({reason(error)}); leave it out")


def _check_multiple_of_patch(name: str, network: nn.Module, size: int) -> None:
    """Raise UserError, with the nearest sizes, if a transformer would leave pixels at the edges out.

    Some published weights do so at their own size, such as SigLIP's with patches of 14 pixels at 384: that is allowed.
    """
    if size == _configuration(name).input_size[-1]:
        return
    patch_sizes = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    patch = patch_sizes[0] if isinstance(patch_sizes, (tuple, list)) else patch_sizes
    if isinstance(patch, int) and size % patch:
        below = max(patch, size - size % patch)
        raise UserError(
            f"--image-size {size}: not a multiple of the {patch} pixels of a patch of timm/{name}; "
            f"give {below} or {below + patch}"
        )


def _has_class_token(network: nn.Module) -> bool:
    return getattr(network, "cls_token", None) is not None  # the first one; register tokens come after it


def _has_attention_pooling(network: nn.Module) -> bool:
    return any("attentionpool" in type(module).__name__.lower() for module in network.modules())


def _describe_download(name: str, config: Any) -> str:
    """One line that says which weights are read or downloaded, their size and their licence."""
    licence = f"licence {config.license}" if config.license else "licence not known to timm"
    if _is_cached(config):
        return f"timm/{name}: published weights, {licence}, from the hub's cache"
    with torch.device("meta"), quiet(*NOISY):
        parameters = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    size = f"about {4 * parameters / 1e6:,.0f} MB"  # the hub's files are float32, with few exceptions
    return f"timm/{name}: downloading its published weights, {licence}, {size}, to the hub's cache"


def _download(config: Any) -> None:
    """Download the preferred file of the hub. Without a network this fails at once; timm would try every file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not config.hf_hub_id:
        return
    try:
        hf_hub_download(config.hf_hub_id, config.hf_hub_filename or HUB_FILES[0])
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:  # timm finds the file that there is instead
        pass


def _is_cached(config: Any) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if not config.hf_hub_id:
        return False
    files = [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES
    return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)
