"""The methods of training, each through train.py on a small data set."""

from pathlib import Path

import pytest
import torch

import generate
import train
from captioning.captioner import Captioner
from captioning.decoders.attention import AttentionDecoder
from captioning.errors import UserError
from captioning.runtime.checkpoint import load_checkpoint
from captioning.training import objectives
from captioning.training.trainer import Trainer
from config import Generate, Train
from tests.small import TINY, log_of, same, weights

DATA = Path("data/small")
CIDER = {"objective": "cider", "samples": 3, "start_from": Path("checkpoints/attention")}
METHODS = {
    "hard-attention": {"decoder": "hard-attention"},
    "gru": {"decoder": "lstm", "cell": "gru", "layers": 2, "photo_norm": "none"},
    "feature dropout": {"feature_dropout": 0.3},
    "scheduled sampling": {"scheduled_sampling": 0.5, "scheduled_sampling_step": 0.3},
    "schedule": {"schedule": "cosine", "warmup_epochs": 1.5, "weight_decay": 0.1, "label_smoothing": 0.1},
    "tied": {"tie_embeddings": True, "embedding_size": 24, "ema_decay": 0.9},
    "cider": CIDER,
    "self-critical lstm": {
        **CIDER,
        "baseline": "greedy",
        "samples": 1,
        "decoder": "lstm",
        "start_from": Path("checkpoints/lstm"),
    },
    "cider, adaptive": {
        **CIDER,
        "decoder": "adaptive",
        "start_from": Path("checkpoints/adaptive"),
        "grad_accumulation": 2,
    },
    "cider, hard": {**CIDER, "decoder": "hard-attention", "start_from": Path("checkpoints/hard-attention")},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_that_was_killed_resumes_to_the_same_weights(here, method):
    setting = {**TINY, "precision": "float32", "epochs": 2, "preview_photos": 0, **METHODS[method], "save_every": 1e-9}
    train.main(Train(DATA, f"{method} whole", **setting))
    learnt, plain = [], Trainer.learn

    def killed_in_the_second_epoch(self, *batch, **last):
        learnt.append(batch)
        if self.progress.epoch == 1 and self.progress.step == 1:
            raise KeyboardInterrupt
        return plain(self, *batch, **last)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "learn", killed_in_the_second_epoch)
        train.main(Train(DATA, f"{method} parts", **setting))
    train.main(Train(DATA, f"{method} parts", **setting, resume=True))
    assert len(learnt) > 2 and same(weights(f"{method} whole"), weights(f"{method} parts"))
    for key in ("train_loss", "train_reward", "val_loss", "learning_rate", "CIDEr-D"):
        assert log_of(f"{method} whole")[1].get(key) == log_of(f"{method} parts")[1].get(key)


def test_cider_optimisation_raises_the_reward_of_what_is_drawn(here):
    setting = {**TINY, "precision": "float32", "preview_photos": 0, "patience": 99, **CIDER, "samples": 5}
    train.main(Train(DATA, "rewarded", epochs=30, **setting))
    lines = log_of("rewarded")
    rewards = [line["train_reward"] for line in lines]
    assert sum(rewards[-5:]) > 1.25 * sum(rewards[:5])
    assert "train_loss" not in lines[0] and lines[0]["val_loss"] > 0


def test_cider_optimisation_of_a_live_encoder_moves_it_too(here):
    live = {"fine_tune": True, "encoder": "resnet18.layer2", "weights": "random", "image_size": 64, "workers": 0}
    train.main(Train(DATA, "seen live", epochs=1, **live, **TINY))
    start = {"fine_tune": True, "workers": 0, **CIDER, "start_from": Path("checkpoints/seen live")}
    train.main(Train(DATA, "rewarded live", epochs=1, **start, **TINY))
    before, after = (
        load_checkpoint(Path("checkpoints") / run)["encoder"]["state"] for run in ("seen live", "rewarded live")
    )
    assert not torch.allclose(before["layer2.1.conv2.weight"], after["layer2.1.conv2.weight"], atol=1e-5)


