"""Visual question answering with functional entropy regularization (arXiv:2010.10802) on VQA-CP.

In a config::

    custom_imports = dict(imports=["mm_plugins"])
    model = dict(type="UpDnVQA", functional_entropy=dict(samples=3, weight=1e-10), …)

MMPretrain's own models write their answers. The paper's classifier chooses one of a list: the
bottom-up attention model of Anderson et al., CVPR 2018, arXiv:1707.07998, in the form of
https://github.com/hengyuan-hu/bottom-up-attention-vqa:

    q = last state of a GRU over the question's words
    v = sum of the regions v_i, weighted by softmax_i(w · (f(v_i) ∘ f(q)))
    logits = classifier(f(v) ∘ f(q)),   f a linear layer and ReLU, with weights of its own each time

The regularizer's modalities are v and q, as in the authors' code. Regions are the cells of a
backbone's last feature map here, where the paper has a detector's: images need no other files.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.fileio import join_path, load
from mmengine.model import BaseModel
from mmpretrain.datasets import COCOVQA
from mmpretrain.registry import DATASETS, MODELS, TOKENIZER
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mm_plugins.grounding.text_models import tokenizer_is_there
from mm_plugins.settings import build_from
from plugin_core import FunctionalEntropyRegularizer
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
            answers = _shares(annotation)
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


@MODELS.register_module()
class UpDnVQA(BaseModel):
    """Chooses a question's answer from a list, by the image's regions and the question's words.

    Samples have ``question``, in training also ``gt_answer`` and ``gt_answer_weight``, as
    ``COCOVQA`` gives them. Predictions have ``pred_answer``.

    Args:
        tokenizer: of ``TOKENIZER``; the embeddings of its words are learned.
        vision_backbone: gives feature maps, of which the last is taken.
        answers: file of the training's annotations; the list is of the answers that are the most
            frequent ones of at least ``min_count`` questions.
        min_count: ≥ 1.
        in_channels: C of the backbone's last map.
        word_channels: of a word's embedding.
        channels: of the question and of what is between the layers.
        max_words: so many words of a question are read.
        learned_mixin: weight of the entropy of Learned-Mixin +H (Clark et al., EMNLP 2019,
            arXiv:1909.03683), the loss of the paper's VQA-CP run, 0.36 there; needs samples with
            ``question_type``. None for the binary cross entropy of all answers.
        functional_entropy: arguments of :class:`plugin_core.FunctionalEntropyRegularizer`; None for
            no such loss. In the log it is ``loss_functional_entropy``, with ``information_image``
            and ``information_question``.
        data_preprocessor: as of MMPretrain's multimodal models.
        init_cfg: as of every model.

    Raises:
        ArgumentError: if the text model or the answers' file is missing, or a setting is wrong.
    """

    def __init__(
        self,
        tokenizer: dict[str, Any],
        vision_backbone: dict[str, Any],
        answers: str,
        min_count: int = 9,
        in_channels: int = 2048,
        word_channels: int = 300,
        channels: int = 1024,
        max_words: int = 14,
        learned_mixin: float | None = None,
        functional_entropy: dict[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        kind = {"type": "MultiModalDataPreprocessor"}
        super().__init__(MODELS.build(kind | (data_preprocessor or {})), init_cfg)
        with tokenizer_is_there(tokenizer):
            self.tokenizer = TOKENIZER.build(tokenizer)
        self.tokenizer.padding_side = "left"  # the GRU's last word is the question's
        annotations = _read_annotations(answers)
        self.answers = frequent_answers(annotations, min_count)
        if not self.answers:
            raise ArgumentError(
                "min_count", f"must be a count that answers of {answers!r} have, got {min_count!r}"
            )
        self._labels = {answer: number for number, answer in enumerate(self.answers)}
        self.max_words = max_words
        self.vision_backbone = MODELS.build(vision_backbone)
        self.words = nn.Embedding(
            len(self.tokenizer), word_channels, padding_idx=self.tokenizer.pad_token_id
        )
        self.gru = nn.GRU(word_channels, channels, batch_first=True)
        self.attention = RegionAttention(in_channels, channels)
        self.head = AnswerHead(in_channels, channels, len(self.answers))
        self.mixin: LearnedMixin | None = None
        if learned_mixin is not None:
            types, bias = self._bias(annotations)
            self._question_types = types
            self.mixin = LearnedMixin(channels, bias, learned_mixin)
        self.functional_entropy: FunctionalEntropyRegularizer | None = None
        if functional_entropy is not None:
            self.functional_entropy = build_from(
                "functional_entropy", FunctionalEntropyRegularizer, functional_entropy
            )

    def forward(self, images: Tensor, data_samples: list[DataSample], mode: str = "tensor") -> Any:
        """Give the losses, the samples with their answers, or the logits (B, answers)."""
        image, question = self.extract_feat(images, data_samples)
        fused = self.head.fuse(image, question)
        logits = self.head.classifier(fused)
        if mode == "loss":
            return self._losses(image, question, fused, logits, data_samples)
        if mode == "predict":
            for sample, answer in zip(data_samples, logits.argmax(1).tolist(), strict=True):
                sample.pred_answer = self.answers[answer]
            return data_samples
        return logits

    def extract_feat(
        self, images: Tensor, data_samples: Sequence[DataSample]
    ) -> tuple[Tensor, Tensor]:
        """Give the attended image (B, in_channels) and the question (B, channels)."""
        regions = self.vision_backbone(images)[-1].flatten(2).transpose(1, 2)
        tokens = self.tokenizer(
            [sample.question for sample in data_samples],
            padding="max_length",
            truncation=True,
            max_length=self.max_words,
            add_special_tokens=False,
            return_tensors="pt",
        ).input_ids.to(images.device)
        states, _ = self.gru(self.words(tokens))
        question = states[:, -1]
        return self.attention(regions, question), question

    def _losses(
        self,
        image: Tensor,
        question: Tensor,
        fused: Tensor,
        logits: Tensor,
        data_samples: Sequence[DataSample],
    ) -> dict[str, Tensor]:
        targets = torch.stack(
            [self.scores(s.gt_answer, s.gt_answer_weight) for s in data_samples]
        ).to(logits)
        if self.mixin is None:
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            found = {"loss_answer": losses.sum(1).mean()}
        else:
            types = [self._question_types[sample.question_type] for sample in data_samples]
            found = self.mixin(fused, logits, targets, torch.tensor(types, device=logits.device))
        if self.functional_entropy is not None:
            term, information = self.functional_entropy(
                lambda noisy: self.head(noisy["image"], noisy["question"]),
                {"image": image, "question": question},
                logits,
            )
            found["loss_functional_entropy"] = term
            found |= {f"information_{name}": value for name, value in information.items()}
        return found

    def scores(self, answers: Sequence[str], weights: Sequence[float]) -> Tensor:
        """Score the answers of the list as VQA does: (answers of the list,) in [0, 1].

        Args:
            answers: the annotators'.
            weights: share of the annotators who give each of them.
        """
        scores = torch.zeros(len(self.answers))
        for answer, weight in zip(answers, weights, strict=True):
            if answer in self._labels:
                scores[self._labels[answer]] = _score(weight)
        return scores

    def _bias(self, annotations: Sequence[dict[str, Any]]) -> tuple[dict[str, int], Tensor]:
        """The types of questions by their rows, and each type's mean scores (types, answers)."""
        questions: Counter[str] = Counter()
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for annotation in annotations:
            kind = annotation["question_type"]
            questions[kind] += 1
            for answer, weight in _shares(annotation).items():
                totals[kind][answer] += _score(weight)
        rows = [
            [totals[kind][answer] / count for answer in self.answers]
            for kind, count in questions.items()
        ]
        return {kind: row for row, kind in enumerate(questions)}, torch.tensor(rows)


