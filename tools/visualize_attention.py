#!/usr/bin/env python
"""Draw what a trained detector's attention does when it makes a detection.

    tools/visualize_attention.py output/config.yaml --weights output/model_final.pth a.jpg b.jpg \\
        --out pictures
    tools/visualize_attention.py my_config.py --weights epoch_12.pth a.jpg --out pictures \\
        --class dog --baseline mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py plain.pth
    tools/visualize_attention.py my_grounding_config.py --weights iter_1500.pth a.jpg \\
        --out pictures --phrase "the red disk" --text "the red disk, the small square."

A config is one of Detectron2 (.yaml, or .py in LazyConfig's style) or of MMDetection (.py); the one
that a training leaves in its output folder has all settings that it ran with (but a LazyConfig is
taken as .py only). Of each image the
best detection of the class is explained, in a sheet DIR/<image>_attention.png; the main pictures of
the sheet are files of their own too:

    gradcam, gradcam++  what the detection's score depends on in the backbone's last stage
    triplet             the three gates of the last triplet attention
    ida-regions         where IDA's classifier looks in the region of the detection, for its class
    ida-queries         of the last IDA block, the queries that attend most to the detection's box

Of a detector of MMDetection that reads a text (GLIP, Grounding DINO) phrases are explained, each in
a row of the sheet:

    phrase, phrase-2 …  what the phrase's score depends on, as attention mask consistency has it: in
                        the last fusion layer's attention, or in what the config's model.heatmap or
                        --layer names. A cross marks the maximum; the box is the phrase's best
                        detection

Colours go from a map's least value to its greatest.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_sheet import Panel, Row, overlay, with_box, write
from config_kinds import common_side
from phrase_heatmap import check_reads_no_text, choose_caption, choose_grounder, phrase_rows
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from plugin_core import IDABlock, IDAClassifier, TripletAttention
from plugin_core.inspection.attention_maps import (
    Detections,
    Detector,
    Picture,
    Run,
    check_depends_on,
    region_attention,
    run,
    spatial_attention,
)

CAMS = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus"}  # classes of pytorch_grad_cam
ATTENTION = {"triplet": TripletAttention, "ida-regions": IDAClassifier, "ida-queries": IDABlock}
DETECTORS = {"d2_plugins": "Detectron2Detector", "mm_plugins": "MMDetDetector"}
QUERIES = 4  # that are shown of an IDA block


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        rows_of = prepare(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        lines = str(error).splitlines()  # of a library there can be several
        sys.exit(f"error: {' '.join(line.strip() for line in lines)}")
    drawn = 0
    for path in tqdm(args.images, unit="image"):
        try:
            write(rows_of(path), path, args.out)
            drawn += 1
        except ValueError as error:
            warn(f"{path}: {error}")
        except OSError as error:
            sys.exit(f"error: {error}")
    if not drawn:
        sys.exit("error: no picture was made; the warnings above say why")
    print(f"{drawn} of {len(args.images)} images: {args.out}/*_attention.png")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a path, model_zoo://… of Detectron2, or mmdet::…")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--weights", required=True, help="checkpoint of the trained detector")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the pictures")
    parser.add_argument(
        "--class",
        dest="class_",
        metavar="NAME_OR_ID",
        help="what to explain, ids from 0 on (default: the best detection of an image)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*CAMS, *ATTENTION],
        help="what to draw (default: Grad-CAMs and what attention the model has)",
    )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="a module of the model in place of a default: the attention to draw, or the feature "
        "map for Grad-CAMs, such as an FPN's level; may be given several times. With --phrase a "
        "fusion layer or feature maps, such as neck",
    )
    parser.add_argument(
        "--phrase",
        action="append",
        default=[],
        metavar="WORDS",
        help="what to explain of a detector that reads a text; may be given several times",
    )
    parser.add_argument(
        "--text",
        metavar="WORDS",
        help="that the phrases stand in (default: the phrases, as a list of names)",
    )
    parser.add_argument(
        "--baseline",
        nargs=2,
        metavar=("CONFIG", "WEIGHTS"),
        help="a detector, such as one without attention, whose Grad-CAMs to draw below",
    )
    parser.add_argument(
        "--register-coco",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="Detectron2: a dataset of the config, for the classes' names; as tools/train_net.py",
    )
    parser.add_argument(
        "--trust", action="store_true", help="let checkpoints run what they ask to run"
    )
    return parser.parse_args(argv)


# --- before anything is drawn ----------------------------------------------------------------- #


def prepare(args: argparse.Namespace) -> Callable[[str], list[Row]]:
    """Load and check all that is asked for; gives what makes the rows of an image's sheet."""
    side = common_side(args.config, args.baseline and args.baseline[0])
    check_images(args.images)
    caption = choose_caption(args, side)
    register(args.register_coco, side)
    detector = load(side, args.config, args.weights, args.trust)
    if caption is not None:
        ground = choose_grounder(detector, caption, args.layer[0] if args.layer else None)
        return partial(phrase_rows, detector, ground, caption)
    check_reads_no_text(detector)
    layers = choose_layers(detector, args.methods, args.layer)
    class_id = find_class(args.class_, detector.class_names)
    baseline = load(side, *args.baseline, args.trust) if args.baseline else None
    baseline_layer = None
    if baseline is not None:
        baseline_layer = choose_baseline_layer(detector, baseline, layers, args.layer)
    return lambda path: explain(detector, path, class_id, layers, baseline, baseline_layer)


