"""The trained parts of a run, and their conversion to and from checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from captioning.decoders.factory import build_decoder, decoder_arguments, load_decoder
from captioning.encoders.encoder import Encoder
from captioning.encoders.images import Transform
from captioning.errors import UserError
from captioning.runtime.checkpoint import checkpoint_errors, trained_views
from captioning.runtime.device import restore_rng, rng_state
from captioning.runtime.settings import as_plain_data
from captioning.training.data import TrainingData
from captioning.training.ema import EMA
from captioning.training.loss_module import LossModule
from captioning.training.objectives import Objective
from captioning.training.optimizer import layer_decay_groups, make_optimizer, parameter_groups
from captioning.training.options import TrainingOptions
from preprocess.vocabulary import Vocabulary


@dataclass
class Progress:
    """The progress of a run, as plain data for checkpoints."""

    epoch: int = 0  # finished epochs, with their validation
    step: int = 0  # updates of the weights in the current epoch
    count: int = 0  # words or captions that the loss has averaged in the current epoch, over all processes
    total: float = 0.0  # sum of the loss over them
    best: float | None = None  # score of best.pt, larger is better: with --best-metric loss, the negative loss
    best_loss: float = float("inf")  # val loss of best.pt; of checkpoints older than this key, unknown
    epochs_without_better: int = 0  # a better score; epochs whose score says nothing do not count
    way: dict | None = None  # how batches are computed on a GPU, and which one: see captioning/training/fast_path.py

    def mean(self) -> float:
        """The mean loss of the current epoch so far."""
        return self.total / max(1, self.count)

    def update_best(self, score: float, loss: float, informative: bool = True) -> bool:
        """Return whether this epoch is the best so far, and record it.

        score: larger is better; of equal scores, the lower val loss is. informative: False for a score that says
        nothing about the captions. It counts as 0, and epochs_without_better stays as it is.
        """
        score = score if informative else 0.0
        higher = self.best is None or score > self.best
        better = higher or (score == self.best and loss < self.best_loss)
        if better:
            self.best, self.best_loss = score, loss
        if higher:
            self.epochs_without_better = 0
        elif informative:
            self.epochs_without_better += 1
        return better

    def finish_epoch(self) -> None:
        """Count the current epoch as finished and start the next."""
        self.epoch += 1
        self.step = 0
        self.count = 0
        self.total = 0.0


@dataclass
class RunState:
    """The trained parts of a run. `checkpoint`, `restore` and `start_from` convert them to and from a dict."""

    options: TrainingOptions
    vocabulary: Vocabulary
    device: torch.device
    loss_module: LossModule  # the encoder if it is trained, the decoder and the objective
    encoder_recipe: dict | None  # of the cached features; None if the encoder is trained
    views: tuple[str, ...]  # of the cached photos
    decoder_args: dict  # of the decoder's constructor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    progress: Progress = field(default_factory=Progress)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the optimizer's order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def checkpoint(self, for_resume: bool = True) -> dict:
        """Return everything a checkpoint holds. for_resume: with the state that only --resume needs."""
        decoder = self.loss_module.decoder
        encoder = self.loss_module.encoder
        checkpoint = {
            "config": as_plain_data(self.options),
            "vocabulary": self.vocabulary.to_dict(),
            "encoder": encoder.to_checkpoint() if encoder else self.encoder_recipe,
            "decoder": {"name": self.options.decoder, "sizes": self.decoder_args, "state": decoder.state_dict()},
            "progress": asdict(self.progress),
            "views": list(self.views),
        }
        if for_resume:
            checkpoint |= {
                "optimizer": self.optimizer.state_dict(),
                "objective": self.loss_module.objective.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(self.device),
                "ema": self.ema.state_dict() if self.ema else None,
            }
        return checkpoint

    def restore(self, saved: dict) -> None:
        """Continue from a checkpoint of this run. Raises UserError if it does not fit, or is damaged."""
        source = str(self.options.folder)
        self.start_from(saved, source)
        difference = self._transform_difference(saved)
        if difference:
            raise UserError(
                f"{source}: its features were made from other pixels than these: {difference}; give its own"
            )
        found = trained_views(saved)
        if found != list(self.views):
            raise UserError(
                f"{source}: was trained on the views {', '.join(found)} of the photos, not {', '.join(self.views)}; "
                "give their files with --features"
            )
        with checkpoint_errors(self.options.folder / "last.pt"):
            self.optimizer.load_state_dict(saved["optimizer"])
            self.loss_module.objective.load_state_dict(saved["objective"])
            if self.scaler.is_enabled() and saved["scaler"]:  # else one of the two runs is not in float16
                self.scaler.load_state_dict(saved["scaler"])
            if self.ema:
                self.ema.load_state_dict(saved["ema"])
            self.progress = Progress(**saved["progress"])
            restore_rng(saved["rng"], self.device)

    def start_from(self, saved: dict, source: str) -> None:
        """Load the decoder's weights from a checkpoint of any run.

        Raises UserError if its vocabulary, encoder or sizes differ. source: the run, for messages.
        """
        with checkpoint_errors(source):
            self._check_vocabulary(saved, source)
            self._check_encoder(saved, source)
            load_decoder(self.loss_module.decoder, saved["decoder"], self.options.decoder, self.decoder_args, source)

    def _check_vocabulary(self, saved: dict, source: str) -> None:
        found = Vocabulary.from_dict(saved["vocabulary"])
        if found != self.vocabulary:
            raise UserError(
                f"{source}: was trained with another vocabulary ({len(found):,} words; {self.options.data} has "
                f"{len(self.vocabulary):,}); start a new --run"
            )

    def _check_encoder(self, saved: dict, source: str) -> None:
        """Cached features must come from the run's encoder."""
        found = saved["encoder"]
        expected = self.encoder_recipe
        if expected and expected["sha256"] != found["sha256"]:
            raise UserError(
                f"{source}: was trained on another encoder ({found['name']}, {found['weights']}) than the features "
                f"({expected['name']}, {expected['weights']}); extract features with its encoder"
            )

    def _transform_difference(self, saved: dict) -> str:
        """How the photos of the run's features were prepared differently from those of these features, in words."""
        if not self.encoder_recipe:
            return ""
        with checkpoint_errors(str(self.options.folder)):
            found, expected = (
                Transform.from_dict(recipe["transform"]) for recipe in (saved["encoder"], self.encoder_recipe)
            )
        return found.differences(expected)


