"""tools/visualize_attention.py --phrase: heatmaps of what MMDetection's text detectors read."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import visualize_attention
from PIL import Image
from torch import Tensor

from plugin_core.inspection import phrases as phrase_pictures
from plugin_core.inspection import sheets
from plugin_core.inspection.attention_maps import Caption, Detector

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "mm"))

GROUNDING = ("grounding-dino", "glip")
PHRASES = ("the red disk", "the small square")
TEXT = "The small square, the Red disk."
# With settings of published configs that would leave no heatmap
CONFIG = """
_base_ = "{root}/configs/mm/synthetic/{name}_r50_synthetic.py"
model = dict(language_model=dict(name="{text_model}"), test_cfg=dict(chunked_size=1){more})
"""
MORE = {
    "grounding-dino": ", encoder=dict(num_cp=1)",
    "glip": ', bbox_head=dict(use_checkpoint=True, lang_model_name="{text_model}")',
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a detector's name, the path of its config, beside model.pth of random weights."""
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from grounding_detectors import build, write_text_model
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    from mm_plugins.analysis import load_config

    register_all_modules(init_default_scope=False)
    made: dict[str, Path] = {}

    def config_of(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            wide = ("--hidden-size", "768", "--heads", "12", "--layers", "1")
            text_model = write_text_model(folder / "text", *(wide if name == "glip" else ()))
            more = MORE[name].format(text_model=text_model)
            config = folder / "config.py"
            config.write_text(CONFIG.format(root=ROOT, name=name, text_model=text_model, more=more))
            model = load_config(str(config)).model
            model.get("encoder", model.bbox_head).pop("num_cp", None)
            model.test_cfg.chunked_size = -1
            with DefaultScope.overwrite_default_scope("mmdet"):
                torch.save({"state_dict": build(model).state_dict()}, folder / "model.pth")
            made[name] = config
        return made[name]

    return config_of


@pytest.fixture(scope="session")
def grounding_dino(trained: Any) -> Detector:
    return load(trained("grounding-dino"))


load_once = functools.cache(visualize_attention.load)


@pytest.fixture(autouse=True)
def _load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visualize_attention, "load", load_once)


def load(config: Path) -> Any:
    weights = str(config.with_name("model.pth"))
    return load_once("mm_plugins", str(config), weights, False)