def check_images(paths: Sequence[str]) -> None:
    stems: dict[str, str] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
        except FileNotFoundError:
            raise ValueError(f"there is no image {path!r}") from None
        except (OSError, SyntaxError) as error:  # what Pillow raises for a broken image
            raise ValueError(f"image {path!r} cannot be read: {error}") from error
        other = stems.setdefault(Path(path).stem, path)
        if other != path:
            raise ValueError(f"images {other!r} and {path!r}: their pictures would have one name")


def register(datasets: Sequence[Sequence[str]], side: str) -> None:
    if not datasets:
        return
    if side != "d2_plugins":
        raise ValueError("--register-coco: of Detectron2; MMDetection's config names its dataset")
    from d2_plugins.data import register_coco

    for dataset in datasets:
        register_coco(*dataset)


def load(side: str, config: str, weights: str, trust: bool) -> Detector:
    try:
        module = importlib.import_module(f"{side}.visualization")
        return getattr(module, DETECTORS[side])(config, weights, trust=trust)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{config}: {error}") from error
    except Exception as error:  # of a config's own code
        raise ValueError(f"{config}: {error!r}") from error


def find_class(text: str | None, names: Sequence[str]) -> int | None:
    if text is None:
        return None
    if text in names:
        return names.index(text)
    if text.isdecimal():
        if int(text) < len(names):
            return int(text)
        raise ValueError(
            f"--class {text}: the model has {len(names)} classes, 0 … {len(names) - 1}"
        )
    if names[0] == "0":
        raise ValueError(
            f"--class {text}: the classes' names are not known, give an id from 0 to "
            f"{len(names) - 1}; in Detectron2, --register-coco makes a config's dataset known"
        )
    likely = difflib.get_close_matches(text, names, cutoff=0.4) or names[:10]
    raise ValueError(f"--class {text}: there is no such class; such as {', '.join(likely)}")


def choose_layers(
    detector: Detector, methods: Sequence[str] | None, layers: Sequence[str]
) -> dict[str, str]:
    """What to draw, and the names of the modules that it is drawn of."""
    modules = dict(detector.model.named_modules())
    found = {method: attention_names(detector, method) for method in ATTENTION}
    chosen = {method: names[-1] for method, names in found.items() if names}
    cam_layer = None
    for name in layers:
        if name not in modules:
            known = [n for names in found.values() for n in names]
            likely = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
            raise ValueError(
                f"--layer {name}: the model has no such module; its attention: "
                f"{', '.join(known) or 'none'}; similar names: {', '.join(likely) or 'none'}"
            )
        methods_of = [m for m, kind in ATTENTION.items() if isinstance(modules[name], kind)]
        if not methods_of and cam_layer is not None:
            raise ValueError(f"--layer {name}: Grad-CAMs are made of one layer, and of {cam_layer}")
        if not methods_of:
            cam_layer = name
        elif name not in found[methods_of[0]]:
            raise ValueError(f"--layer {name}: it works on regions, not on the image")
        else:
            chosen[methods_of[0]] = name
    if methods is None:
        methods = [*CAMS, *chosen]
    for method in methods:
        if method not in CAMS and method not in chosen:
            raise ValueError(
                f"--methods {method}: the model has no {ATTENTION[method].__name__} for it; "
                f"there are {', '.join([*CAMS, *chosen])}"
            )
    if cam_layer is not None and not set(methods) & set(CAMS):
        raise ValueError(f"--layer {cam_layer}: no attention, and --methods leaves Grad-CAMs out")
    if set(methods) & set(CAMS):
        grad_cam("gradcam")
        if cam_layer is None:
            try:
                cam_layer = detector.last_stage()
            except ValueError as error:
                raise ValueError(f"{error}; name a --layer whose feature map to explain") from error
        chosen |= dict.fromkeys(CAMS, cam_layer)
    return {method: chosen[method] for method in [*CAMS, *ATTENTION] if method in methods}