def build_run_state(
    options: TrainingOptions,
    vocabulary: Vocabulary,
    data: TrainingData,
    objective: Objective,
    device: torch.device,
    precision: torch.dtype,
) -> RunState:
    """Build the decoder from options.seed, the optimizer and the rest of a new run, on the device.

    precision: of the arithmetic; with float16 the loss is scaled.
    """
    torch.manual_seed(options.seed)
    settings = {"vocabulary_size": len(vocabulary), "channels": data.channels, **as_plain_data(options)}
    decoder_args = decoder_arguments(options.decoder, settings)
    decoder = build_decoder(options.decoder, decoder_args)
    if options.tie_embeddings:
        tie_embeddings(decoder)
    decoder.embedding.weight.requires_grad_(not options.freeze_embeddings)
    loss_module = LossModule(data.encoder, decoder, objective, options.feature_dropout).to(device)

    groups = parameter_groups({"learning_rate": decoder.parameters()}, options.weight_decay)
    if data.encoder:
        groups += encoder_groups(data.encoder, options)
    parameters = [parameter for group in groups for parameter in group["params"]]
    return RunState(
        options=options,
        vocabulary=vocabulary,
        device=device,
        loss_module=loss_module,
        encoder_recipe=data.encoder_recipe,
        views=data.views,
        decoder_args=decoder_args,
        optimizer=make_optimizer(groups),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        ema=EMA(parameters, options.ema_decay) if options.ema_decay else None,
    )


def tie_embeddings(decoder: nn.Module) -> None:
    """Make the output layer's matrix that of the word embedding. Raises UserError if their sizes differ."""
    (_, embedding_size), (_, hidden_size) = decoder.embedding.weight.shape, decoder.output_layer.weight.shape
    if embedding_size != hidden_size:
        raise UserError(f"--tie-embeddings: --embedding-size {embedding_size} must equal --hidden-size {hidden_size}")
    decoder.output_layer.weight = decoder.embedding.weight


def encoder_groups(encoder: Encoder, options: TrainingOptions) -> list[dict]:
    """Prepare a live encoder for training. Returns the optimizer's groups of its trained parameters."""
    default = "all" if options.weights == "random" else None
    parameters = encoder.unfreeze(options.unfreeze_from or default)
    if options.checkpoint_activations:
        encoder.checkpoint_activations()
    rate = "encoder_learning_rate"
    if options.layer_decay == 1:
        return parameter_groups({rate: parameters}, options.weight_decay)
    return layer_decay_groups(encoder.layers(), rate, options.weight_decay, options.layer_decay)
