"""BatchFormerV2 in the encoders of MMDetection's detectors: the batch doubles, the rest stays."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from batchformer_detectors import (
    CLASSES,
    CONFIGS,
    DETECTORS,
    batch,
    build,
    model_config,
    with_batchformer,
    without_dropout,
    write_tiny_bert,
)
from mmdet.models.detectors import DETR
from mmdet.models.layers import DetrTransformerEncoder
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.model import ExponentialMovingAverage

from mm_plugins.batchformer import BatchFormerMixin, BatchFormers, TwoStreamEncoder, repeat
from plugin_core import BatchFormer
from plugin_core.errors import ArgumentError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
EVERY_DETECTOR = pytest.mark.parametrize("name", DETECTORS)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(
        "transformers", reason="transformers, which Grounding DINO needs, is absent"
    )
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny")


def config(name: str, request: pytest.FixtureRequest) -> Any:
    bert = request.getfixturevalue("tiny_bert") if name == "Grounding DINO" else None
    return model_config(name, bert)


def encoder_of(detector: nn.Module) -> DetrTransformerEncoder:
    (encoder,) = (m for m in detector.modules() if isinstance(m, DetrTransformerEncoder))
    return encoder


def loss_of(detector: nn.Module, data: dict) -> Tensor:
    torch.manual_seed(1)
    loss, _ = detector.parse_losses(detector(**copy.deepcopy(data), mode="loss"))
    return loss


def predictions(detector: nn.Module, data: dict) -> list[Tensor]:
    with torch.no_grad():
        samples = detector(**copy.deepcopy(data), mode="predict")
    found = []
    for sample in samples:
        for kind in ("pred_instances", "pred_panoptic_seg"):
            if kind in sample:
                found += [v for _, v in sample.get(kind).items() if isinstance(v, Tensor)]
    return found


# ---------------------------------------------------------------------------------- every detector


@EVERY_DETECTOR
def test_batch_doubles_behind_the_insertion_and_the_losses_train_the_batchformer(name, request):
    detector = build(with_batchformer(config(name, request), insert_after=(1,)))
    encoder = encoder_of(detector)
    sizes: list[tuple[str, int]] = []
    watched = [("backbone", detector.backbone)]
    watched += [(f"layer{i}", layer.self_attn) for i, layer in enumerate(encoder.layers)]
    if hasattr(detector, "decoder"):
        watched.append(("decoder", detector.decoder.layers[0]))
    if hasattr(detector, "language_model"):
        watched.append(("text", detector.language_model.language_backbone.body.model))
    for label, module in watched:
        module.register_forward_hook(
            lambda module, args, kwargs, out, label=label: sizes.append(
                (label, len(next(v for v in [*args, *kwargs.values()] if isinstance(v, Tensor))))
            ),
            with_kwargs=True,
        )
    detector.train()
    loss = loss_of(detector, batch(detector, True))
    loss.backward()
    assert torch.isfinite(loss)
    expected = {"backbone": 2, "text": 2, "layer0": 2, "layer1": 2, "layer2": 4, "decoder": 4}
    assert sizes == [(label, expected[label]) for label, _ in sizes]
    assert {label for label, _ in sizes} == {label for label, _ in watched}
    parameters = dict(encoder.batchformer.named_parameters())
    assert {key.split(".")[0] for key in parameters} == {"1"}
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())


@EVERY_DETECTOR
def test_evaluation_is_the_plain_detectors_to_the_last_bit(name, request):
    cfg = config(name, request)
    plain = build(cfg).eval()
    detector = build(with_batchformer(cfg, insert_after=(0, 2)), weights_of=plain).eval()
    data = batch(plain, False)
    expected = predictions(plain, data)
    assert expected
    assert all(
        torch.equal(a, b) for a, b in zip(predictions(detector, data), expected, strict=True)
    )
    theirs = {
        key: value for key, value in detector.state_dict().items() if "batchformer" not in key
    }
    assert theirs.keys() == plain.state_dict().keys()
    detector.train()
    loss_of(detector, batch(detector, True))  # a training step leaves nothing behind
    detector.eval()
    detector.load_state_dict(plain.state_dict(), strict=False)
    assert all(
        torch.equal(a, b) for a, b in zip(predictions(detector, data), expected, strict=True)
    )


class Unchanged(nn.Module):
    """A BatchFormer that leaves the second stream as the first."""

    gather = False

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


# Mask2Former draws the points of its loss for each stream.
@pytest.mark.parametrize("name", [n for n in DETECTORS if n != "Mask2Former"])
def test_losses_are_means_over_both_streams_and_so_compare_with_the_plain_detectors(name, request):
    cfg = config(name, request)
    if "dn_cfg" in cfg:  # its noise is drawn for each stream
        cfg.dn_cfg.update(label_noise_scale=1e-9, box_noise_scale=1e-9)
    plain = without_dropout(build(cfg)).train()
    detector = without_dropout(build(with_batchformer(cfg), weights_of=plain)).train()
    encoder_of(detector).batchformer["0"] = Unchanged()
    data = batch(plain, True)
    data["data_samples"][1].set_metainfo({"text": CLASSES[::-1]})  # of Grounding DINO
    losses = [m(**copy.deepcopy(data), mode="loss") for m in (detector, plain)]
    # DDQ divides its auxiliary losses by the number of targets' weights, or by 1 if that is less.
    losses = [{k: v for k, v in all_.items() if "aux" not in k} for all_ in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def train_a_step(detector: nn.Module, optimizer: torch.optim.Optimizer, data: dict) -> None:
    optimizer.zero_grad()
    loss, _ = detector.parse_losses(detector(**copy.deepcopy(data), mode="loss"))
    loss.backward()
    optimizer.step()


# Encoders with one level and several, denoising, names that change, and masks
@pytest.mark.parametrize("name", ["DETR", "two-stage", "DDQ", "Mask2Former"])
def test_training_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(name, request):
    cfg = with_batchformer(config(name, request), insert_after=(0, 2))
    detector = build(cfg).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    data = batch(detector, True)
    train_a_step(detector, optimizer, data)
    checkpoint = copy.deepcopy((detector.state_dict(), optimizer.state_dict()))
    random_state = torch.get_rng_state(), np.random.get_state()
    train_a_step(detector, optimizer, data)

    resumed = build(cfg).train()
    # DDQ gives some modules a second name in its first step.
    assert not resumed.load_state_dict(checkpoint[0], strict=False).missing_keys
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    optimizer.load_state_dict(checkpoint[1])
    torch.set_rng_state(random_state[0])
    np.random.set_state(random_state[1])
    train_a_step(resumed, optimizer, data)
    expected = detector.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())
    assert any(not torch.equal(v, checkpoint[0][k]) for k, v in expected.items() if "batchf" in k)


# ------------------------------------------------------------------------------- published numbers


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"batchformer_v2_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


RENAMED = {
    "self_attn.": "self_attn.attn.",
    "linear1.": "ffn.layers.0.0.",
    "linear2.": "ffn.layers.1.",
    "norm1.": "norms.0.",
    "norm2.": "norms.1.",
}


def mmdet_name(key: str) -> str:
    kind, index, rest = key.removeprefix("state/").split(".", 2)
    if kind == "bf":
        return f"batchformer.{index}.layers.0.{rest}"
    for theirs, ours in RENAMED.items():
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
            break
    return f"layers.{index}.{rest}"


@pytest.mark.parametrize("name", ["first", "two"])
def test_detrs_encoder_gives_the_authors_numbers(name):
    numbers = golden(name)
    encoder = DetrTransformerEncoder(
        num_layers=3,
        layer_cfg={
            "self_attn_cfg": {"embed_dims": 32, "num_heads": 4, "dropout": 0.0},
            "ffn_cfg": {
                "embed_dims": 32,
                "feedforward_channels": 64,
                "num_fcs": 2,
                "ffn_drop": 0.0,
                "act_cfg": {"type": "ReLU", "inplace": True},
            },
        },
    )
    insert_after = (0,) if name == "first" else (0, 2)
    encoder.batchformer = BatchFormers(32, 3, insert_after, dropout=0.0)
    state = {mmdet_name(key): v for key, v in numbers.items() if key.startswith("state/")}
    encoder.load_state_dict(state, strict=True)
    inputs = {
        "query": numbers["src"].transpose(0, 1),
        "query_pos": numbers["pos"].transpose(0, 1),
        "key_padding_mask": numbers["key_padding_mask"],
    }
    encoder.eval()
    out = encoder(**inputs).transpose(0, 1)
    torch.testing.assert_close(out, numbers["out_eval"], rtol=0, atol=1e-5)
    encoder.train()
    out = TwoStreamEncoder(encoder, map_size=(1, 1))(**repeat(inputs)).transpose(0, 1)
    torch.testing.assert_close(out, numbers["out_train"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------- settings


def detr(**batchformer: Any) -> nn.Module:
    return build(with_batchformer(model_config("DETR"), **batchformer))


def test_authors_settings_are_the_default():
    streams = encoder_of(detr()).batchformer
    (module,) = streams.values()
    assert list(streams) == ["0"]
    assert isinstance(module, BatchFormer) and not module.gather and len(module.layers) == 1
    layer = module.layers[0]
    assert (layer.self_attn.num_heads, layer.linear1.out_features, layer.dropout.p) == (4, 256, 0.5)
    assert not (streams.share or streams.mask_padding or streams.in_evaluation)


def test_insertions_share_one_module_where_that_is_asked_for():
    shared = encoder_of(detector := detr(insert_after=(0, 2), share=True)).batchformer
    assert list(shared) == ["0"]
    calls = []
    shared["0"].register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    loss_of(detector.train(), batch(detector, True))
    assert calls == [2, 2]


def test_settings_reach_the_module():
    streams = encoder_of(detr(num_layers=2, num_heads=8, dropout=0.1, gather=True)).batchformer
    module = streams["0"]
    assert len(module.layers) == 2 and module.gather
    assert module.layers[1].self_attn.num_heads == 8 and module.layers[1].dropout.p == 0.1


@pytest.mark.parametrize("name", ["DETR", "Deformable DETR", "DAB-DETR"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_padding_is_masked_where_that_is_asked_for(name, mask_padding):
    cfg = with_batchformer(model_config(name), insert_after=(0, 2), mask_padding=mask_padding)
    detector = build(cfg)
    masks = []
    for module in encoder_of(detector).batchformer.values():
        module.register_forward_pre_hook(lambda module, args: masks.append(args))
    loss_of(detector.train(), batch(detector, True))
    assert len(masks) == 2
    for x, mask, _ in masks:
        if mask_padding:
            assert mask.shape == x.shape[:2] and mask.any() and not mask.all()
        else:
            assert mask is None


def test_batch_inference_is_evaluation_in_which_images_see_one_another():
    detectors = [detr(eval=given).eval() for given in (True, False)]
    detectors[1].load_state_dict(detectors[0].state_dict())
    x = torch.randn(2, 6, 256)
    inputs = {"feat": x, "feat_pos": torch.zeros_like(x), "feat_mask": None}
    together, plain = (m.forward_encoder(**inputs)["memory"] for m in detectors)
    assert together.shape == plain.shape and not torch.allclose(together, plain)
    first, *others = detectors[1].encoder.layers
    (module,) = detectors[1].batchformers.values()
    expected = module(first(x, inputs["feat_pos"], None))
    for layer in others:
        expected = layer(expected, inputs["feat_pos"], None)
    torch.testing.assert_close(together, expected)


def test_batch_inference_of_a_pixel_decoder():
    cfg = model_config("MaskFormer")
    plain = build(cfg).eval()
    detector = build(with_batchformer(cfg, eval=True), weights_of=plain).eval()
    data = batch(plain, False)
    pairs = [detector(**copy.deepcopy(data), mode="tensor"), plain(**data, mode="tensor")]
    assert [x.shape for x in pairs[0]] == [x.shape for x in pairs[1]]
    assert not torch.allclose(pairs[0][0], pairs[1][0])
    encoder_of(detector).batchformer["0"] = Unchanged()
    assert torch.equal(detector(**data, mode="tensor")[0], pairs[1][0])


def test_single_image_is_warned_about():
    detector = detr().train()
    with pytest.warns(UserWarning, match="single sample"):
        loss_of(detector, batch(detector, True, shapes=((64, 64),)))


def model_config_on_a_list() -> ConfigDict:
    model = model_config("Mask2Former")
    model.backbone = ConfigDict(
        type="PyramidVisionTransformer",
        embed_dims=16,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 2, 5, 8],
        init_cfg=None,
    )
    model.panoptic_head.in_channels = [16, 32, 80, 128]
    return model


def test_backbone_that_gives_a_list_doubles_as_one_that_gives_a_tuple():
    detector = without_dropout(build(with_batchformer(model_config_on_a_list()))).train()
    data = batch(detector, True)
    assert isinstance(detector.extract_feat(data["inputs"]), list)
    sizes = []
    decoder = detector.panoptic_head.transformer_decoder
    decoder.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(len(kwargs["query"])), with_kwargs=True
    )
    decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["query"])), with_kwargs=True
    )
    as_list = loss_of(detector, data)
    forward = detector.backbone.forward
    detector.backbone.forward = lambda x: tuple(forward(x))
    assert torch.equal(loss_of(detector, data), as_list)
    assert sizes and set(sizes) == {4}


def test_features_of_another_number_of_images_are_refused(monkeypatch):
    detector = build(with_batchformer(model_config("Mask2Former"))).train()
    features = detector.extract_feat(batch(detector, True)["inputs"])
    monkeypatch.setattr(detector, "extract_feat", lambda x: [level[:1] for level in features])
    with pytest.raises(ValueError, match="feature maps of 2 images, got those of .1, 1, 1, 1."):
        loss_of(detector, batch(detector, True))


def test_a_batch_is_repeated_in_whatever_holds_it():
    x = torch.arange(2)
    found = repeat({"a": [x, (x, None)], "spatial_shapes": x, "flag": True})
    assert isinstance(found["a"], list) and isinstance(found["a"][1], tuple)
    assert found["a"][0].tolist() == found["a"][1][0].tolist() == [0, 1, 0, 1]
    assert found["spatial_shapes"] is x and found["flag"] is True
    with pytest.raises(TypeError, match="must be of tensors, got a set"):
        repeat((x, {1}))


class OwnListDETR(DETR):
    def loss(self, batch_inputs, batch_data_samples):
        return super().loss(batch_inputs, [*batch_data_samples])


class OwnListDETR2(BatchFormerMixin, OwnListDETR):
    pass


def test_a_detector_that_makes_a_list_of_samples_of_its_own_is_refused():
    cfg = with_batchformer(model_config("DETR"))
    cfg.type = OwnListDETR2
    detector = build(cfg).train()
    with pytest.raises(ValueError, match=r"OwnListDETR2.loss must hand on the list of samples"):
        loss_of(detector, batch(detector, True))
    detector.eval()
    assert loss_of(detector, batch(detector, True)).isfinite()


def test_losses_in_evaluation_are_the_plain_detectors():
    plain = build(model_config("DETR")).eval()
    detector = build(with_batchformer(model_config("DETR")), weights_of=plain).eval()
    data = batch(plain, True)
    assert torch.equal(loss_of(detector, data), loss_of(plain, data))


def test_copy_uses_its_own_batchformer():
    detector = detr().train()
    data = batch(detector, True)
    before = loss_of(detector, data)
    twin = ExponentialMovingAverage(detector).module.train()
    assert torch.equal(loss_of(twin, data), before)
    with torch.no_grad():
        for parameter in encoder_of(twin).batchformer.parameters():
            parameter.normal_()
    assert not torch.equal(loss_of(twin, data), before)
    assert torch.equal(loss_of(detector, data), before)


def test_checkpointed_encoder_trains_the_batchformer_all_the_same():
    detector = without_dropout(detr(dropout=0.0)).train()
    data = batch(detector, True)
    parameters = list(encoder_of(detector).batchformer.parameters())
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:  # as num_cp does it
            for layer in encoder_of(detector).layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        detector.zero_grad()
        loss_of(detector, data).backward()
        gradients.append([p.grad.clone() for p in parameters])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_detector_is_pickled():
    detector = detr().train()
    data = batch(detector, True)
    twin = pickle.loads(pickle.dumps(detector))
    assert type(twin) is type(detector)
    assert torch.equal(loss_of(twin, data), loss_of(detector, data))


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("batchformer", "message"),
    [
        ({"insert_after": (1, 3)}, r"\.insert_after names layer 3; .* layers 0 to 2"),
        ({"insert_after": (-1,)}, r"\.insert_after names layer -1"),
        ({"insert_after": ()}, r"\.insert_after must be a tuple .* such as \(0,\), got \(\)"),
        ({"insert_after": 0}, r"\.insert_after must be a tuple .* got 0"),
        ({"insert_after": (1, 1)}, r"\.insert_after names a layer twice"),
        ({"num_heads": 7}, r"\.num_heads must divide embed_dims"),
        ({"dropout": 1.5}, r"\.dropout must be in \[0, 1\), got 1.5"),
        ({"dropout": True}, r"\.dropout must be in \[0, 1\), got True"),
        ({"dropout": "0.1"}, r"\.dropout must be in \[0, 1\), got '0.1'"),
        ({"share": "no"}, r"\.share must be True or False, got 'no'"),
        ({"mask_padding": 1}, r"\.mask_padding must be True or False, got 1"),
        ({"gather": "False"}, r"\.gather must be True or False, got 'False'"),
        ({"eval": "False"}, r"\.eval must be True or False, got 'False'"),
        ({"insert_befor": (1,)}, r"\.insert_befor is no argument; .* did you mean 'insert_after'"),
        ({"depth": 3}, r"\.depth is no argument"),
    ],
)
def test_wrong_setting_is_named_by_the_constructor(batchformer, message):
    with torch.device("meta"), pytest.raises(ArgumentError, match=f"^batchformer{message}"):
        MODELS.build(with_batchformer(model_config("DETR"), **batchformer))


def test_setting_that_is_no_dict_is_named():
    cfg = with_batchformer(model_config("DETR"))
    cfg.batchformer = 3
    with pytest.raises(ValueError, match=r"^batchformer must be dict\(…\), got 3"):
        MODELS.build(cfg)


def test_detector_without_an_encoder_is_refused():
    base = Config.fromfile(CONFIGS / "retinanet/retinanet_r18_fpn_1x_coco.py").model
    with pytest.raises(ValueError, match="^batchformer is for .*DETR.*; PluginRetinaNet is none"):
        MODELS.build(with_batchformer(base))


@EVERY_DETECTOR
def test_detector_is_built_without_memory_and_without_settings_is_the_plain_one(name, request):
    cfg = with_batchformer(config(name, request))
    with torch.device("cpu" if name == "Grounding DINO" else "meta"):  # transformers needs memory
        names = set(MODELS.build(copy.deepcopy(cfg)).state_dict())
        cfg.batchformer = None
        plain = set(MODELS.build(cfg).state_dict())
    assert plain < names and all("encoder.batchformer.0." in name for name in names - plain)


# ----------------------------------------------------------------------------------- two processes


def step(rank: int) -> tuple[list[Any], Tensor]:
    register_all_modules()
    cfg = with_batchformer(model_config("DETR"), insert_after=(0, 2), gather=True, dropout=0.0)
    detector = without_dropout(build(cfg)).train()
    seen = []
    modules = encoder_of(detector).batchformer.values()
    for module in modules:
        module.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    # Images of different sizes, and so maps: 2×3 and 3×2
    loss = loss_of(detector, batch(detector, True, shapes=((64, 96), (96, 64))[rank : rank + 1]))
    loss.backward()
    largest = [p.grad.abs().max() for module in modules for p in module.parameters()]
    return seen, min(largest)


def test_processes_that_gather_see_the_same_place_of_one_anothers_maps(tmp_path):
    (mine, gradient), (yours, _) = two_processes.run(step, tmp_path)
    assert len(mine) == len(yours) == 2 and gradient > 0
    for i, name in enumerate(("0", "2")):
        x, _, shapes = mine[i][0]
        other, _, other_shapes = yours[i][0]
        assert (shapes, other_shapes) == ([(2, 3)], [(3, 2)])
        cfg = with_batchformer(model_config("DETR"), insert_after=(0, 2), dropout=0.0)
        module = encoder_of(without_dropout(build(cfg))).batchformer[name]
        # Laid out by hand: the other's third column is missing, and its third row not looked at.
        theirs = torch.zeros(1, 2, 3, 256)
        theirs[:, :, :2] = other.unflatten(1, (3, 2))[:, :2]
        padding = torch.tensor([[False] * 6, [False, False, True] * 2])
        expected = module(torch.cat([x, theirs.flatten(1, 2)]), padding)[:1]
        torch.testing.assert_close(mine[i][1], expected, rtol=0, atol=1e-5)