def attention_names(detector: Detector, method: str) -> list[str]:
    """Modules of a kind; of those that work on a map, the ones that see the whole image."""
    return [
        name
        for name, module in detector.model.named_modules()
        if isinstance(module, ATTENTION[method])
        and (method == "ida-regions" or name.startswith("backbone."))
    ]


def choose_baseline_layer(
    detector: Detector, baseline: Detector, layers: dict[str, str], names: Sequence[str]
) -> str:
    """The feature map that the baseline's Grad-CAMs are made of."""
    if baseline.reads_text:
        raise ValueError(
            f"--baseline: {type(baseline.model).__name__} reads a text, the model none"
        )
    first, second = detector.class_names, baseline.class_names
    if len(first) != len(second):
        raise ValueError(f"--baseline: it has {len(second)} classes, the model has {len(first)}")
    for mine, other in zip(first, second, strict=True):
        if mine != other and not (mine.isdecimal() or other.isdecimal()):
            raise ValueError(f"--baseline: it calls {other!r} what the model calls {mine!r}")
    layer = next((layers[method] for method in CAMS if method in layers), None)
    if layer is None:
        raise ValueError(f"--baseline: only for {' and '.join(CAMS)}, which --methods leaves out")
    if layer not in names:
        return baseline.last_stage()
    if layer not in dict(baseline.model.named_modules()):
        raise ValueError(f"--layer {layer}: the baseline has no such module")
    return layer


def grad_cam(method: str) -> Callable[..., Any]:
    try:
        library = importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        raise ValueError(
            f"Grad-CAMs need the package grad-cam: pip install -e .[visualization], or leave them "
            f"out by --methods ({error})"
        ) from error
    return getattr(library, CAMS[method])


# --- what is drawn ---------------------------------------------------------------------------- #


