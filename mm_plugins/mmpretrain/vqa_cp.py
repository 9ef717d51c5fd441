"""VQA-CP's questions and answers, and the answers that a classifier chooses from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.fileio import join_path, load
from mmpretrain.datasets import COCOVQA
from mmpretrain.registry import DATASETS

from plugin_core.errors import ArgumentError


@DATASETS.register_module()
class VQACP(COCOVQA):
    """VQA-CP (Agrawal et al., CVPR 2018, arXiv:1712.00377) as its files are published.

    They are lists, and each question says from which part of COCO 2014 its image is.

    Args:
        data_root: as of ``COCOVQA``, and so are the others.
        data_prefix: folder with ``train2014`` and ``val2014``.
        question_file: such as ``vqacp_v2_train_questions.json``.
        ann_file: such as ``vqacp_v2_train_annotations.json``.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        annotations = {item["question_id"]: item for item in load(self.ann_file)}
        found = []
        for question in load(self.question_file):
            part, number = question["coco_split"], question["image_id"]
            annotation = annotations[question["question_id"]]
            answers = shares_of(annotation)
            file = f"COCO_{part}_{number:012d}.jpg"
            found.append(
                {
                    "img_path": join_path(self.data_prefix["img_path"], part, file),
                    "image_id": number,
                    "question_id": question["question_id"],
                    "question": question["question"],
                    "question_type": annotation["question_type"],
                    "gt_answer": list(answers),
                    "gt_answer_weight": list(answers.values()),
                }
            )
        return found


def shares_of(annotation: dict[str, Any]) -> dict[str, float]:
    """Which share of the annotators gives which answer."""
    counts = Counter(item["answer"] for item in annotation["answers"])
    return {answer: count / counts.total() for answer, count in counts.items()}


def score_of(share: float) -> float:
    """VQA's score of an answer: 0.3 for each of ten annotators who give it, at most 1."""
    return min(3 * share, 1)


def read_annotations(path: str) -> list[dict[str, Any]]:
    """Read VQA-CP's list of annotations, or VQA's mapping that has one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found: list[dict[str, Any]] = (
            content if isinstance(content, list) else content["annotations"]
        )
        for annotation in found[:1]:
            annotation["multiple_choice_answer"], annotation["answers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            "answers",
            "must be a file of annotations such as vqacp_v2_train_annotations.json, got "
            f"{path!r} ({type(error).__name__}: {error})",
        ) from error
    return found


def frequent_answers(annotations: Sequence[dict[str, Any]], min_count: int) -> list[str]:
    """List the answers that are chosen for so many questions at least, in a fixed order."""
    counts = Counter(annotation["multiple_choice_answer"] for annotation in annotations)
    return sorted(answer for answer, count in counts.items() if count >= min_count)