@pytest.fixture(scope="session")
def image(drawn_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Not a square, so that the input is padded."""
    path = tmp_path_factory.mktemp("images") / "wide.png"
    first = min((drawn_coco / "val2017").glob("*.jpg"))
    Image.open(first).crop((0, 8, 64, 48)).save(path)
    return str(path)


@pytest.fixture
def heats(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The heatmaps that are drawn."""
    found: list[Tensor] = []
    draw = sheets.with_colours

    def note(picture: np.ndarray, heat: Tensor) -> np.ndarray:
        found.append(heat)
        return draw(picture, heat)

    monkeypatch.setattr(phrase_pictures, "with_colours", note)
    yield found


def argv_of(config: Path | str, image: str, out: Path, *more: str) -> list[str]:
    weights = Path(config).with_name("model.pth")
    return [str(config), image, "--weights", str(weights), "--out", str(out), *more]


def phrases(*words: str) -> list[str]:
    return [argument for phrase in words for argument in ("--phrase", phrase)]


def error_of(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        visualize_attention.main(argv)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert not Path(argv[argv.index("--out") + 1]).exists(), "nothing is drawn"
    return message


def plain_config(config: Path) -> Path:
    """The config without what this project adds."""
    from mm_plugins.analysis import load_config

    cfg = load_config(str(config))
    cfg.model.type = cfg.model.type.removeprefix("Plugin")
    del cfg.model["heatmap"]
    cfg.dump(config.with_name("plain.py"))
    return config.with_name("plain.py")


def predicted_heatmaps(config: Path, image: str, text: dict[str, Any]) -> Tensor:
    """Those that a detector predicts of an image that is annotated with two phrases."""
    from mmengine.structures import InstanceData

    detector = load(config)
    picture = detector.read(image)
    sample = picture.meta
    sample.set_metainfo(text)
    boxes = torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
    data = {"inputs": [picture.pixels[0]], "data_samples": [sample]}
    model: Any = detector.model
    return model.test_step(data)[0].phrase_heatmaps.heatmaps


@pytest.mark.parametrize("name", GROUNDING)
def test_each_phrase_has_a_row_and_a_picture_of_its_own(name, trained, image, tmp_path, capsys):
    out = tmp_path / "new" / "pictures"
    visualize_attention.main(argv_of(trained(name), image, out, *phrases(*PHRASES)))
    files = ["wide_attention.png", "wide_phrase-2.png", "wide_phrase.png"]
    assert sorted(os.listdir(out)) == files
    for file in files[1:]:
        assert Image.open(out / file).size == (64, 40)
    assert f"1 of 1 images: {out}/*_attention.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", GROUNDING)
def test_heatmaps_of_a_list_are_those_of_the_pointing_game(name, trained, image, tmp_path, heats):
    visualize_attention.main(argv_of(trained(name), image, tmp_path, *phrases(*PHRASES)))
    text = {"text": PHRASES, "custom_entities": True}
    expected = predicted_heatmaps(trained(name), image, text)
    assert expected.shape == (2, 40, 64) and expected[0].any() and expected[1].any()
    torch.testing.assert_close(torch.stack(heats), expected)
    assert not torch.equal(*expected)


def test_heatmaps_of_a_text_are_of_its_spans_and_a_plain_detector_has_them_too(
    trained, image, tmp_path, heats
):
    config = trained("grounding-dino")
    argv = [*phrases(*PHRASES), "--text", TEXT]
    visualize_attention.main(argv_of(config, image, tmp_path, *argv))
    text = {"text": TEXT, "tokens_positive": [[[18, 30]], [[0, 16]]]}
    torch.testing.assert_close(torch.stack(heats), predicted_heatmaps(config, image, text))
    visualize_attention.main(argv_of(plain_config(config), image, tmp_path, *argv))
    assert torch.equal(heats[0], heats[2]) and torch.equal(heats[1], heats[3])


def test_the_row_has_the_best_detection_and_marks_the_maximum(grounding_dino, image, heats):
    detector = grounding_dino
    assert detector.class_names == ()
    caption = Caption(PHRASES)
    ground = detector.grounder(caption)
    found = ground(detector.read(image))
    rows = phrase_pictures.phrase_rows(detector, ground, caption, image)
    assert [row.title for row in rows] == list(PHRASES)
    layer = "encoder.fusion_layers.1.attn"
    for number, row in enumerate(rows):
        best = found.detections.best(number)
        title, heat = row.panels[0].title, row.panels[1]
        if best is None:
            assert title == "no detection"
        else:
            assert title == f"score {found.detections.scores[best]:.2f}"
        assert heat.title == f"heatmap, its maximum marked\n{layer}"
        y, x = divmod(int(heats[number].argmax()), 64)
        assert (heat.picture[y, x] == 255).all()
    hooks = [h for m in detector.model.modules() for h in m._forward_hooks.values()]
    assert hooks == []


def test_phrase_without_a_detection_is_drawn_all_the_same(trained, image, monkeypatch):
    detector = load(trained("glip"))
    monkeypatch.setitem(detector.model.bbox_head.test_cfg, "score_thr", 1.0)
    caption = Caption(PHRASES[:1])
    rows = phrase_pictures.phrase_rows(detector, detector.grounder(caption), caption, image)
    assert rows[0].panels[0].title == "no detection"
    assert np.array_equal(rows[0].panels[0].picture, np.asarray(Image.open(image)))


def test_layer_names_another_activation(trained, image, tmp_path, monkeypatch, heats):
    rows: list[Any] = []
    monkeypatch.setattr(visualize_attention, "write", lambda r, *_: rows.extend(r))
    config = trained("grounding-dino")
    visualize_attention.main(argv_of(config, image, tmp_path, "--phrase", PHRASES[0]))
    argv = ["--phrase", PHRASES[0], "--layer", "neck"]
    visualize_attention.main(argv_of(config, image, tmp_path, *argv))
    assert rows[1].panels[1].title.endswith("\nneck")
    assert not torch.equal(*heats)


def test_cross_is_white_in_black_and_at_its_pixel():
    drawn = sheets.with_cross(np.full((20, 24, 3), 100, np.uint8), 8, 10)
    assert {tuple(colour) for row in drawn.tolist() for colour in row} == {
        (100,) * 3,
        (0,) * 3,
        (255,) * 3,
    }
    white = (drawn == 255).all(2)
    assert white.sum() == 17 and white[8, 6:15].all() and white[4:13, 10].all()
    assert sheets.with_cross(drawn, 0, 23).shape == drawn.shape


def test_dollars_in_a_phrase_are_no_formula(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    rows = [sheets.Row("from $5_ to ^$6", [sheets.Panel("$_$", image)])]
    sheets.write(rows, "a.jpg", tmp_path)
    assert (tmp_path / "a_attention.png").exists()


def test_whole_words_come_first_and_case_does_not_matter():
    assert Caption(("red",), "The reddish one, the RED one").spans() == [(21, 24)]
    assert Caption(("red",), "The reddish one").spans() == [(4, 7)]


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--phrase", " "], "--phrase: it is empty"),
        (["--phrase", "red", "--phrase", "."], "--phrase: it is empty"),
        (
            ["--phrase", "a dog", "--text", TEXT],
            f"--phrase: 'a dog' does not occur in the text {TEXT!r}",
        ),
        (["--text", TEXT], "--text: the text that phrases stand in; name one by --phrase"),
        (["--phrase", "red", "--class", "0"], "--class: of detectors with classes"),
        (["--phrase", "red", "--methods", "gradcam"], "--methods: of detectors with classes"),
        (["--phrase", "red", "--baseline", "mmdet::x.py", "y"], "--baseline: of detectors with"),
        (["--phrase", "red", "--layer", "a", "--layer", "b"], "--layer b: the heatmap of a phrase"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_loaded(argv, text, image, tmp_path):
    assert text in error_of(argv_of("mmdet::x.py", image, tmp_path / "out", *argv))


def test_detectors_of_detectron2_read_no_text(image, tmp_path):
    (tmp_path / "some.yaml").touch()
    argv = argv_of(tmp_path / "some.yaml", image, tmp_path / "out", "--phrase", "red")
    assert "some.yaml is no config of MMDetection, whose detectors alone read a text" in error_of(
        argv
    )


def test_detector_that_reads_a_text_asks_for_a_phrase(trained, image, tmp_path):
    message = error_of(argv_of(trained("grounding-dino"), image, tmp_path / "out"))
    assert message.endswith("GroundingDINO reads a text; name what to look for by --phrase")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["--layer", "nek"],
            "--layer: must be a module of the detector, got 'nek'; similar names: neck",
        ),
        (["--layer", "encoder"], "--layer: must name one fusion layer, got 'encoder' with 2"),
        (["--phrase", "(it)"], "phrase '(it)': it has no words, or not all of them are among"),
        (["--text", "disk " * 62 + "red"], "among the first 64 tokens of the text"),
    ],
)
def test_what_the_detector_cannot_do_is_an_error(argv, text, grounding_dino, image, tmp_path):
    argv = argv_of("mmdet::x.py", image, tmp_path, "--phrase", "red", *argv)
    args = visualize_attention.parse_args(argv)
    caption = visualize_attention.choose_caption(args, "mm_plugins")
    with pytest.raises(ValueError) as error:
        phrase_pictures.choose_grounder(
            grounding_dino, caption, args.layer[0] if args.layer else None
        )
    assert text in str(error.value)


@pytest.mark.parametrize("plain", [False, True])
def test_missing_text_model_is_one_line_that_says_what_to_fetch(plain, trained, image, tmp_path):
    from mm_plugins.analysis import load_config

    cfg = load_config(str(trained("grounding-dino")))
    cfg.model.language_model.name = str(tmp_path / "nothing")
    if plain:
        cfg.model.type = cfg.model.type.removeprefix("Plugin")
        del cfg.model["heatmap"]
    cfg.dump(tmp_path / "config.py")
    message = error_of(argv_of(tmp_path / "config.py", image, tmp_path / "out", "--phrase", "red"))
    assert "language_model.name: the text model" in message and "`hf download" in message
    assert message.count("hf download") == 1


def test_layer_that_the_score_does_not_depend_on_is_reported(trained, image, tmp_path, capsys):
    argv = ["--phrase", "red", "--layer", "bbox_head.reg_branches.0"]
    with pytest.raises(SystemExit, match="no picture was made"):
        visualize_attention.main(argv_of(trained("grounding-dino"), image, tmp_path, *argv))
    said = capsys.readouterr().err
    assert "--layer: must name a module" in said and "bbox_head.reg_branches.0" in said
