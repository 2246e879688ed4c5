"""timm's networks as encoders: each kind is built small, with its real configuration and random weights."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import extract_features
import train
from captioning.captioner import Captioner
from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import decode_files, read_files
from captioning.encoders.images import Transform
from captioning.encoders.loading import encoder_from_checkpoint, load_encoder
from captioning.encoders.protocol import default_transform
from captioning.errors import UserError
from captioning.export import ExportModule, encode, export_module
from captioning.features.feature_reader import FeatureReader
from captioning.runtime.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from captioning.training.optimizer import layer_decay_groups
from captioning.viewing.model_card import encoder_licence
from config import ExtractFeatures, Train
from tests.small import QUICK
from tests.test_bench import bench

timm = pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")
from safetensors.torch import save_file  # noqa: E402

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SMALLER = {  # constructor arguments that make a network small, whatever else its name stands for
    "vit_base_patch16_clip_224": VIT,
    "vit_base_patch16_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "vit_small_patch16_dinov3": VIT,
    "eva02_tiny_patch14_224": VIT,
    "beit_base_patch16_224": VIT,
    "deit_base_distilled_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    "vit_base_patch16_reg4_gap_256": VIT,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
}
KINDS = {  # name -> (photo size, cells per side, tokens that are no cells)
    "vit_base_patch16_clip_224": (224, 14, 1),
    "vit_base_patch16_siglip_224": (224, 14, 0),
    "vit_small_patch14_reg4_dinov2": (112, 8, 5),
    "vit_small_patch16_dinov3": (128, 8, 5),
    "eva02_tiny_patch14_224": (112, 8, 1),
    "beit_base_patch16_224": (128, 8, 1),
    "deit_base_distilled_patch16_224": (128, 8, 2),
    "swin_tiny_patch4_window7_224": (224, 7, 0),
    "convnext_atto": (256, 8, 0),
    "test_efficientnet": (256, 8, 0),
    "test_mambaout": (128, 4, 0),
}
CNNS = ("convnext_atto", "test_efficientnet", "test_mambaout")
TEST_VIT = "timm/test_vit"  # 0.4 million parameters, patches of 16 pixels
EXTRACT = {"image_size": 32, "workers": 0, "precision": "float32", "device": "cpu", "batch_size": 8}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Build the networks of SMALLER small."""
    create = timm.create_model

    def create_small(name, **settings):
        return create(name, **SMALLER.get(name.partition(".")[0], {}), **settings)

    monkeypatch.setattr(timm, "create_model", create_small)


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, which is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def photos(count=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def random_encoder(name, size=None, **settings):
    return load_encoder(name if "/" in name else f"timm/{name}", "random", size, **settings)


def timm_state(name, size=None):
    """A network of timm with its classifier, and its state dict."""
    torch.manual_seed(7)
    settings = {"img_size": size} if size else {}
    return timm.create_model(name, num_classes=5, **settings).eval().state_dict()


# ---- features


@pytest.mark.parametrize("name", KINDS)
def test_the_cells_are_the_patches_of_the_networks_last_layer(name):
    """timm's `forward_intermediates` sorts tokens and layouts by itself; it has no last convolution or fc_norm."""
    size, side, prefix = KINDS[name]
    encoder = random_encoder(name, size)
    network = encoder.body.network
    assert encoder.output_shape()[:2] == (side, side) and getattr(network, "num_prefix_tokens", 0) == prefix
    with torch.no_grad():
        x = encoder.transform.normalise(photos(size=size))
        cells = encoder(photos(size=size)).cells
        expected = network.forward_intermediates(x, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]
        if name == "test_efficientnet":
            expected = network.bn2(network.conv_head(expected))
        expected = expected.flatten(2).transpose(1, 2)
        if isinstance(getattr(network, "fc_norm", None), nn.LayerNorm):
            expected = network.fc_norm(expected)
    torch.testing.assert_close(cells, expected, rtol=1e-4, atol=1e-5)
    assert cells.shape == (2, side * side, encoder.output_shape()[2])


@pytest.mark.parametrize("name", KINDS)
def test_a_lit_patch_of_the_photo_lights_its_cell_more_than_any_other(name):
    size, side, _ = KINDS[name]
    encoder = random_encoder(name, size)
    pixels = size // side
    dark = torch.full((1, 3, size, size), 64, dtype=torch.uint8)
    with torch.no_grad():
        before = encoder(dark).cells
        for row, column in [(0, side - 1), (side // 2, 1), (side - 1, side // 2)]:
            lit = dark.clone()
            noise = photos(1, pixels, seed=row)
            lit[:, :, row * pixels : (row + 1) * pixels, column * pixels : (column + 1) * pixels] = noise
            change = (encoder(lit).cells - before).norm(dim=2)
            found = divmod(int(change.argmax()), side)
            # The receptive fields of a CNN's cells overlap, and with random weights a neighbour may see the patch best.
            tolerance = 1 if name in CNNS else 0
            assert max(abs(found[0] - row), abs(found[1] - column)) <= tolerance


def test_a_vit_of_16_pixel_patches_at_224_pixels_has_the_attentions_own_14x14_cells():
    grid = random_encoder("vit_base_patch16_clip_224")(photos(1, 224))
    assert torch.equal(grid.pooling, torch.eye(196))


def test_photos_are_prepared_as_the_weights_expect():
    transform = random_encoder("vit_base_patch16_clip_224.openai").transform
    assert transform == Transform(
        image_size=224,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        interpolation="bicubic",
    )
    assert default_transform("timm/tf_efficientnet_lite2", None).mean == (0.5, 0.5, 0.5)
    assert default_transform("timm/tf_efficientnet_lite2", 384).image_size == 384
    assert default_transform("resnet101", None) == Transform(256)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photos_are_resized_with_the_interpolation_of_the_weights(interpolation, tmp_path):
    """On the CPU and, decoded by nvJPEG (here by its CPU counterpart), on the GPU, by one grey level or so."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(tmp_path / "photo.jpg")
    with Image.open(tmp_path / "photo.jpg") as photo:
        expected = np.asarray(photo.resize((48, 48), Image.Resampling[interpolation.upper()])).transpose(2, 0, 1)
    transform = Transform(48, interpolation=interpolation)
    on_cpu = transform.resize(transform.open(tmp_path / "photo.jpg"))
    assert np.abs(on_cpu.numpy().astype(int) - expected).max() <= 1
    paths = [tmp_path / "photo.jpg"]
    nvjpeg = replace(transform, nvjpeg=True)
    on_gpu = decode_files(read_files(paths, [0], nvjpeg), paths, nvjpeg, torch.device("cpu")).photos[0]
    assert np.abs(on_gpu.numpy().astype(int) - expected).max() <= 2


def test_the_recorded_name_has_the_tag_of_the_weights():
    assert random_encoder("timm/vit_base_patch16_224").name == "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert random_encoder("test_mambaout", 64).name == "timm/test_mambaout"  # timm has no weights of it


def test_attention_is_scaled_dot_product_attention():
    encoder = random_encoder("vit_base_patch16_224", 32)
    assert all(block.attn.fused_attn for block in encoder.body.network.blocks)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "beit_base_patch16_224", "vit_base_patch16_siglip_224"])
def test_the_class_vector_is_the_class_token_or_the_attention_pooling(name):
    encoder = random_encoder(name, 64, pooled="class")
    network = encoder.body.network
    with torch.no_grad():
        tokens = network.forward_features(encoder.transform.normalise(photos()))
        expected = {
            "vit_base_patch16_clip_224": lambda: tokens[:, 0],
            "beit_base_patch16_224": lambda: network.fc_norm(tokens[:, 0]),
            "vit_base_patch16_siglip_224": lambda: network.attn_pool(tokens),
        }[name]()
        grid, class_vector = encoder.encode(photos())
        assert torch.equal(encoder(photos()).cells, grid.cells) and grid.cells.shape[1] == 16
        encoder.for_attention = False
        assert torch.equal(encoder(photos()).mean(), class_vector)
    torch.testing.assert_close(class_vector, expected)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "vit_base_patch16_siglip_224", "test_mambaout", "beit_base_patch16_224"]
)
def test_a_body_has_no_parameter_that_its_cells_do_not_depend_on(name):
    """Else distributed training would wait for its gradient for ever."""
    size, _, _ = KINDS[name]
    encoder = random_encoder(name, size)
    encoder(photos(1, size)).cells.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# ---- what is refused


@pytest.mark.parametrize(
    "name, size, settings, message",
    [
        ("vit_bse_patch16_224", None, {}, "not a network of timm .*; did you mean timm/vit_base_patch16_224"),
        ("test_vit.laion", None, {}, "timm knows no weights 'laion' of test_vit .it has r160_in1k"),
        ("test_vit", 150, {}, "--image-size 150: not a multiple of the 16 pixels of a patch of .*; give 144 or 160$"),
        ("vit_small_patch14_reg4_dinov2", 224 + 5, {}, "give 224 or 238$"),
        ("crossvit_9_240", None, {}, "has no spatial map"),
        ("test_convnext", 24, {}, "--image-size 24: not possible with timm/test_convnext"),
        ("test_convnext", 64, {"pooled": "class"}, "--pooled class: .* has no class token or attention pooling"),
        ("resnet18", 64, {"pooled": "class"}, "--pooled class: resnet18 has no class token"),
        ("resnet18", 64, {"drop_path": 0.1}, "--drop-path 0.1: requires a timm/ encoder"),
        ("resnet1001", 64, {}, "not a torchvision classifier; did you mean resnet101"),
        ("vit_base_patch16_reg4_gap_256", None, {"pooled": "class"}, "--pooled class: .* has no class token"),
        ("vgg11", 64, {"drop_path": 0.1}, "--drop-path 0.1: timm/vgg11.tv_in1k cannot skip layers"),
    ],
)
def test_an_unsuitable_network_or_size_is_refused_in_one_line(name, size, settings, message):
    family = "" if name in ("resnet18", "resnet1001") else "timm/"
    with pytest.raises(UserError, match=message) as error:
        load_encoder(family + name, "random", size, **settings)
    assert "\n" not in str(error.value)


def test_without_timm_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "captioning.encoders.timm_backbone")
    with pytest.raises(UserError, match=r"timm is not installed; run: pip install -e '.\[timm\]'"):
        importlib.import_module("captioning.encoders.timm_backbone")


# ---- weights


def nested_as_timm_trains(state):
    return {"epoch": 3, "arch": "test_vit", "state_dict": state, "optimizer": {"lr": 0.1}}


def add_prefix(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


WRITERS = {
    "timm": lambda state: state,
    "timm training": nested_as_timm_trains,
    "DINO": lambda state: {"model": state},
    "DataParallel": add_prefix("module."),
    "Lightning": lambda state: {"state_dict": add_prefix("model.")(state) | {"loss.scale": torch.ones(1)}},
    "Lightning, DataParallel": lambda state: {"state_dict": add_prefix("model.module.")(state)},
    "an encoder of a larger model": lambda state: add_prefix("encoder.")(state) | {"decoder.weight": torch.ones(1)},
    "a backbone": add_prefix("backbone."),
    "open_clip around timm": lambda state: add_prefix("visual.trunk.")(state) | {"logit_scale": torch.ones(())},
    "half precision": lambda state: {name: value.half() for name, value in state.items()},
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_read_as_every_library_writes_them(writer, suffix, tmp_path):
    state = timm_state("test_vit")
    content = WRITERS[writer](state)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(content, path)
    elif all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file(content, path)
    else:
        pytest.skip("safetensors holds no nested dicts")
    loaded = load_encoder(TEST_VIT, str(path), None).body.network.state_dict()
    tolerance = 1e-3 if writer == "half precision" else 0
    for name, value in loaded.items():
        torch.testing.assert_close(value, state[name], rtol=tolerance, atol=tolerance / 10)


def openai_state(state):
    """The state dict of a CLIP ViT of timm in OpenAI's names, with a text tower."""
    names = {
        "patch_embed.proj.": "conv1.",
        "norm_pre.": "ln_pre.",
        "norm.": "ln_post.",
        "blocks.": "transformer.resblocks.",
        ".attn.qkv.": ".attn.in_proj_",
        ".attn.proj.": ".attn.out_proj.",
        ".norm1.": ".ln_1.",
        ".norm2.": ".ln_2.",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
    }
    renamed = {"class_embedding": state["cls_token"][0, 0], "positional_embedding": state["pos_embed"][0]}
    for name, value in state.items():
        if name in ("cls_token", "pos_embed") or name.startswith("head."):
            continue
        for old, new in names.items():
            if name.startswith(old) or old.startswith("."):
                name = name.replace(old, new, 1)
        renamed[name] = value
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "positional_embedding": torch.ones(77, 8)}
    return add_prefix("visual.")(renamed | {"proj": torch.ones(32, 16)}) | text


@pytest.mark.parametrize("prefix", ["", "module."])
def test_clips_own_names_are_understood(prefix, tmp_path):
    state = timm_state("vit_base_patch16_clip_224")
    torch.save({"state_dict": add_prefix(prefix)(openai_state(state))}, tmp_path / "clip.pt")
    encoder = load_encoder("timm/vit_base_patch16_clip_224.openai", str(tmp_path / "clip.pt"), None)
    for name, value in encoder.body.network.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_dinov2s_own_names_are_understood(tmp_path):
    state = timm_state("vit_small_patch14_reg4_dinov2", 112)
    own = {name.replace("reg_token", "register_tokens"): value for name, value in state.items()}
    own["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], 1)  # with a position of the class token
    torch.save(own | {"mask_token": torch.zeros(1, 32)}, tmp_path / "dino.pth")
    encoder = load_encoder("timm/vit_small_patch14_reg4_dinov2", str(tmp_path / "dino.pth"), 112)
    for name, value in encoder.body.network.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_buffers_that_older_versions_of_timm_saved_are_ignored(tmp_path):
    state = timm_state("swin_tiny_patch4_window7_224")
    names = ("layers.0.blocks.0.attn.relative_position_index", "layers.0.blocks.0.attn_mask")
    torch.save(state | {name: torch.zeros(49, 49) for name in names}, tmp_path / "old.pth")
    encoder = load_encoder("timm/swin_tiny_patch4_window7_224", str(tmp_path / "old.pth"), None)
    assert all(torch.equal(value, state[name]) for name, value in encoder.body.network.state_dict().items())


def test_position_embeddings_are_resampled_to_another_size(tmp_path):
    state = timm_state("vit_base_patch16_224")
    torch.save(state, tmp_path / "weights.pth")
    encoder = load_encoder("timm/vit_base_patch16_224", str(tmp_path / "weights.pth"), 320)
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], (20, 20), (14, 14), 1)
    torch.testing.assert_close(encoder.body.network.pos_embed.data, expected)
    assert encoder.output_shape()[:2] == (20, 20)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: {k: v for k, v in state.items() if "norm1" not in k},
            r"missing: blocks.0.norm1.weight, .* more",
        ),
        (lambda state: state | {"blocks.9.norm1.weight": torch.ones(64)}, "unexpected: blocks.9.norm1.weight"),
        (lambda state: state | {"norm.weight": torch.ones(3)}, r"of other shapes: norm.weight \(3,\), not \(64,\)"),
        (lambda state: {"layer1.0.conv1.weight": torch.ones(3)}, "missing: cls_token"),
    ],
)
def test_weights_of_another_network_are_refused_and_what_does_not_fit_is_named(change, message, tmp_path):
    torch.save(change(timm_state("test_vit")), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"not of timm/test_vit.r160_in1k .{message}") as error:
        load_encoder(TEST_VIT, str(tmp_path / "weights.pth"), None)
    assert "\n" not in str(error.value)


