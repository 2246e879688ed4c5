"""The training methods, each through train.py on a small data set."""

from pathlib import Path

import pytest
import torch

import generate
import train
from captioning.captioner import Captioner
from captioning.decoders.attention import AttentionDecoder
from captioning.errors import UserError
from captioning.runtime.checkpoint import load_checkpoint
from captioning.runtime.log import read_log
from captioning.search.graphs import DecodingGraphs
from captioning.training import objectives, validation
from captioning.training.fast_path import Way
from captioning.training.trainer import Trainer
from config import Generate, Train
from tests.small import QUICK, TINY, log_of, same, weights
from tests.test_fast_path import use_on_cpu

DATA = Path("data/small")
CIDER = {"objective": "cider", "samples": 3, "start_from": Path("checkpoints/attention")}
METHODS = {
    "hard-attention": {"decoder": "hard-attention", "positions": "learnt"},
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
    "transformer": {
        "decoder": "transformer",
        "encoder_layers": 1,
        "heads": 4,
        "memory_slots": 2,
        "positions": "sinusoidal",
        "schedule": "inverse-sqrt",
        "warmup_epochs": 1.5,
        "scheduled_sampling": 0.5,
        "scheduled_sampling_step": 0.3,
        "label_smoothing": 0.1,
        "tie_embeddings": True,
        "embedding_size": 24,
        "ema_decay": 0.9,
    },
    "cider, transformer": {**CIDER, "decoder": "transformer", "start_from": Path("checkpoints/transformer")},
    "cider, hard": {**CIDER, "decoder": "hard-attention", "start_from": Path("checkpoints/hard-attention")},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_of_each_method_resumes_to_the_same_weights(here, method):
    setting = {**QUICK, "precision": "float32", "epochs": 2, "preview_photos": 0, **METHODS[method], "save_every": 1e-9}
    uninterrupted, resumed = f"{method} uninterrupted", f"{method} resumed"
    train.main(Train(DATA, uninterrupted, **setting))
    steps, train_step = [], Trainer.train_step

    def killed_in_the_second_epoch(self, *batch, **last):
        steps.append(batch)
        if self.state.progress.epoch == 1 and self.state.progress.step == 1:
            raise KeyboardInterrupt
        return train_step(self, *batch, **last)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", killed_in_the_second_epoch)
        train.main(Train(DATA, resumed, **setting))
    train.main(Train(DATA, resumed, **setting, resume=True))
    assert len(steps) > 2 and same(weights(uninterrupted), weights(resumed))
    for key in ("train_loss", "train_reward", "val_loss", "learning_rate", "CIDEr-D"):
        assert log_of(uninterrupted)[1].get(key) == log_of(resumed)[1].get(key)


def test_a_killed_run_that_samples_and_validates_in_cuda_graphs_resumes_to_the_same_weights(here, monkeypatch):
    """A CPU repeats the work of the graphs: how the trainer uses them, and that samples do not depend on them."""
    made = []

    def make_decoding_graphs(self):
        made.append(DecodingGraphs(lambda work: work))
        return made[-1]

    monkeypatch.setattr(Trainer, "make_decoding_graphs", make_decoding_graphs)
    setting = {**TINY, "precision": "float32", "epochs": 2, "preview_photos": 0, **CIDER, "save_every": 1e-9}
    train.main(Train(DATA, "graphs uninterrupted", **setting))
    train_step = Trainer.train_step

    def killed_in_the_second_epoch(self, *batch, **last):
        if self.state.progress.epoch == 1 and self.state.progress.step == 1:
            raise KeyboardInterrupt
        return train_step(self, *batch, **last)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", killed_in_the_second_epoch)
        train.main(Train(DATA, "graphs resumed", **setting))
    train.main(Train(DATA, "graphs resumed", **setting, resume=True))
    assert same(weights("graphs uninterrupted"), weights("graphs resumed"))
    decodings = {type(key[0][1]) for key in made[0].loops}
    assert len(made) == 3 and len(decodings) == 2, "samples and validation captions"
    assert any(loop.replays for loop in made[0].loops.values())


@pytest.mark.parametrize("way", [Way(cuda_graphs=False, kernels=True), Way(cuda_graphs=True, kernels=False)], ids=str)
def test_cider_optimisation_on_the_fast_path_trains_the_same_weights(here, monkeypatch, way):
    """The ways are compared on the same sampled captions, and then train on them. A CPU has no kernels to differ."""
    setting = {**TINY, "precision": "float32", "epochs": 1, "preview_photos": 0, "feature_dropout": 0.2, **CIDER}
    setting["dropout"] = 0.0  # its masks depend on the shapes
    runs = f"rewarded plainly, not {way}", f"rewarded by {way}"
    train.main(Train(DATA, runs[0], **setting))
    use_on_cpu(monkeypatch, way)
    monkeypatch.setattr("captioning.training.cuda_graphs.SAMPLE_STRETCH", 20)  # so short a training samples anything
    train.main(Train(DATA, runs[1], **setting))
    check, epoch = log_of(runs[1], "self-check", "epoch")
    assert check["way"] == str(way)
    assert epoch["batches_without_graph"] == 0
    pairs = [(values, weights(runs[1])[name]) for name, values in weights(runs[0]).items()]
    close = torch.cat([torch.isclose(one, other, rtol=1e-3, atol=1e-5).flatten() for one, other in pairs])
    assert close.float().mean() > 0.99, "Adam turns the rounding of a gradient that is almost zero into a whole step"


def test_cider_optimisation_raises_the_reward_of_sampled_captions(here):
    setting = {**QUICK, "precision": "float32", "preview_photos": 0, "patience": 99, **CIDER, "samples": 5}
    train.main(Train(DATA, "rewarded", epochs=30, **setting))
    lines = log_of("rewarded")
    rewards = [line["train_reward"] for line in lines]
    assert sum(rewards[-5:]) > 1.25 * sum(rewards[:5])
    assert "train_loss" not in lines[0] and lines[0]["val_loss"] > 0


def test_cider_optimisation_with_fine_tune_trains_the_encoder_too(here):
    live = {"fine_tune": True, "encoder": "resnet18.layer2", "weights": "random", "image_size": 64, "workers": 0}
    train.main(Train(DATA, "fine-tuned", epochs=1, **live, **TINY))
    start = {"fine_tune": True, "workers": 0, **CIDER, "start_from": Path("checkpoints/fine-tuned")}
    train.main(Train(DATA, "rewarded fine-tuned", epochs=1, **start, **TINY))
    before, after = (
        load_checkpoint(Path("checkpoints") / run)["encoder"]["state"] for run in ("fine-tuned", "rewarded fine-tuned")
    )
    assert not torch.allclose(before["layer2.1.conv2.weight"], after["layer2.1.conv2.weight"], atol=1e-5)


def test_max_length_bounds_the_references_the_cider_samples_and_the_validation_captions(here, monkeypatch):
    sampled, generated = [], []
    sample, beam_search = objectives.sample, validation.beam_search

    def record_samples(*arguments):
        sampled.append(sample(*arguments))
        return sampled[-1]

    def record_captions(*arguments):
        generated.append(beam_search(*arguments))
        return generated[-1]

    monkeypatch.setattr(objectives, "sample", record_samples)
    monkeypatch.setattr(validation, "beam_search", record_captions)
    train.main(Train(DATA, "two words", epochs=1, max_length=2, preview_photos=0, **TINY, **CIDER))
    assert max(captions.shape[2] for captions in sampled) == 3, "two words and <end>"
    assert max(len(best.words) for batch in generated for (best,) in batch) == 2
    start = read_log(Path("checkpoints/two words"))[0]
    assert start["captions_cut"] > 0 and start["config"]["max_length"] == 2


def test_embeddings_start_from_word_vectors_and_keep_them_if_frozen(here, capsys):
    words = Captioner.load("checkpoints/attention").vocabulary.words
    lines = [f"{word} {' '.join([str(number)] * 16)}" for number, word in enumerate(words) if number not in (0, 5)]
    Path("vectors.txt").write_text("\n".join(lines), encoding="utf-8")
    setting = {**TINY, "epochs": 1, "word_vectors": Path("vectors.txt")}
    train.main(Train(DATA, "frozen", freeze_embeddings=True, **setting))
    expected = f"vectors.txt: has vectors of {len(words) - 5:,} of the vocabulary's {len(words) - 4:,} words"
    assert expected in capsys.readouterr().out
    train.main(Train(DATA, "trained", **setting))
    frozen, trained = (weights(run)["embedding.weight"] for run in ("frozen", "trained"))
    assert frozen[4].tolist() == [4.0] * 16 and frozen[6].tolist() == [6.0] * 16
    assert frozen[[0, 1, 5]].abs().max() <= 0.1, "missing and special words keep their random initialisation"
    assert not torch.equal(trained[4], frozen[4])
    with pytest.raises(UserError, match="--embedding-size 16"):
        train.main(Train(DATA, "wrong", **{**setting, "embedding_size": 12}))


def test_tied_embeddings_are_one_matrix_in_training_and_in_captioning(here):
    trainer = train.make_trainer(Train(DATA, "none", tie_embeddings=True, **{**TINY, "embedding_size": 24}))
    assert trainer.decoder.output_layer.weight is trainer.decoder.embedding.weight
    train.main(Train(DATA, "tied", tie_embeddings=True, epochs=1, **{**TINY, "embedding_size": 24}))
    decoder = Captioner.load("checkpoints/tied").decoder
    assert torch.equal(decoder.output_layer.weight, decoder.embedding.weight)
    assert not torch.equal(decoder.embedding.weight, trainer.decoder.embedding.weight)


def test_feature_dropout_zeroes_channels_in_training_only(here, monkeypatch):
    """The small features have no channel that is zero in a whole photo."""
    zero_fractions = {True: [], False: []}  # by training mode
    init_state = AttentionDecoder.init_state

    def record(self, grid):
        zero_fractions[self.training].append((grid.cells == 0).all(1).float().mean().item())
        return init_state(self, grid)

    monkeypatch.setattr(AttentionDecoder, "init_state", record)
    train.main(Train(DATA, "sparse", epochs=4, preview_photos=0, feature_dropout=0.25, **TINY))
    training = zero_fractions[True]
    assert max(zero_fractions[False]) < 0.02 and min(training) > 0.1
    assert sum(training) / len(training) == pytest.approx(0.25, abs=0.04)


def test_hard_attention_captions_by_argmax_with_the_flag(here):
    for mode in ("expectation", "argmax"):
        generate.main(Generate(Path("checkpoints/hard-attention"), data=DATA, hard=mode, json=Path(f"{mode}.json")))
    decoder = Captioner.load("checkpoints/hard-attention", hard_attention="argmax").decoder
    assert decoder.attention_mode == "argmax" and type(decoder).attention_mode == "expectation"
    assert Path("argmax.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="--hard argmax: needs a run of --decoder hard-attention"):
        generate.main(Generate(Path("checkpoints/attention"), data=DATA, hard="argmax"))


def test_scheduled_sampling_rises_from_epoch_to_epoch(here, monkeypatch):
    probabilities, forward = [], objectives.scheduled_sampling_forward

    def record(*arguments):
        probabilities.append(arguments[-1])
        return forward(*arguments)

    monkeypatch.setattr(objectives, "scheduled_sampling_forward", record)
    setting = {**TINY, "scheduled_sampling": 0.25, "scheduled_sampling_step": 0.1, "preview_photos": 0}
    train.main(Train(DATA, "sampled inputs", epochs=4, **setting))
    assert sorted(set(probabilities)) == pytest.approx([0.1, 0.2, 0.25])
    assert probabilities == sorted(probabilities)
