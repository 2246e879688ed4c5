"""The curves of a run, read from the events of its log.jsonl. Everything that plots runs shows these."""

from __future__ import annotations

import collections
from typing import NamedTuple

MAX_POINTS = 600  # per curve, to bound the size of a page


class Source(NamedTuple):
    """Where a curve comes from: a key of an event in log.jsonl."""

    name: str
    event: str
    key: str
    factor: float = 1

    def of_epochs(self) -> Source:
        """The same quantity in epoch events: of a step event's key, its mean over the epoch."""
        key = f"train_{self.key}" if self.key in ("loss", "reward") else self.key
        return self._replace(event="epoch", key=key)

    def points(self, events: list[dict]) -> list[tuple[dict, float]]:
        """The events that have a value, each with it."""
        return [
            (event, self.factor * event[self.key])
            for event in events
            if event["event"] == self.event and self.key in event
        ]


class Curve(NamedTuple):
    """A curve of a plot."""

    name: str
    x: list[float]  # epochs, and fractions of them
    y: list[float]


PLOTS = {  # title -> its curves
    "loss": [Source("train", "step", "loss"), Source("validation", "epoch", "val_loss")],
    "reward: CIDEr-D of sampled captions": [Source("train", "step", "reward")],
    "scores of generated captions": [Source("BLEU-4", "epoch", "BLEU-4"), Source("CIDEr-D", "epoch", "CIDEr-D")],
    "top-5 accuracy, %": [Source("validation", "epoch", "top5", 100)],
    "captions per second": [Source("train", "step", "captions_per_second")],
    "waiting for data, %": [Source("train", "step", "waiting", 100)],
    "learning rate": [
        Source("decoder", "epoch", "learning_rate"),
        Source("encoder", "epoch", "encoder_learning_rate"),
    ],
}


def curves(events: list[dict], title: str) -> list[Curve]:
    """The curves of a plot that have points."""
    return [curve for curve in (read_curve(events, source) for source in PLOTS[title]) if curve.x]


def read_curve(events: list[dict], source: Source) -> Curve:
    """Read a curve from the events, thinned to at most MAX_POINTS; the last point always stays.

    Runs whose epochs take only seconds have fewer step events than epochs: they show the mean of each epoch.
    """
    count = collections.Counter(event["event"] for event in events)
    if source.event == "step" and count["step"] < count["epoch"]:
        source = source.of_epochs()
    points = [(_position(event), value) for event, value in source.points(events)]
    stride = max(1, -(-len(points) // MAX_POINTS))
    points = points[::-stride][::-1]
    return Curve(source.name, [x for x, _ in points], [y for _, y in points])


def _position(event: dict) -> float:
    """The epochs finished at an event."""
    if event["event"] == "step":
        return event["epoch"] - 1 + event["step"] / event["of"]
    return event["epoch"]
