"""VQA-CP's questions and answers, and the answers that a classifier chooses from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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

    Raises:
        ArgumentError: when it is loaded: if a file is missing, is no such list, or lists nothing,
            or a question has no annotation.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        needed = {"question_id": int, "question_type": str, "answers": list}
        listed = read_records("ann_file", self.ann_file, "annotations", needed)
        annotations = {annotation["question_id"]: annotation for annotation in listed}
        needed = {"question_id": int, "image_id": int, "coco_split": str, "question": str}
        found = []
        for question in read_records("question_file", self.question_file, "questions", needed):
            part, number = question["coco_split"], question["image_id"]
            annotation = annotations.get(question["question_id"])
            if annotation is None:
                raise ArgumentError(
                    "ann_file",
                    f"must have an annotation of each question of {self.question_file!r}, and "
                    f"{self.ann_file!r} has none of question {question['question_id']}",
                )
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


def read_records(
    setting: str, path: str, kind: str, fields: Mapping[str, type]
) -> list[dict[str, Any]]:
    """Read VQA-CP's list of questions or annotations, or VQA's mapping that has one.

    Args:
        setting: that names the file.
        path: of the file.
        kind: "questions" or "annotations".
        fields: that each record must have, and their types; each of ``answers`` has an ``answer``.

    Raises:
        ArgumentError: if the file is missing, is no such list, lists nothing, or lacks a field.
    """
    expected = f"must be a file of {kind} such as vqacp_v2_train_{kind}.json, got {path!r}"
    try:
        content = load(path, file_format="json")
        records: list[dict[str, Any]] = content if isinstance(content, list) else content[kind]
        for number, record in enumerate(records):
            for name, of in fields.items():
                if not isinstance(record[name], of):
                    raise TypeError(f"{name!r} of number {number} is {record[name]!r:.80}")
            for answer in record["answers"] if "answers" in fields else ():
                answer["answer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(setting, f"{expected} ({type(error).__name__}: {error})") from error
    if not records:
        raise ArgumentError(setting, f"{expected}, which lists none")
    return records


def frequent_answers(annotations: Sequence[dict[str, Any]], min_count: int) -> list[str]:
    """List the answers that are chosen for so many questions at least, in a fixed order."""
    counts = Counter(annotation["multiple_choice_answer"] for annotation in annotations)
    return sorted(answer for answer, count in counts.items() if count >= min_count)