def test_a_damaged_safetensors_file_is_one_line(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="weights.safetensors: not a safetensors file, or damaged") as error:
        load_encoder(TEST_VIT, str(tmp_path / "weights.safetensors"), None)
    assert "\n" not in str(error.value)


def test_old_names_of_densenets_are_understood(tmp_path):
    torch.manual_seed(0)
    state = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name): value for name, value in state.items()}
    torch.save(old, tmp_path / "old.pth")
    loaded = load_encoder("densenet121.features.denseblock1", str(tmp_path / "old.pth"), 64).body.state_dict()
    assert any("denselayer2.conv2" in name for name in loaded)
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def cache_in_hub(hub, name, state):
    """Store a state dict in the hub's cache as if it had been downloaded."""
    folder = hub / f"models--timm--{name}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(state, folder / "snapshots" / "abc" / "model.safetensors")


def test_published_weights_come_from_the_hubs_cache_and_their_licence_is_said(hub, capsys):
    torch.manual_seed(7)
    state = timm.create_model("test_vit").state_dict()
    cache_in_hub(hub, "test_vit.r160_in1k", state)
    encoder = load_encoder(TEST_VIT, None, 192)
    assert (
        "timm/test_vit.r160_in1k: published weights, licence apache-2.0, from the hub's cache"
        in capsys.readouterr().out
    )
    assert torch.equal(encoder.body.network.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert encoder.weights == "pretrained" and encoder.output_shape()[:2] == (12, 12)
    shutil_hub = hub.rename(hub.with_name("elsewhere"))  # a checkpoint needs no other file
    assert encoder_from_checkpoint({"encoder": encoder.to_checkpoint()}).recipe() == encoder.recipe()
    assert shutil_hub.exists()


def test_offline_one_line_says_what_to_download(capsys):
    with pytest.raises(
        UserError, match=r"cannot be downloaded .*huggingface.co/timm/test_vit.r160_in1k.*--weights FILE$"
    ) as error:
        load_encoder(TEST_VIT, None, None)
    assert "\n" not in str(error.value)
    assert "downloading its published weights, licence apache-2.0, about 1 MB" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no published weights; give --weights FILE, or random"):
        load_encoder("timm/test_mambaout", None, None)
    with pytest.raises(UserError, match="the published weights of timm/test_vit.r160_in1k are --weights pretrained"):
        load_encoder(TEST_VIT, "imagenet", None)


def test_the_real_efficientnet_recognises_photos_at_two_sizes(shared):
    """Its own classifier, on the mean of the cells, names what is on COCO's photos."""
    path = shared / "weights" / "tf_efficientnet_lite2_imagenet.pth"
    classifier = torch.load(path, weights_only=True)
    classes = {"train2017/000000281789": 340, "val2017/000000019221": 937, "val2017/000000073326": 760}
    for size, side in ((256, 8), (384, 12)):
        encoder = load_encoder("timm/tf_efficientnet_lite2", str(path), size)
        assert encoder.output_shape() == (side, side, 1280)
        files = [shared / "coco_mini" / f"{name}.jpg" for name in classes]  # a zebra, broccoli, a refrigerator
        batch = torch.stack([encoder.transform.resize(encoder.transform.open(file)) for file in files])
        with torch.no_grad():
            logits = encoder(batch).mean() @ classifier["classifier.weight"].float().T
        assert (logits + classifier["classifier.bias"]).argmax(1).tolist() == list(classes.values())
    with pytest.raises(UserError, match="not of timm/tf_efficientnet_lite1"):
        load_encoder("timm/tf_efficientnet_lite1", str(path), 256)


# ---- extraction, captioning, training, export


def extract(data, out, **settings):
    extract_features.main(
        ExtractFeatures(data, encoder=TEST_VIT, out=out, **{"weights": "random", **EXTRACT, **settings})
    )


def test_an_extraction_resumes_to_the_same_bytes_and_verifies(small_data, tmp_path, capsys):
    extract(small_data, tmp_path / "one.h5")
    (tmp_path / "two.encoder.pt").write_bytes((tmp_path / "one.encoder.pt").read_bytes())
    extract(small_data, tmp_path / "two.h5")
    done = FeatureReader(tmp_path / "two.h5").arrays["done"]
    with open(tmp_path / "two.h5", "r+b") as file:
        file.seek(done.offset + 8)
        file.write(bytes(8))
    extract(small_data, tmp_path / "two.h5")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    capsys.readouterr()
    extract(small_data, tmp_path / "two.h5", verify=True)
    assert "24 of 24 rows are done and undamaged; 24 encoded again differ by at most 0.0" in capsys.readouterr().out
    extract(small_data, tmp_path / "two.h5", info=True)
    printed = " ".join(capsys.readouterr().out.split())
    for expected in ("encoder timm/test_vit.r160_in1k", "interpolation bicubic", "mean [0.5, 0.5, 0.5]", "pooled mean"):
        assert expected in printed


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_size": 48}, "was extracted with image_size 32, not 48"),
        ({"pooled": "class"}, "was extracted with pooled mean, not class"),
        ({"encoder": "timm/test_vit2"}, "was extracted with encoder timm/test_vit.r160_in1k, not timm/test_vit2"),
    ],
)
def test_features_of_another_recipe_are_refused(settings, message, small_data, tmp_path):
    extract(small_data, tmp_path / "f.h5")
    with pytest.raises(UserError, match=message):
        extract_features.main(
            ExtractFeatures(
                small_data, out=tmp_path / "f.h5", **{"encoder": TEST_VIT, "weights": "random", **EXTRACT, **settings}
            )
        )