def explain(
    detector: Detector,
    path: str,
    class_id: int | None,
    layers: dict[str, str],
    baseline: Detector | None,
    baseline_layer: str | None,
) -> list[Row]:
    """All rows of an image's sheet that can be drawn; raises ValueError if nothing can."""
    failures: list[str] = []

    def attempt(make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except ValueError as error:
            failures.append(str(error))
            return []

    modules = {method: detector.model.get_submodule(name) for method, name in layers.items()}
    done = run(detector, detector.read(path), modules.values())
    index = done.detections.best(class_id)
    if index is None:
        raise ValueError(no_detection(detector, done, class_id))
    class_id = int(done.detections.classes[index])
    cams = [method for method in layers if method in CAMS]
    rows = [detection_row("detector", detector, done, index)]
    if cams:
        rows[0].panels += attempt(cam_panels, detector, done, index, layers[cams[0]], cams)
    if baseline is not None and baseline_layer is not None:
        plain = run(baseline, baseline.read(path), [baseline.model.get_submodule(baseline_layer)])
        best = plain.detections.best(class_id)
        if best is None:
            warn(f"{path}: baseline: {no_detection(baseline, plain, class_id)}")
        else:
            rows.append(detection_row("baseline", baseline, plain, best))
            panels = attempt(cam_panels, baseline, plain, best, baseline_layer, cams)
            rows[-1].panels += [
                Panel(p.title, p.picture, file=f"baseline_{p.file}") for p in panels
            ]
    draw = {
        "triplet": triplet_row,
        "ida-regions": partial(regions_row, detector),
        "ida-queries": queries_row,
    }
    for method in layers:
        if method in draw:
            row = attempt(draw[method], done, index, modules[method], layers[method])
            rows += [row] if row else []
    if len(rows) == len(rows[0].panels) == 1:
        raise ValueError("; ".join(failures))
    for failure in failures:
        warn(f"{path}: {failure}")
    return rows


def no_detection(detector: Detector, done: Run, class_id: int | None) -> str:
    what = "no detection" if class_id is None else f"no {label(detector, class_id)}"
    best = [(k, done.detections.best(k)) for k in range(len(detector.class_names))]
    scores = done.detections.scores
    others = [f"{label(detector, k)} {scores[i].item():.2f}" for k, i in best if i is not None]
    hint = f"found are {', '.join(others[:8])}; choose by --class" if others else "nothing is found"
    return f"{what} above the score threshold of the config's test; {hint}"


def detection_row(what: str, detector: Detector, done: Run, index: int) -> Row:
    found = done.detections
    title = f"{label(detector, int(found.classes[index]))}, score {found.scores[index].item():.2f}"
    return Row(what, [Panel(title, with_box(done.picture.image, found.boxes[index]))])


def label(detector: Detector, class_id: int) -> str:
    name = detector.class_names[class_id]
    return f"class {name}" if name.isdecimal() else name


def cam_panels(
    detector: Detector, done: Run, index: int, layer: str, methods: Sequence[str]
) -> list[Panel]:
    module = detector.model.get_submodule(layer)
    try:
        check_depends_on(done, module, index)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
    panels = []
    for method in methods:
        heat = make_cam(method, detector, done, index, module)
        title = method.replace("gradcam", "Grad-CAM") + ("" if heat.any() else ", nowhere above 0")
        picture = overlay(done, heat, index)
        panels.append(Panel(f"{title}\n{layer}", picture, None, method))
    return panels


class _DetectorOfPadded(nn.Module):
    """A detector as grad-cam calls it: a padded image in, the detections of each image out."""

    def __init__(self, detector: Detector, picture: Picture) -> None:
        super().__init__()
        self.detector = detector.model
        self.detect = partial(detector.detect, picture)
        self.size = picture.pixels.shape[2:]

    def forward(self, padded: Tensor) -> list[Detections]:
        return [self.detect(padded[..., : self.size[0], : self.size[1]])]


def make_cam(method: str, detector: Detector, done: Run, index: int, layer: nn.Module) -> Tensor:
    """(H, W) over the image, 0 … 1: the class activation map of a detection's score."""
    # grad-cam stretches the map over what the model is given, so that is the padded image.
    pixels = done.picture.pixels
    (height, width), (rows, columns) = pixels.shape[2:], done.frame.padded_size
    padded = F.pad(pixels, (0, columns - width, 0, rows - height)).requires_grad_()
    class_id = int(done.detections.classes[index])

    def score(detections: Detections) -> Tensor:
        return detections.scores[detections.best(class_id)]

    # A copy, as the layers that follow may change the map in place.
    model = _DetectorOfPadded(detector, done.picture)
    cam = grad_cam(method)(model, [layer], reshape_transform=torch.clone)
    try:
        return done.frame.over_image(torch.from_numpy(cam(padded, [score]))[0])
    finally:
        cam.activations_and_grads.release()


def triplet_row(done: Run, index: int, module: TripletAttention, name: str) -> Row:
    x = done.call_of(module).args[0]
    with torch.no_grad():
        g_cw, g_hc, g_hw = module.gates(x)
    alpha = "" if module.alpha is None else f", alpha {float(module.alpha):.2f}"
    row = Row(f"triplet attention{alpha}\n{name}")
    spatial = [("hw", "", g_hw)]
    spatial += [("cw", ", mean over C", g_cw.mean(1, keepdim=True))]
    spatial += [("hc", ", mean over C", g_hc.mean(1, keepdim=True))]
    for gate, note, values in spatial:
        if values is not None:
            map_ = values[0, 0].expand(x.shape[2:])
            picture = overlay(done, done.frame.over_image(map_), index)
            file = "triplet-hw" if gate == "hw" else None
            row.panels.append(Panel(f"gate {gate}{note}\n{extent(map_)}", picture, None, file))
    for gate, axes, values in (
        ("cw", ("C", "W"), g_cw[0, :, 0]),
        ("hc", ("H", "C"), g_hc[0, :, :, 0].T),
    ):
        row.panels.append(Panel(f"gate {gate}\n{extent(values)}", values.cpu().numpy(), axes))
    return row


def regions_row(detector: Detector, done: Run, index: int, module: IDAClassifier, name: str) -> Row:
    try:
        maps, region = region_attention(detector, done, module, index)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    row = Row(f"IDA in the region\n{name}")
    pasted = done.frame.paste(torch.cat((maps.mean(0, keepdim=True), maps)), region)
    for head, (map_, values) in enumerate(zip(pasted, (maps.mean(0), *maps), strict=True)):
        title = f"head {head}" if head else "mean over heads"
        file = None if head else "ida-regions"
        panel = Panel(f"{title}\n{extent(values)}", overlay(done, map_, index), None, file)
        row.panels.append(panel)
    return row


def queries_row(done: Run, index: int, module: IDABlock, name: str) -> Row:
    maps = spatial_attention(module, done.call_of(module).args[0]).mean(0)
    box = done.detections.boxes[index]
    shares = done.frame.share_in_box(maps, box)
    even = float(done.frame.share_in_box(torch.ones_like(maps[0]), box))
    about = f"IDA's queries, mean over heads, gamma {float(module.gamma):.2g}"
    row = Row(f"{about}\n{name}\nthe box is {even:.1%} of the input")
    for rank, query in enumerate(shares.argsort(descending=True)[:QUERIES].tolist()):
        picture = overlay(done, done.frame.over_image(maps[query]), index)
        title = f"query {query}\n{shares[query]:.1%} of it in the box"
        row.panels.append(Panel(title, picture, None, None if rank else "ida-queries"))
    return row


def extent(values: Tensor) -> str:
    return f"{float(values.min()):.3g} … {float(values.max()):.3g}"


def warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