def _shares(annotation: dict[str, Any]) -> dict[str, float]:
    """Which share of the annotators gives which answer."""
    counts = Counter(item["answer"] for item in annotation["answers"])
    return {answer: count / counts.total() for answer, count in counts.items()}


def _score(share: float) -> float:
    """VQA's score of an answer: 0.3 for each of ten annotators who give it, at most 1."""
    return min(3 * share, 1)


class RegionAttention(nn.Module):
    """Attends to an image's regions by the question."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.image = _normed(in_channels, channels)
        self.question = _normed(channels, channels)
        self.dropout = nn.Dropout(0.2)
        self.weight = weight_norm(nn.Linear(channels, 1), dim=-1)

    def forward(self, regions: Tensor, question: Tensor) -> Tensor:
        """Average regions (B, K, in_channels) by a question (B, channels): (B, in_channels)."""
        joint = self.image(regions) * self.question(question)[:, None]
        attention = self.weight(self.dropout(joint)).softmax(1)
        attended: Tensor = (attention * regions).sum(1)
        return attended


class AnswerHead(nn.Module):
    """Classifies an image and a question: what the regularizer perturbs the inputs of."""

    def __init__(self, in_channels: int, channels: int, answers: int) -> None:
        super().__init__()
        self.image = _normed(in_channels, channels)
        self.question = _normed(channels, channels)
        self.classifier = nn.Sequential(
            *_normed(channels, 2 * channels),
            nn.Dropout(0.5),
            weight_norm(nn.Linear(2 * channels, answers), dim=-1),
        )

    def fuse(self, image: Tensor, question: Tensor) -> Tensor:
        fused: Tensor = self.image(image) * self.question(question)
        return fused

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        """Logits (B, answers) of an image (B, in_channels) and a question (B, channels)."""
        logits: Tensor = self.classifier(self.fuse(image, question))
        return logits


def _normed(in_channels: int, channels: int) -> nn.Sequential:
    # The weight's one norm is a parameter of its own.
    return nn.Sequential(weight_norm(nn.Linear(in_channels, channels), dim=-1), nn.ReLU())


class LearnedMixin(nn.Module):
    """Learned-Mixin +H (arXiv:1909.03683, section 3.2): leave out what the question's type tells.

    A classifier that knows only the type is added to the model in training, with a factor g that
    the model learns from an example. Of each answer, with p for (p, 1 - p):

        loss = cross entropy of softmax(log p_model + g · log(p_type + sigmoid(s)))
             + weight · mean entropy of softmax(g · log(p_type + sigmoid(s)))

    Args:
        channels: of what the answers are classified by.
        bias: p_type of each type's answers (types, answers), in [0, 1].
        weight: of the entropy, finite and ≥ 0.

    Raises:
        ArgumentError: if the weight is wrong.
    """

    bias: Tensor

    def __init__(self, channels: int, bias: Tensor, weight: float) -> None:
        super().__init__()
        if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
            raise ArgumentError("learned_mixin", f"must be a finite number ≥ 0, got {weight!r}")
        self.weight = weight
        self.register_buffer("bias", torch.stack([bias, 1 - bias], 2), persistent=False)
        self.factor = nn.Linear(channels, 1)
        self.smoothing = nn.Parameter(torch.tensor(-1.0))

    def forward(
        self, fused: Tensor, logits: Tensor, targets: Tensor, types: Tensor
    ) -> dict[str, Tensor]:
        """Make the losses.

        Args:
            fused: (B, channels).
            logits: (B, answers).
            targets: (B, answers) in [0, 1].
            types: (B,), rows of the bias.
        """
        factor = F.softplus(self.factor(fused))[:, :, None]
        bias = factor * (self.bias[types] + self.smoothing.sigmoid()).log()
        both = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], 2) + bias
        chosen = torch.stack([targets, 1 - targets], 2)
        alone = bias.log_softmax(2)
        return {
            "loss_answer": -(chosen * both.log_softmax(2)).sum((1, 2)).mean(),
            "loss_bias_entropy": -self.weight * (alone.exp() * alone).sum(2).mean(),
        }


def _read_annotations(path: str) -> list[dict[str, Any]]:
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
