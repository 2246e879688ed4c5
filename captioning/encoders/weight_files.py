"""Reads --weights FILE: the state dicts that torchvision, timm, DataParallel, Lightning and open_clip write.

A file is read without running code from it: safetensors, or torch.load with weights_only=True.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from captioning.encoders.protocol import BODY_PREFIX, EncoderFamily
from captioning.errors import UserError
from captioning.runtime.checkpoint import load_tensors
from captioning.runtime.library_errors import reason

State = dict[str, Tensor]
CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net")  # keys under which trainers nest weights
# What wrappers put before a network's own names: DataParallel, torch.compile, Lightning modules, open_clip's towers
PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.", "visual.", "trunk.")
REMEDY = "save model.state_dict() there"
MAX_NAMED = 3  # entries that an error message names of each kind


def read_state_dict(path: Path) -> State:
    """The state dict in a .pth, .pt or .safetensors file. Raises UserError if there is none that is safe to read."""
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file or run; give imagenet, pretrained, random, a state-dict file or "
            "checkpoints/RUN"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    saved = load_tensors(path, "a state dict that can be read safely", REMEDY)
    for container in CONTAINERS:
        if isinstance(saved, dict) and isinstance(saved.get(container), dict):
            saved = saved[container]
    state = saved if isinstance(saved, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"--weights {path}: holds no state dict; {REMEDY}")
    return tensors


def _read_safetensors(path: Path) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"--weights {path}: safetensors is not installed; run: pip install -e '.[timm]'") from None
    try:
        return load_file(path)
    except Exception as error:  # its own exception class, or the system's
        raise UserError(f"--weights {path}: not a safetensors file, or damaged ({reason(error)})") from None


def fit_weights(state: State, family: EncoderFamily, body: nn.Module, encoder: str, source: str) -> State:
    """The body's entries from a state dict of its network, in the body's types.

    Wrappers' prefixes are removed and old names replaced; a classifier's entries are left out.
    Raises UserError, naming what does not fit, if the weights are of another network.
    """
    wanted = body.state_dict()
    found = max(_variants(state, family, body), key=lambda variant: len(variant.keys() & wanted.keys()))
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    mismatched = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    unexpected = family.unexpected(found.keys() - wanted.keys(), body)
    shapes = [f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}" for name in mismatched]
    kinds = {"missing": missing, "unexpected": sorted(unexpected), "of other shapes": shapes}
    problems = [_enumerate(kind, names) for kind, names in kinds.items() if names]
    if problems:
        raise UserError(
            f"--weights {source}: not of {encoder} ({'; '.join(problems)}); give the --encoder they belong to"
        )
    # Files from before torch 0.4.1 have no num_batches_tracked.
    return {name: found[name].to(value.dtype) if name in found else value for name, value in wanted.items()}


def _variants(state: State, family: EncoderFamily, body: nn.Module) -> Iterator[State]:
    """The state dict in the body's names, if it has none, one or several of the prefixes."""
    yield {}
    for variant in _without_prefixes(state, len(PREFIXES)):
        try:
            yield family.convert(variant, body)
        except Exception:  # the family's library met entries of another network, or still with a prefix
            continue


def _without_prefixes(state: State, depth: int) -> Iterator[State]:
    """The state dict, and what remains of it below each prefix, recursively."""
    yield state
    for prefix in PREFIXES if depth else ():
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if inside:
            yield from _without_prefixes(inside, depth - 1)


def _enumerate(kind: str, names: list[str]) -> str:
    """Such as "missing: conv1.weight, bn1.weight and 3 more"."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    shown = [name.removeprefix(BODY_PREFIX) for name in names[:MAX_NAMED]]
    return f"{kind}: {', '.join(shown)}{more}"
