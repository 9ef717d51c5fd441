"""A tiny VQA classifier, and questions about drawn scenes in VQA-CP's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def settings(bert: Path, answers: Path) -> dict[str, Any]:
    """Give the parts of an UpDnVQA's config that are small here."""
    return {
        "tokenizer": {"type": "BertTokenizer", "name_or_path": str(bert)},
        "vision_backbone": {"depth": 18, "init_cfg": None},
        "answers": str(answers),
        "min_count": 1,
        "in_channels": 512,
        "word_channels": 8,
        "channels": 16,
    }


def write_vqa_cp(coco: Path, folder: Path) -> str:
    """Write questions about drawn scenes' classes to data/; returns their words."""
    (folder / "vqa-cp").mkdir(parents=True)
    words = set()
    for split, name in (("train", "train"), ("val", "test")):
        content = json.loads((coco / f"annotations/instances_{split}2017.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = folder / "coco" / f"{split}2014"
        images.mkdir(parents=True)
        for image in content["images"]:
            file = f"COCO_{split}2014_{image['id']:012d}.jpg"
            shutil.copy(coco / f"{split}2017" / image["file_name"], images / file)
        questions, annotations = [], []
        for number, drawn in enumerate(content["annotations"]):
            answer = names[drawn["category_id"]]
            question = "what is on the left?" if number % 2 else "what is drawn here?"
            words.update(question.replace("?", " ?").split())
            same = {
                "question_id": number,
                "image_id": drawn["image_id"],
                "coco_split": f"{split}2014",
            }
            questions.append(same | {"question": question})
            said = [answer] * 8 + ["nothing"] * 2
            annotations.append(
                same
                | {
                    "question_type": " ".join(question.split()[:3]),
                    "multiple_choice_answer": answer,
                    "answers": [{"answer": text} for text in said],
                }
            )
        for kind, items in (("questions", questions), ("annotations", annotations)):
            (folder / f"vqa-cp/vqacp_v2_{name}_{kind}.json").write_text(json.dumps(items))
    return " ".join(words)
