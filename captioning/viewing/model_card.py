"""The README.md of a packed run: a model card with the metadata that model hubs read."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from captioning.decoders import decoders_with
from captioning.encoders.protocol import find_family
from captioning.evaluation.metrics import METRICS
from captioning.runtime.checkpoint import trained_views
from captioning.runtime.log import best_epoch
from captioning.runtime.settings import as_flag
from captioning.search.options import SearchOptions
from captioning.training.options import DECODER_SETTINGS, TrainingOptions
from captioning.viewing import NOT_LEARNT
from preprocess.vocabulary import Vocabulary

LANGUAGE_NAMES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "th": "Thai"}
UNKNOWN_LICENCE = "not known to Kantu; write it here before you publish this folder"


class CardSources(NamedTuple):
    """What a card is written from."""

    name: str  # of the packed run
    checkpoint: dict[str, Any]
    log: Sequence[dict[str, Any]]  # the events of log.jsonl; empty if there is none
    scores: dict[str, Any] | None  # the content of a file of generate.py --scores
    example: str | None  # a sentence on example.png; None if there is none


def model_card(sources: CardSources) -> str:
    """The card as Markdown. Raises UserError if the encoder's library is not installed."""
    vocabulary = Vocabulary.from_dict(sources.checkpoint["vocabulary"])
    sections = [
        _front_matter(sources, vocabulary),
        _introduction(sources, vocabulary),
        _use(sources.name),
        _data(sources, vocabulary),
        _encoder(sources.checkpoint["encoder"]),
        _training(sources),
        _scores(sources),
        _limits(sources, vocabulary),
    ]
    return "\n\n".join(sections) + "\n"


def train_command(config: dict[str, Any], run: str) -> str:
    """The command that trains such a run: config, its settings as plain data, without those that are defaults."""
    learnt = {
        name: value
        for name, value in config.items()
        if name not in NOT_LEARNT and (name not in DECODER_SETTINGS or config["decoder"] in decoders_with(name))
    }
    data = shlex.quote(str(config.get("data", "DATA")))
    return " ".join(["python train.py", data, "--run", shlex.quote(run), *_flags(TrainingOptions, learnt)])


def encoder_licence(encoder: dict[str, Any]) -> str:
    """What is known of the licence of an encoder's weights. encoder: its recipe, as a checkpoint has it."""
    source = encoder["weights"].partition(",")[0]  # "SOURCE, fine-tuned in RUN"
    if source == "random":
        return "none of others: it was trained from random weights with this run"
    family, name = find_family(encoder["name"])
    if source != family.published:
        return UNKNOWN_LICENCE
    return family.licence(name) or UNKNOWN_LICENCE


def _flags(options: type, settings: dict[str, Any]) -> list[str]:
    """The flags of the settings that differ from the defaults of `options`, a dataclass."""
    flags: list[str] = []
    for field in dataclasses.fields(options):
        value = settings.get(field.name)
        if value is not None and value != field.default:
            flags += map(shlex.quote, as_flag(field.name, value))
    return flags


def _front_matter(sources: CardSources, vocabulary: Vocabulary) -> str:
    lines = [
        "---",
        "library_name: kantu",
        "pipeline_tag: image-to-text",
        f"language: {vocabulary.language}",
        f"tags: [image-captioning, {sources.checkpoint['decoder']['name']}]",
        "---",
    ]
    return "\n".join(lines)


def _introduction(sources: CardSources, vocabulary: Vocabulary) -> str:
    encoder, decoder = sources.checkpoint["encoder"]["name"], sources.checkpoint["decoder"]["name"]
    language = LANGUAGE_NAMES.get(vocabulary.language, vocabulary.language)
    picture = (
        f"\n\n![A photo, its caption and its words](example.png)\n\n*{sources.example}*" if sources.example else ""
    )
    return (
        f"# {sources.name}\n\nCaptions photos in {language}: the decoder `{decoder}` of Kantu on the encoder "
        f"`{encoder}`.{picture}"
    )


def _use(name: str) -> str:
    folder = shlex.quote(name)
    return f"""## Use

In a checkout of Kantu, with safetensors (`pip install -c constraints.txt -e '.[hub]'`), beside this folder:

```bash
python generate.py {folder} photo.jpg
python -m captioning.export {folder} --out {folder}-onnx
```

```python
from captioning.captioner import Captioner

print(Captioner.load({name!r}).caption("photo.jpg").text)
```

`sha256sum -c SHA256SUMS` checks the files. Nothing in this folder is a pickle."""


