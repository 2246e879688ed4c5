"""The settings of a training run that depend on its device and its decoder, and what --help says of them."""

import inspect
import re

import pytest

from captioning.decoders import DECODERS
from captioning.errors import UserError
from captioning.training.options import COMMON_DEFAULTS, GPU_DEFAULTS, PUBLISHED_DEFAULTS, Defaults, TrainingOptions
from config import Train


def defaults_of(options):
    return Defaults(*(getattr(options, name) for name in Defaults._fields))


@pytest.mark.parametrize(
    "device, given, expected",
    [
        ("cpu", {}, COMMON_DEFAULTS),
        ("mps", {}, COMMON_DEFAULTS),
        ("cuda", {}, GPU_DEFAULTS),
        ("cuda", {"batch_size": 32}, COMMON_DEFAULTS),
        ("cuda", {"batch_size": 100}, COMMON_DEFAULTS._replace(batch_size=100)),
        ("cuda", {"learning_rate": 1e-3}, GPU_DEFAULTS._replace(learning_rate=1e-3)),
        ("cuda", {"fine_tune": True}, COMMON_DEFAULTS),
        ("cuda", {"objective": "cider", "start_from": "run"}, COMMON_DEFAULTS),
        ("cuda", {"warmup_epochs": 0.0}, GPU_DEFAULTS._replace(warmup_epochs=0.0)),
        ("cpu", {"batch_size": 512, "learning_rate": 2e-3, "warmup_epochs": 2}, Defaults(512, 2e-3, 2)),
    ],
)
def test_a_gpu_has_a_larger_default_batch_and_the_published_one_is_one_flag(device, given, expected):
    options = Train("data", "run", **given).for_device(device)
    assert defaults_of(options) == expected
    assert options.for_device("cpu") == options, "what is decided stays"


@pytest.mark.parametrize("decoder", PUBLISHED_DEFAULTS)
def test_a_decoder_with_published_defaults_has_them_on_every_device(decoder):
    published = PUBLISHED_DEFAULTS[decoder]
    for device in ("cpu", "cuda"):
        assert defaults_of(Train("data", "run", decoder=decoder).for_device(device)) == published
        larger = Train("data", "run", decoder=decoder, batch_size=512).for_device(device)
        assert defaults_of(larger) == published._replace(batch_size=512), "what is given does not change the rest"
    cider = Train("data", "run", decoder=decoder, objective="cider", start_from="run").for_device("cuda")
    assert defaults_of(cider) == COMMON_DEFAULTS, "they are those of cross entropy"


def test_help_names_the_default_of_every_decoder():
    """Such as (512; updown 1000, xlan 1024): the first is that of all decoders that are not named."""
    source = inspect.getsource(TrainingOptions)
    seen = 0
    for name in (field for field in Train.__dataclass_fields__ if getattr(Train, field, 0) is None):
        values = {decoder: default for decoder in DECODERS if (default := default_of(decoder, name)) is not None}
        if not values:
            continue
        seen += 1
        said = defaults_in(comment_of(source, name))
        for decoder, value in values.items():
            assert said.get(decoder, said[""]) == (f"{value:g}" if isinstance(value, float) else str(value)), name
        assert set(said) <= {"", *values}, name
    assert seen == 13


def test_a_decoder_of_ones_own_has_the_settings_that_its_constructor_takes(monkeypatch):
    def own_decoder(vocabulary_size, channels, layers=2): ...

    monkeypatch.setitem(DECODERS._entries, "own", own_decoder)
    assert Train("data", "run", decoder="own", layers=3).layers == 3
    with pytest.raises(UserError, match="^--layers requires --decoder lstm, transformer or own$"):
        Train("data", "run", layers=3)
    with pytest.raises(UserError, match="^--heads requires --decoder transformer, xlan or aoa$"):
        Train("data", "run", decoder="own", heads=3)


def default_of(decoder, setting):
    """What a new run has on a CPU: by default, or by its decoder's constructor; None if neither says so."""
    options = Train("data", "run", decoder=decoder).for_device("cpu")
    parameters = inspect.signature(DECODERS[decoder]).parameters
    return parameters[setting].default if setting in parameters else getattr(options, setting)


def comment_of(source, field):
    """The comment of a field of TrainingOptions: on its line, or on those above."""
    above, after = re.search(rf"((?:    # .*\n)*)    {field}: [^#\n]*(#.*)?\n", source).groups()
    return re.sub(r"\s*# ", " ", above + (after or ""))


def defaults_in(comment):
    """The last parentheses of a comment: decoder -> default, and "" -> that of the others."""
    first, _, rest = re.findall(r"\(([^()]*)\)", comment)[-1].partition("; ")
    said = {"": first}
    for names, value in re.findall(r"((?:[a-z-]+(?:, | and ))*[a-z-]+) ([\w.-]+)", rest):  # such as: xlan and aoa 1024
        said |= dict.fromkeys(re.split(", | and ", names), value)
    return said