def test_words_begin_with_their_vectors_and_stay_where_they_are_frozen(here, capsys):
    words = Captioner.load("checkpoints/attention").vocabulary.words
    lines = [f"{word} {' '.join([str(number)] * 16)}" for number, word in enumerate(words) if number not in (0, 5)]
    Path("vectors.txt").write_text("\n".join(lines))
    setting = {**TINY, "epochs": 1, "word_vectors": Path("vectors.txt")}
    train.main(Train(DATA, "frozen", freeze_embeddings=True, **setting))
    assert (
        f"vectors.txt: {len(words) - 5:,} of the vocabulary's {len(words) - 4:,} words are in it"
        in capsys.readouterr().out
    )
    train.main(Train(DATA, "begun", **setting))
    frozen, begun = (weights(run)["embedding.weight"] for run in ("frozen", "begun"))
    assert frozen[4].tolist() == [4.0] * 16 and frozen[6].tolist() == [6.0] * 16
    assert frozen[[0, 1, 5]].abs().max() <= 0.1, "the others, and the special ones, begin as always"
    assert not torch.equal(begun[4], frozen[4])
    with pytest.raises(UserError, match="--embedding-size 16"):
        train.main(Train(DATA, "wrong", **{**setting, "embedding_size": 12}))


def test_tied_words_are_one_matrix_in_training_and_caption_as_any(here):
    trainer = train.make_trainer(Train(DATA, "none", tie_embeddings=True, **{**TINY, "embedding_size": 24}))
    assert trainer.decoder.output_layer.weight is trainer.decoder.embedding.weight
    train.main(Train(DATA, "tied", tie_embeddings=True, epochs=1, **{**TINY, "embedding_size": 24}))
    decoder = Captioner.load("checkpoints/tied").decoder
    assert torch.equal(decoder.output_layer.weight, decoder.embedding.weight)
    assert not torch.equal(decoder.embedding.weight, trainer.decoder.embedding.weight)


def test_channels_are_dropped_in_training_and_nowhere_else(here, monkeypatch):
    """The small features have no channel that is zero in a whole photo."""
    shares, plain = {True: [], False: []}, AttentionDecoder.init_state

    def noted(self, grid):
        shares[self.training].append((grid.cells == 0).all(1).float().mean().item())
        return plain(self, grid)

    monkeypatch.setattr(AttentionDecoder, "init_state", noted)
    train.main(Train(DATA, "sparse", epochs=4, preview_photos=0, feature_dropout=0.25, **TINY))
    assert max(shares[False]) < 0.02 and min(shares[True]) > 0.1
    assert sum(shares[True]) / len(shares[True]) == pytest.approx(0.25, abs=0.04)


def test_hard_attention_captions_by_argmax_where_asked(here):
    for sees in ("expectation", "argmax"):
        generate.main(Generate(Path("checkpoints/hard-attention"), data=DATA, hard=sees, json=Path(f"{sees}.json")))
    decoder = Captioner.load("checkpoints/hard-attention", sees="argmax").decoder
    assert decoder.sees == "argmax" and type(decoder).sees == "expectation"
    assert Path("argmax.json").read_text()
    with pytest.raises(UserError, match="--hard argmax goes with a run of --decoder hard-attention"):
        generate.main(Generate(Path("checkpoints/attention"), data=DATA, hard="argmax"))


def test_more_of_the_words_read_are_its_own_from_epoch_to_epoch(here, monkeypatch):
    asked, plain = [], objectives.scheduled_sampling_forward
    monkeypatch.setattr(
        objectives, "scheduled_sampling_forward", lambda *batch: asked.append(batch[-1]) or plain(*batch)
    )
    train.main(
        Train(DATA, "own", epochs=4, scheduled_sampling=0.25, scheduled_sampling_step=0.1, preview_photos=0, **TINY)
    )
    assert sorted(set(asked)) == pytest.approx([0.1, 0.2, 0.25]) and asked == sorted(asked)