def _data(sources: CardSources, vocabulary: Vocabulary) -> str:
    config = sources.checkpoint["config"]
    start = _start_event(sources)
    photos = ""
    if "train_photos" in start:
        photos = f"{start['train_photos']:,} photos to train on and {start['val_photos']:,} to validate; "
    views = ", ".join(trained_views(sources.checkpoint))
    return (
        f"## Data\n\n`{config.get('data', 'unknown')}`: {photos}{len(vocabulary):,} words, of captions split by "
        f"{vocabulary.tokenizer_text}, that occur at least {vocabulary.min_count} times. Views of each photo: {views}. "
        "The licence of photos and captions is that of their source, which Kantu does not know."
    )


def _encoder(encoder: dict[str, Any]) -> str:
    transform = encoder["transform"]
    size = transform["image_size"]
    return f"""## Encoder

| | |
|---|---|
| network | `{encoder["name"]}` |
| weights | {encoder["weights"]} |
| licence of the weights | {encoder_licence(encoder)} |
| photos | resized to {size} x {size} pixels without cropping, {transform.get("interpolation", "bilinear")} |
| sha256 of its state | `{encoder["sha256"]}` |"""


def _training(sources: CardSources) -> str:
    config, name = sources.checkpoint["config"], shlex.quote(sources.name)
    commands = [train_command(config, f"{sources.name}-again")]
    if not config.get("fine_tune"):  # the cached features are those of this encoder
        data = shlex.quote(str(config.get("data", "DATA")))
        commands.insert(0, f"python extract_features.py {data} --weights {name}")
    epoch = sources.checkpoint["progress"].get("epoch", "unknown")
    average = f", averaged with decay {config['ema_decay']}" if config.get("ema_decay") else ""
    start = _start_event(sources)
    machine = f" Torch {start['versions']['torch']}, {start['device']}, {start['precision']}." if start else ""
    return "\n".join(
        ["## Training", "", "```bash", *commands, "```", "", f"The weights are of epoch {epoch}{average}.{machine}"]
    )


def _start_event(sources: CardSources) -> dict[str, Any]:
    """The first event of the log; empty if there is none."""
    return next((event for event in sources.log if event["event"] == "start"), {})


def _scores(sources: CardSources) -> str:
    if sources.scores:
        return f"## Scores\n\n{_score_table(sources.scores, sources.name)}"
    best = best_epoch(sources.log)
    if not best:
        return "## Scores\n\nNone were recorded: the run was packed without a log and without `--scores`."
    return (
        f"## Scores\n\nOn {best['scored']:,} **validation** photos, which also chose the epoch; greedy captions, by "
        f"word, times 100, without intervals: BLEU-4 {best['BLEU-4']:.1f}, CIDEr-D {best['CIDEr-D']:.1f}."
    )


def _score_table(scores: dict[str, Any], name: str) -> str:
    rows = []
    for protocol, intervals in scores["intervals"].items():
        cells = [
            f"{scores[protocol][metric]:.1f} ({low:.1f} to {high:.1f})" for metric, (low, high) in intervals.items()
        ]
        rows.append(f"| by {protocol} | {' | '.join(cells)} |")
    data = shlex.quote(str(scores.get("data", "DATA")))
    settings = _flags(SearchOptions, scores.get("search", {}))
    split = scores.get("split", "val")
    command = ["python generate.py", shlex.quote(name), "--data", data, "--split", split, *settings]
    return "\n".join(
        [
            f"On {scores['photos']:,} photos of the split **{split}** of `{data}`, tokenizer {scores['tokenizer']}; "
            "times 100, BLEU without smoothing, 95 % intervals of 1,000 bootstrap resamples of the photos:",
            "",
            f"| | {' | '.join(METRICS)} |",
            "|---" * (len(METRICS) + 1) + "|",
            *rows,
            "",
            "```bash",
            " ".join([*command, "--scores scores.json"]),
            "```",
        ]
    )


def _limits(sources: CardSources, vocabulary: Vocabulary) -> str:
    return (
        "## Limits\n\n"
        f"- It writes the {len(vocabulary):,} words of its vocabulary and no others: no names, no text in the photo.\n"
        "- Captions resemble those of its data. They repeat what is common there, also its errors and prejudices,\n"
        "  and say it with the same confidence of photos of another kind.\n"
        "- A caption may name what is not in the photo. Attention shows which cells were read, not why.\n"
        "- Do not rely on it where a wrong description may harm someone."
    )