def test_features_that_half_precision_cannot_hold_are_one_line_and_no_row_is_done(small_data, tmp_path):
    torch.save(timm_state("test_vit") | {"norm.weight": torch.full((64,), 1e6)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="features too large for float16, or not finite"):
        extract(small_data, tmp_path / "f.h5", weights=str(tmp_path / "w.pth"))
    assert not FeatureReader(tmp_path / "f.h5").done().any()


def test_lstm_reads_the_class_token_from_the_cache_and_from_photos(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extract(small_data, tmp_path / "f.h5", pooled="class", dtype="float32")
    extract(small_data, tmp_path / "f.h5", verify=True)
    settings = {"features": (tmp_path / "f.h5",), "epochs": 1, "precision": "float32", **QUICK}
    for decoder in ("lstm", "attention"):
        train.main(Train(small_data, decoder, decoder=decoder, **settings))
    reader = FeatureReader(tmp_path / "f.h5")
    paths = [small_data / "photos" / f"{i}.png" for i in range(4)]
    for decoder, read in (("lstm", reader.read_pooled), ("attention", reader.read)):
        captioner = Captioner.load(f"checkpoints/{decoder}", "cpu", "float32")
        cached = captioner.caption_grid(read(np.arange(4)))
        live = captioner.caption(paths)
        assert [caption.text for caption in live] == [caption.text for caption in cached]
        for one, other in zip(live, cached, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    encoder = Captioner.load("checkpoints/lstm", "cpu", "float32").encoder
    batch = torch.stack([encoder.transform.resize(encoder.transform.open(path)) for path in paths])
    with torch.no_grad():
        tokens = encoder.body.network.forward_features(encoder.transform.normalise(batch))
    torch.testing.assert_close(torch.from_numpy(reader.read_stored(np.arange(4), "pooled")), tokens[:, 0])


def test_fine_tuning_changes_the_unfrozen_blocks_alone(small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(timm_state("test_vit"), "w.pth")
    encoder = {"encoder": TEST_VIT, "weights": "w.pth", "image_size": 32, "workers": 0}
    special = {"unfreeze_from": "blocks.4", "layer_decay": 0.7, "drop_path": 0.2, "checkpoint_activations": True}
    train.main(Train(small_data, "tuned", fine_tune=True, epochs=1, precision="float32", **encoder, **special, **QUICK))
    before = load_encoder(TEST_VIT, "w.pth", 32).body.state_dict()
    saved = load_checkpoint(Path("checkpoints/tuned"))["encoder"]
    changed = {
        name.removeprefix("network.") for name, value in saved["state"].items() if not torch.equal(value, before[name])
    }
    assert {name.partition(".")[0] for name in changed} == {"blocks", "norm"}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"4", "5"}
    assert encoder_from_checkpoint({"encoder": saved}).weights == "w.pth, fine-tuned in checkpoints/tuned"


def test_an_unknown_layer_is_refused_with_the_blocks_there_are():
    with pytest.raises(UserError, match="blocks.9: .* has only cls_token, .*, blocks .*0 to .5., norm; give one"):
        random_encoder("test_vit", 32).unfreeze("blocks.9")


@pytest.mark.parametrize(
    "name, first, last",
    [("test_vit", "pos_embed", "norm.weight"), ("test_convnext", "stem.0.weight", "stages.3.blocks.0.norm.weight")],
)
def test_layer_decay_lowers_the_learning_rate_towards_the_photo(name, first, last):
    encoder = random_encoder(name, 64)
    encoder.unfreeze("all")
    groups = layer_decay_groups(encoder.layers(), "encoder_learning_rate", 0.1, 0.5)
    named = dict(encoder.body.network.named_parameters())
    scale = {id(parameter): group["scale"] for group in groups for parameter in group["params"]}
    assert scale.keys() == {id(parameter) for parameter in named.values()}
    assert scale[id(named[last])] == 1 and groups[-1]["scale"] == 1
    assert scale[id(named[first])] == min(scale.values()) == 0.5 ** (len(encoder.layers()) - 1)
    if name == "test_vit":
        scales = [scale[id(named[f"blocks.{block}.mlp.fc1.weight"])] for block in range(6)]
        assert scales == [0.5 ** (5 - block) for block in range(6)]  # the norm belongs to the last block
    with pytest.raises(UserError, match="--layer-decay: requires a timm/ encoder"):
        Encoder("resnet18", "random", Transform(64)).layers()


def test_activations_that_cannot_be_recomputed_are_one_line():
    with pytest.raises(UserError, match="--checkpoint-activations: timm cannot recompute the activations"):
        random_encoder("vgg11", 64).checkpoint_activations()


def test_drop_path_is_random_in_training_alone():
    encoder = random_encoder("test_vit", 32, drop_path=0.5)
    one = encoder(photos(8, 32)).cells
    assert torch.equal(one, encoder(photos(8, 32)).cells)
    encoder.train_mode(batch_norm=False)
    torch.manual_seed(0)
    assert not torch.allclose(one, encoder(photos(8, 32)).cells)
    assert not any(module.training for module in encoder.modules() if isinstance(module, (nn.Dropout, nn.LayerNorm)))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_recomputed_activations_give_the_same_gradients(name):
    encoder = random_encoder(name, 64)

    def gradients():
        encoder.zero_grad()
        encoder(photos()).cells.square().mean().backward()
        return [parameter.grad for parameter in encoder.parameters()]

    stored = gradients()
    encoder.checkpoint_activations()
    for one, other in zip(stored, gradients(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_the_exported_encoder_equals_the_encoder_for_any_number_of_photos(name, times):
    if name in times(("convnext_atto", "swin_tiny_patch4_window7_224"), ()):
        pytest.skip("long form: make torture")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if torch.__version__ < "2.13":
        pytest.skip("older versions of torch are refused by the export")
    size = 224 if name.startswith("swin") else 64
    encoder = random_encoder(name, size)
    module = ExportModule(encode, (encoder,), {"photos": photos(2, size)}, ["cells"])
    session = onnxruntime.InferenceSession(export_module("encoder", module, "onnx"))
    for count in (1, 3):
        batch = photos(count, size, seed=count)
        with torch.no_grad():
            expected = encoder(batch).cells
        (cells,) = session.run(None, {"photos": batch.numpy()})
        np.testing.assert_allclose(cells, expected, rtol=1e-3, atol=1e-4)


def test_an_encoder_is_restored_from_its_checkpoint(tmp_path):
    encoder = random_encoder("swin_tiny_patch4_window7_224", seed=3)
    save_checkpoint(tmp_path / "e.pt", {"encoder": encoder.to_checkpoint()})
    restored = encoder_from_checkpoint(read_checkpoint(tmp_path / "e.pt", ["encoder"], ""))
    assert restored.recipe() == encoder.recipe() and restored.transform.interpolation == "bicubic"


def test_the_table_of_the_page_is_the_output_of_its_script(monkeypatch, times):
    monkeypatch.undo()  # the networks of their real size; they are built without memory
    script = bench("encoder_sizes")
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text("utf-8")
    rows = times(script.ROWS[1:3] + script.ROWS[6:7], script.ROWS)
    assert [line for line in script.table(rows).splitlines() if line not in page.splitlines()] == []
    encoders = re.findall(r"^\| `((?:timm/)?[\w.]+)`", page, re.MULTILINE)
    assert [row.encoder for row in script.ROWS] == encoders


def test_a_model_card_has_the_licence_that_timm_knows():
    name = "timm/vit_base_patch16_clip_224.openai"
    assert encoder_licence({"name": name, "weights": "pretrained, fine-tuned in checkpoints/a"}) == "apache-2.0"
