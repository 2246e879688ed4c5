"""Validation: the same metrics for every batch size, and batches as large as a GPU holds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from captioning.caption import CaptionResult
from captioning.dataset.batches import CachedPhotos, plan_batches
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid, grid_pooling
from captioning.encoders.images import FailureLimit
from captioning.errors import UserError
from captioning.evaluation.score_report import score_captions
from captioning.search.graphs import DecodingGraphs
from captioning.training import validation as module
from captioning.training.loss_module import LossModule
from captioning.training.objectives import CrossEntropy
from captioning.training.validation import ShardResult, Sums, Validation, validation_batch_size
from captioning.viewing.preview import Preview
from config import Train
from preprocess.captions import Photo
from preprocess.vocabulary import SPECIAL, Vocabulary

CPU = torch.device("cpu")
VOCABULARY = Vocabulary("en", "whitespace", 1, (*SPECIAL, *"abcdefgh"))


def make_split(photos=40):
    random = np.random.default_rng(0)
    records = []
    for number in range(photos):
        captions = tuple(tuple(random.choice(list("abcdefgh"), random.integers(1, 7))) for _ in range(1 + number % 3))
        records.append(Photo("", f"photo{number}", "val", captions))
    return CaptionDataset(records, VOCABULARY, max_length=9)


def read_late(monkeypatch):
    """Leave the sums of several batches on the device, as on a GPU."""
    init = Sums.__init__
    monkeypatch.setattr(Sums, "__init__", lambda self, device: init(self, torch.device("meta")))


def run(tmp_path, batch_size, graphs=None, spoil=None):
    """The metrics of an untrained decoder whose captions differ. spoil: the photo whose features are not finite."""
    torch.manual_seed(0)
    split = make_split()
    sizes = dict(vocabulary_size=12, channels=6, embedding_size=5, attention_size=4, hidden_size=7, dropout=0.5)
    decoder = build_decoder("attention", sizes)
    with torch.no_grad():
        for weights in decoder.parameters():
            weights.normal_(0, 1.5)
    cells = torch.randn(len(split), 64, 6) + 3 * torch.randn(len(split), 1, 6)
    if spoil is not None:
        cells[spoil] = torch.nan
    photos = CachedPhotos(split, np.arange(len(split)), lambda rows: Grid(cells[rows], grid_pooling(8, 8)))
    preview = Preview(split, 0, tmp_path)
    validation = Validation(split, VOCABULARY, preview, FailureLimit(len(split), 0.0), 9, graphs=graphs)
    loss_module = LossModule(None, decoder, CrossEntropy(Train("data", "run")), 0.0)
    batches = (photos[indices] for indices in plan_batches(split, batch_size, range(len(split))))
    metrics = validation.run(loss_module, torch.float32, batches, 1, SimpleNamespace(check=lambda: None))
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and name != "val_seconds"}


def test_the_metrics_do_not_depend_on_the_batch_size_nor_on_cuda_graphs(tmp_path, monkeypatch):
    expected = run(tmp_path, 160)
    assert expected["scored"] == 40 and 0 < expected["top5"] < 1 and expected["BLEU-4"] > 0
    graphs = DecodingGraphs(lambda work: work)
    for batch_size in (1, 7, 31):
        assert run(tmp_path, batch_size) == pytest.approx(expected, rel=1e-6)
        assert run(tmp_path, batch_size, graphs) == pytest.approx(expected, rel=1e-6)
    assert graphs.loops
    monkeypatch.setattr(module, "CHECK_INTERVAL", 3)
    read_late(monkeypatch)
    assert run(tmp_path, 7) == pytest.approx(expected, rel=1e-6)


def test_the_intervals_of_the_log_are_those_of_the_score_report(tmp_path):
    split = make_split()
    references = {photo: split.references(index) for index, photo in enumerate(split.ids)}
    captions = {photo: references[photo][-1][:4] for photo in split.ids}
    validation = Validation(split, VOCABULARY, Preview(split, 0, tmp_path), FailureLimit(len(split), 0.0), 9)
    metrics = validation.merge([ShardResult([1.0, 1.0, 1.0], captions, [], {})], epoch=1)
    captioned = [
        (Photo("", photo, "val", tuple(map(tuple, references[photo]))), CaptionResult(" ".join(words), words))
        for photo, words in captions.items()
    ]
    report = score_captions(captioned, "en", "whitespace", java=False).to_dict()["intervals"]["word"]
    for metric in ("BLEU-4", "CIDEr-D"):
        low, high = metrics["intervals"][metric]
        assert [low, high] == pytest.approx(report[metric]) and low < metrics[metric] < high


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_that_is_not_finite_names_its_photos_even_if_it_is_read_later(tmp_path, monkeypatch, late):
    if late:
        read_late(monkeypatch)
    with pytest.raises(UserError, match="the loss of the validation photos photo11, photo12 is nan; continue from"):
        run(tmp_path, 4, spoil=12)


def test_the_sums_are_read_once_for_several_batches():
    reads = []
    sums = Sums(torch.device("meta"))
    sums.read = lambda: reads.append(len(sums.pending)) or Sums.read(sums)
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 5, 12), torch.randint(12, (40, 5))
    for number in range(20):
        sums.add(logits[number], targets[number], ["photo"])
    assert reads == [8, 8]
    cross_entropy, hits, words = sums.read()
    rows, targets = logits[:20].flatten(0, 1), targets[:20].flatten()
    assert reads == [8, 8, 4] and words == 100
    assert cross_entropy == pytest.approx(100 * float(F.cross_entropy(rows, targets)))
    assert hits == int((rows.topk(5).indices == targets[:, None]).sum())


def test_a_gpu_validates_batches_as_large_as_its_memory_holds(monkeypatch):
    split = make_split(4000)
    captions = int(split.photo_offsets[-1])
    sizes = {}
    for gigabytes in (4, 8, 24, 141):
        properties = SimpleNamespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        sizes[gigabytes] = validation_batch_size(split, 10_000, torch.device("cuda"))
    assert list(sizes.values()) == sorted(sizes.values())
    assert sizes[4] == 160 and sizes[8] > 160 and sizes[141] == 2048
    words = float(split.target_counts().sum()) / captions
    logits = sizes[24] * words * 10_000 * 4
    assert logits < 2**30
    assert validation_batch_size(split, 10_000, torch.device("cuda"), processes=8) == -(-captions // 8)
    assert validation_batch_size(split, 10_000, CPU) == 160
