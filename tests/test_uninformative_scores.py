"""A validation score that says nothing about the captions neither chooses the checkpoint nor ends the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train
from captioning.runtime.checkpoint import load_checkpoint
from captioning.training.cider_reward import CiderReward
from captioning.training.run_state import Progress
from config import Train
from preprocess.captions import read_captions, write_captions
from tests.small import QUICK, log_of

DATA = Path("data/small")
FEATURES = (DATA / "features.h5",)
SAME = (("a", "red", "square", "on", "blue"),)


def change_captions(folder, change):
    """A copy of data/small whose photos are changed; None leaves a photo out."""
    data = folder / "changed"
    data.mkdir()
    photos = [replace(photo, image=str(Path(photo.image).absolute())) for photo in read_captions(DATA)]
    write_captions(data / "captions.jsonl", filter(None, map(change, photos)))
    (data / "vocab.json").write_bytes((DATA / "vocab.json").read_bytes())
    return data


def only_one_val_photo(photo):
    return photo if photo.split == "train" or photo.id == "photo5" else replace(photo, split="test")


def three_words(photo):
    return replace(photo, captions=tuple(words[:3] for words in photo.captions))


@pytest.mark.parametrize(
    "change, best_metric, reason",
    [
        (only_one_val_photo, "cider", "by how few photos they describe, and there is only one photo"),
        (three_words, "bleu4", "BLEU-4 of val says nothing about the captions: no reference has four words"),
    ],
)
def test_a_run_whose_score_says_nothing_keeps_the_epoch_of_the_lowest_loss_and_goes_on(
    here, tmp_path, capsys, change, best_metric, reason
):
    run = f"says nothing {change.__name__}"
    data = change_captions(tmp_path, change)
    train.main(Train(data, run, epochs=3, patience=1, best_metric=best_metric, features=FEATURES, **QUICK))
    epochs, output = log_of(run), capsys.readouterr().out
    losses = [epoch["val_loss"] for epoch in epochs]
    assert len(losses) == 3 and load_checkpoint(Path("checkpoints") / run)["progress"]["epoch"] == 1 + np.argmin(losses)
    assert [epoch["best"] for epoch in epochs] == [loss < min([9, *losses[:i]]) for i, loss in enumerate(losses)]
    assert output.count(f"{reason}; best.pt is chosen by the val loss, and --patience does not count") == 1


def test_of_equal_scores_the_lower_loss_is_the_best_but_patience_counts_them():
    progress = Progress()
    assert progress.update_best(0.0, loss=3.0)
    assert progress.update_best(0.0, loss=2.0) and progress.epochs_without_better == 1
    assert not progress.update_best(0.0, loss=2.5) and progress.epochs_without_better == 2
    assert progress.update_best(1.0, loss=9.0) and progress.epochs_without_better == 0
    assert not progress.update_best(0.5, loss=1.0) and progress.epochs_without_better == 1


def test_a_score_that_says_nothing_counts_as_0_and_patience_does_not_count_it():
    progress = Progress()
    assert progress.update_best(3.0, loss=3.0, informative=False) and progress.best == 0
    assert progress.update_best(2.0, loss=2.0, informative=False)
    assert not progress.update_best(9.0, loss=2.5, informative=False)
    assert progress.epochs_without_better == 0
    assert progress.update_best(0.1, loss=5.0) and progress.best == 0.1


def test_the_best_epoch_of_an_older_checkpoint_gives_way_to_one_of_the_same_score():
    saved = {"epoch": 1, "best": 0.0, "epochs_without_better": 0}
    assert Progress(**saved).update_best(0.0, loss=2.0, informative=False)


def test_cider_optimisation_says_at_its_start_that_every_reward_will_be_0(here, tmp_path, capsys):
    data = change_captions(tmp_path, lambda photo: replace(photo, captions=SAME))
    settings = {"objective": "cider", "start_from": Path("checkpoints/attention"), "features": FEATURES, **QUICK}
    train.main(Train(data, "no reward", epochs=1, **settings))
    assert "every reward will be 0: CIDEr-D weighs words by how few photos" in capsys.readouterr().out


def test_cider_optimisation_says_once_that_every_reward_was_0(here, monkeypatch, capsys):
    monkeypatch.setattr(CiderReward, "__call__", lambda self, photos, captions: np.zeros(len(photos)))
    settings = {"objective": "cider", "start_from": Path("checkpoints/attention"), "samples": 2, **QUICK}
    train.main(Train(DATA, "all rewards 0", epochs=2, val_photos=1, **settings))
    output = capsys.readouterr().out
    assert output.count("every reward of an epoch was 0, so it taught the decoder nothing") == 1
    assert [epoch["train_reward"] for epoch in log_of("all rewards 0")] == [0, 0]
