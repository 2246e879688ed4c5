"""The settings of a training run, without the command line that sets them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from captioning.decoders import DECODERS, decoders_with
from captioning.errors import UserError
from captioning.runtime.settings import check, check_fractions, check_min, flag, non_default
from captioning.training import OBJECTIVES, SCHEDULES

if TYPE_CHECKING:
    DecoderName = str
    ObjectiveName = str
    ScheduleName = str
else:  # the command line offers what is registered
    DecoderName = Literal[tuple(DECODERS)]
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    ScheduleName = Literal[tuple(SCHEDULES)]


Options = TypeVar("Options", bound="TrainingOptions")


class Defaults(NamedTuple):
    """How a decoder is trained by cross entropy, where the command does not say otherwise."""

    batch_size: int  # captions
    learning_rate: float
    warmup_epochs: float
    schedule: str = "step"
    label_smoothing: float = 0.0


COMMON_DEFAULTS = Defaults(32, 4e-4, 0.0)  # the published ones of soft attention: recipes/tutorial.txt
GPU_DEFAULTS = Defaults(512, 3.2e-3, 1.0)  # 32 captions cannot fill a GPU; docs/results.md: "Batch size"
# Of the authors, on COCO, on any device. Those of the other decoders name no rate for Adam, or none at all.
PUBLISHED_DEFAULTS = {
    # M2 (Cornia et al. 2020, section 4): the largest rate is 512^-0.5 10,000^-0.5; 10,000 updates are 0.9 epochs
    "transformer": Defaults(50, 4.4e-4, 0.9, "inverse-sqrt"),
    # The authors' experiments: 1024^-0.5 10,000^-0.5
    "xlan": Defaults(50, 3.1e-4, 0.9, "inverse-sqrt"),
    # AoANet (Huang et al. 2019, section 4): 10 photos of 5 captions. The smoothing: the authors' experiments
    "aoa": Defaults(50, 2e-4, 0.0, "step", 0.2),
}

# Settings of some decoders, refused with a decoder whose constructor does not take them
DECODER_SETTINGS = (
    "cell",
    "layers",
    "photo_norm",
    "encoder_layers",
    "heads",
    "feed_forward_size",
    "memory_slots",
    "positions",
)


@dataclass(frozen=True)
class TrainingOptions:
    """The settings of a training run. The command line of train.py is made from them: a field's comment is its help.

    Raises UserError for a value out of range, and for settings that contradict one another.
    """

    data: Path  # folder made by python -m preprocess
    run: str  # name of the run, which is written to checkpoints/RUN
    # flags of recipes/NAME.txt (best, best-cider, tutorial), or of a file such as ./mine.txt; flags that are typed win
    recipe: str | None = None
    # lstm: Show and Tell; attention, hard-attention: Show, Attend and Tell; adaptive: Knowing When to Look;
    # transformer: Attention Is All You Need; updown: Bottom-Up and Top-Down Attention;
    # xlan: X-Linear Attention Networks; aoa: Attention on Attention
    decoder: DecoderName = "attention"
    objective: ObjectiveName = "cross-entropy"  # cider: optimise the CIDEr-D of a trained run (with --start-from RUN)
    # cached features: files of views and parts of the photos; data/NAME/features.h5 and features.*.h5 unless given
    features: tuple[Path, ...] = ()
    features_on: Literal["auto", "gpu", "ram", "disk"] = "auto"  # where the cached features are held during training
    quantize_features: bool = False  # hold them in 8 bits: half of float16; they change by 0.2 to 1 %
    epochs: int = 20  # at most
    # captions, over all processes; all captions of a photo are in one batch (32; transformer, xlan and aoa 50); 512 in
    # place of 32 on a GPU, with cached features and cross entropy
    batch_size: int | None = None
    grad_accumulation: int = 1  # batches per update: large batches in little memory
    embedding_size: int | None = None  # of a word (512; updown 1000, xlan and aoa 1024)
    attention_size: int | None = None  # of keys and queries (512; xlan 1024)
    # of the recurrent state; with --decoder transformer or aoa, of all layers (512; updown 1000, xlan and aoa 1024)
    hidden_size: int | None = None
    cell: Literal["lstm", "gru", "rnn"] = "lstm"  # with --decoder lstm: recurrent cell
    # with --decoder lstm or transformer: layers that read the words (1; transformer 3)
    layers: int | None = None
    # with --decoder transformer, xlan or aoa: layers that relate the cells first; may be 0 (3; xlan 4, aoa 6)
    encoder_layers: int | None = None
    heads: int | None = None  # with --decoder transformer, xlan or aoa: heads of each attention (8)
    feed_forward_size: int = 2048  # with --decoder transformer: inner size of the feed-forward layers
    memory_slots: int = 0  # with --decoder transformer: learnt keys and values in the encoder layers; 40 in M2
    # not with --decoder lstm: how the row and column of a cell are encoded and added to it (none; transformer learnt)
    positions: Literal["learnt", "sinusoidal", "none"] | None = None
    photo_norm: Literal["batch", "none"] = "batch"  # with --decoder lstm: BatchNorm of the photo embedding
    tie_embeddings: bool = False  # share one matrix between the word embedding and the output layer
    word_vectors: Path | None = None  # initialise the embedding from a file of word2vec, GloVe or fastText
    word_vectors_limit: int = 0  # with --word-vectors: read only this many vectors, the first of the file; 0 is all
    freeze_embeddings: bool = False  # with --word-vectors: do not train the embedding
    # probability, of the hidden state before the output layer; with --decoder transformer, in every layer (0.5;
    # transformer 0.1)
    dropout: float | None = None
    feature_dropout: float = 0.0  # probability that a channel of a photo's features is zeroed
    label_smoothing: float | None = None  # fraction of each target spread over the vocabulary (0; aoa 0.2)
    scheduled_sampling: float = 0.0  # highest probability that an input word is the decoder's own sample
    scheduled_sampling_step: float = 0.05  # increase of that probability per epoch, from 0
    reinforce_weight: float = 1.0  # with --decoder hard-attention: weight of the REINFORCE term
    entropy_weight: float = 0.002  # with --decoder hard-attention: weight of the entropy of the attention
    samples: int = 5  # with --objective cider: captions sampled per photo
    # with --objective cider: the baseline of a reward: the mean of the photo's other samples, or its greedy caption
    baseline: Literal["leave-one-out", "greedy"] = "leave-one-out"
    # of the decoder (0.0004; transformer 0.00044, xlan 0.00031, aoa 0.0002); with the 512 captions of a GPU 0.0032
    learning_rate: float | None = None
    weight_decay: float = 0.0  # AdamW's, of weight matrices; 0 is Adam
    # of the learning rates; cosine: to 0 at --epochs; inverse-sqrt: as 1 / sqrt(epoch) after --warmup-epochs (step;
    # transformer and xlan inverse-sqrt)
    schedule: ScheduleName | None = None
    # epochs of linear warm-up (0; transformer and xlan 0.9); with the 512 captions of a GPU 1
    warmup_epochs: float | None = None
    lr_decay: float = 0.8  # with --schedule step: factor of the learning rates, every --lr-decay-every epochs
    lr_decay_every: int = 3  # with --schedule step: epochs between two reductions of the learning rates
    ema_decay: float = 0.0  # such as 0.999: validate and keep an exponential moving average of the weights; 0 is off
    grad_clip: float = 5.0  # clamp every gradient element to +- this; 0 is off
    alpha_c: float = 1.0  # with --decoder attention: weight of the doubly stochastic term
    patience: int = 8  # stop after this many epochs without a better score
    best_metric: Literal["cider", "bleu4", "loss"] = "cider"  # validation score that chooses best.pt
    val_photos: int = 5000  # validation photos to caption and score each epoch; 0 is all
    max_length: int = 52  # words per caption: longer references are truncated, and samples and validation captions end
    fine_tune: bool = False  # train the encoder too, on the photos themselves
    encoder: str | None = None  # with --fine-tune and no --start-from: as in extract_features.py (resnet101)
    weights: str | None = None  # with --fine-tune and no --start-from: as in extract_features.py
    image_size: int | None = None  # with --fine-tune and no --start-from: as in extract_features.py
    unfreeze_from: str | None = None  # first encoder layer to train (ResNets: layer2, others: all); a layer, or all
    encoder_learning_rate: float = 1e-4  # of the encoder
    layer_decay: float = 1.0  # timm encoders: factor of the learning rate from a block (CNNs: stage) to the one before
    drop_path: float = 0.0  # timm encoders: probability that the last residual branch of a photo is skipped in training
    checkpoint_activations: bool = False  # with --fine-tune: recompute activations of the encoder, to save memory
    flip: bool = False  # with --fine-tune: mirror photos at random, except where a caption says left or right
    crop: float = 1.0  # with --fine-tune: random crops keep at least this fraction of each side; 1 is off
    start_from: Path | None = None  # run whose weights training starts from
    resume: bool = False  # continue this run where it stopped
    save_every: float = 10.0  # minutes between checkpoints within an epoch
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic; weights stay float32
    fast_path: bool = True  # on a GPU: CUDA graphs and fused kernels, where they prove right and faster
    cuda_graphs: bool = True  # with --fast-path: run each batch as one CUDA graph
    kernels: bool = True  # with --fast-path: compute attention and LSTM gates with fused kernels
    calibrate: bool = False  # at the end: python -m captioning.calibrate checkpoints/RUN
    preview_photos: int = 6  # validation photos whose captions and attention are drawn every epoch; 0 is none
    # show the run in the visdom server at this URL (alone: http://127.0.0.1:8097); http://USER@HOST:8097 logs in
    dashboard: str | None = None
    tensorboard: bool = False  # write the run for TensorBoard, too: curves, settings, captions and their pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    workers: int | None = None  # with --fine-tune: processes that decode photos; one per core unless given
    seed: int = 0  # of weights, data order and dropout
    allow_missing: float = 0.01  # fraction of photos that may lack features or be unreadable
    overwrite: bool = False  # replace an existing run

    def __post_init__(self) -> None:
        if not self.run or Path(self.run).name != self.run or self.run.startswith("."):
            raise UserError(f"--run {self.run!r}: must be a plain name, such as att (kept in checkpoints/att)")
        self._check_ranges()
        self._check_together()

    def _check_ranges(self) -> None:
        check_min(
            self,
            1,
            "epochs",
            "batch_size",
            "grad_accumulation",
            "embedding_size",
            "attention_size",
            "hidden_size",
            "layers",
            "heads",
            "feed_forward_size",
            "samples",
            "lr_decay_every",
            "patience",
            "max_length",
        )
        check_min(
            self,
            0,
            "grad_clip",
            "alpha_c",
            "save_every",
            "val_photos",
            "preview_photos",
            "weight_decay",
            "warmup_epochs",
            "reinforce_weight",
            "entropy_weight",
            "scheduled_sampling_step",
            "encoder_layers",
            "memory_slots",
            "word_vectors_limit",
            "workers",
        )
        check(0 <= self.seed < 2**63, "--seed", self.seed, "between 0 and 2^63 - 1")
        check_fractions(self, "allow_missing", "label_smoothing", "scheduled_sampling")
        for name in ("learning_rate", "encoder_learning_rate", "lr_decay"):
            value = getattr(self, name)
            check(value is None or 0 < value < float("inf"), flag(name), value, "above 0")
        for name in ("dropout", "feature_dropout", "ema_decay", "drop_path"):
            value = getattr(self, name)
            check(value is None or 0 <= value < 1, flag(name), value, "at least 0 and below 1")
        for name in ("crop", "layer_decay"):
            check(0 < getattr(self, name) <= 1, flag(name), getattr(self, name), "above 0 and at most 1")

    def _check_together(self) -> None:
        """Check settings that contradict one another."""
        self._check_fine_tuning()
        self._check_objective()
        self._check_embeddings()
        if self.dashboard and urlsplit(self.dashboard).password:
            raise UserError("--dashboard: a run records its URL; put the password in VISDOM_PASSWORD instead")
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run and --overwrite replaces it: give one of them")
        for name in DECODER_SETTINGS:
            if non_default(self, name) and self.decoder not in (decoders := decoders_with(name)):
                alternatives = " or ".join(", ".join(decoders).rsplit(", ", 1))  # such as: a, b or c
                raise UserError(f"{flag(name)} requires --decoder {alternatives}")

    def _check_fine_tuning(self) -> None:
        encoder_flags = non_default(self, "encoder", "weights", "image_size")
        live_flags = encoder_flags + non_default(
            self, "unfreeze_from", "layer_decay", "drop_path", "checkpoint_activations", "flip", "crop"
        )
        cache_flags = non_default(self, "features_on", "features", "quantize_features")
        if live_flags and not self.fine_tune:
            raise UserError(f"{live_flags[0]} requires --fine-tune; cached features fix the encoder")
        if encoder_flags and self.start_from:
            raise UserError(
                f"{encoder_flags[0]}: not allowed with --start-from {self.start_from}, which has an encoder"
            )
        if cache_flags and self.fine_tune:
            raise UserError(f"{cache_flags[0]}: not allowed with --fine-tune, which reads the photos themselves")
        if self.checkpoint_activations and self.weights == "random":
            raise UserError(
                "--checkpoint-activations: not allowed with --weights random, whose BatchNorm would be updated twice"
            )

    def _check_objective(self) -> None:
        if self.objective != "cider":
            return
        if not (self.start_from or self.resume):
            raise UserError("--objective cider improves a trained run: give --start-from checkpoints/RUN")
        if self.baseline == "leave-one-out" and self.samples == 1:
            raise UserError("--samples 1: must be 2 or more with --baseline leave-one-out; or give --baseline greedy")

    def _check_embeddings(self) -> None:
        if self.word_vectors and self.start_from:
            raise UserError(f"--word-vectors: not allowed with --start-from {self.start_from}, which has embeddings")
        if self.word_vectors_limit and not self.word_vectors:
            raise UserError("--word-vectors-limit requires --word-vectors FILE")
        if self.freeze_embeddings and not self.word_vectors:
            raise UserError("--freeze-embeddings requires --word-vectors FILE")
        if self.freeze_embeddings and self.tie_embeddings:
            raise UserError(
                "--freeze-embeddings: not allowed with --tie-embeddings, which freezes the output layer too"
            )

    def for_device(self: Options, device_type: str) -> Options:
        """Return the settings with the defaults of this decoder and device, where none is given."""
        defaults = self._defaults(device_type)
        missing = {name: value for name, value in defaults._asdict().items() if getattr(self, name) is None}
        return replace(self, **missing)

    def _defaults(self, device_type: str) -> Defaults:
        if self.objective != "cross-entropy":
            return COMMON_DEFAULTS
        if self.decoder in PUBLISHED_DEFAULTS:
            return PUBLISHED_DEFAULTS[self.decoder]
        fills_gpu = device_type == "cuda" and not self.fine_tune and self.batch_size is None
        return GPU_DEFAULTS if fills_gpu else COMMON_DEFAULTS

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path("checkpoints") / self.run
