#!/usr/bin/env python
"""Count a detector's parameters, GFLOPs and activations, by stage and for its attention alone.

    tools/analyze_model.py configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml \\
        --baseline model_zoo://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml
    tools/analyze_model.py configs/mm/triplet_attention/faster-rcnn_r50-triplet_fpn_1x_coco.py \\
        --baseline mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py --shape 800 1333

A config is one of Detectron2 (.yaml, or .py in LazyConfig's style) or of MMDetection (.py). Only
its framework need be installed. No weights are loaded and no data is read. The frameworks count one
image, with as many proposals and detections as the config lets through at most. FLOPs are
multiply-adds of convolutions, matrix products and norms; pooling, sums and products of maps and
deformable convolutions are not counted. A norm that Detectron2 freezes has no parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plugin_core.files import write_text
from plugin_core.inspection.config_kinds import FRAMEWORKS, common_side
from plugin_core.inspection.cost import Report
from plugin_core.inspection.cost_table import describe
from plugin_core.inspection.opening import count


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        image_size = parse_shape(args.shape)
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no folder {str(args.json.parent)!r}")
        side = common_side(args.config, args.baseline)
        report = count(side, args.config, image_size)
        # Both at the same size, for a fair comparison
        baseline = count(side, args.baseline, report.image_size) if args.baseline else None
        if args.json:
            write_text(args.json, json.dumps(as_json(args, report, baseline), indent=2) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    beside = f", baseline {args.baseline}" if args.baseline else ""
    print(f"{FRAMEWORKS[side]}: {args.config}{beside}\n\n{describe(report, baseline)}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", help="a path, model_zoo://…, d2_plugins://…, mmdet::… or mm_plugins::…"
    )
    parser.add_argument("--baseline", metavar="CONFIG", help="to compare with")
    parser.add_argument(
        "--shape",
        nargs=2,
        metavar=("H", "W"),
        help="of the image in pixels, before padding (default: what the config tests at)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args(argv)


def parse_shape(shape: Sequence[str] | None) -> tuple[int, int] | None:
    if shape is None:
        return None
    if not all(side.isdecimal() and int(side) > 0 for side in shape):
        raise ValueError(f"--shape {' '.join(shape)}: expected a height and a width in pixels")
    return int(shape[0]), int(shape[1])


def as_json(args: argparse.Namespace, report: Report, baseline: Report | None) -> dict[str, Any]:
    content = {"config": args.config, **report.as_dict()}
    if baseline is not None:
        content["baseline"] = {"config": args.baseline, **baseline.as_dict()}
        content["difference"] = asdict(report.total - baseline.total)
    return content


if __name__ == "__main__":
    main()
