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

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmpretrain.registry import MODELS, TOKENIZER
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mm_plugins.grounding.text_models import tokenizer_is_there
from mm_plugins.mmpretrain.features import last_features
from mm_plugins.mmpretrain.learned_mixin import LearnedMixin
from mm_plugins.mmpretrain.vqa_cp import frequent_answers, read_records, score_of, shares_of
from mm_plugins.settings import build_from
from plugin_core import FunctionalEntropyRegularizer
from plugin_core.errors import ArgumentError, check_positive_int


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
        check_positive_int(
            min_count=min_count,
            in_channels=in_channels,
            word_channels=word_channels,
            channels=channels,
            max_words=max_words,
        )
        kind = {"type": "MultiModalDataPreprocessor"}
        super().__init__(MODELS.build(kind | (data_preprocessor or {})), init_cfg)
        with tokenizer_is_there(tokenizer):
            self.tokenizer = TOKENIZER.build(tokenizer)
        self.tokenizer.padding_side = "left"  # the GRU's last word is the question's
        needed = {"multiple_choice_answer": str, "answers": list}
        needed |= {} if learned_mixin is None else {"question_type": str}
        annotations = read_records("answers", answers, "annotations", needed)
        self.answers = frequent_answers(annotations, min_count)
        if not self.answers:
            raise ArgumentError(
                "min_count", f"must be a count that answers of {answers!r} have, got {min_count!r}"
            )
        self._labels = {answer: number for number, answer in enumerate(self.answers)}
        self.in_channels = in_channels
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

    def check_parts(self) -> None:
        """Check before a run that the backbone gives maps of ``in_channels``.

        Raises:
            ArgumentError: if it does not.
        """
        shape = last_features(self.vision_backbone)
        if shape is not None:
            self._check_channels(shape)

    def _check_channels(self, shape: Sequence[int]) -> None:
        if len(shape) != 4:
            name = type(self.vision_backbone).__name__
            raise ArgumentError(
                "vision_backbone",
                f"must give maps (B, C, H, W), and {name}'s have {len(shape)} axes",
            )
        if shape[1] != self.in_channels:
            raise ArgumentError(
                "in_channels",
                f"must be {shape[1]}, the channels of the backbone's last map, "
                f"got {self.in_channels}",
            )

    def extract_feat(
        self, images: Tensor, data_samples: Sequence[DataSample]
    ) -> tuple[Tensor, Tensor]:
        """Give the attended image (B, in_channels) and the question (B, channels)."""
        regions = self.vision_backbone(images)[-1]
        self._check_channels(regions.shape)
        regions = regions.flatten(2).transpose(1, 2)
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
            types = [self._row(sample.get("question_type")) for sample in data_samples]
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
                scores[self._labels[answer]] = score_of(weight)
        return scores

    def _row(self, question_type: str | None) -> int:
        """The bias's row of a type of questions."""
        if question_type not in self._question_types:
            raise ArgumentError(
                "answers",
                "must be the file of the training's annotations; it has no question of the type of "
                f"a sample, {question_type!r}",
            )
        return self._question_types[question_type]

    def _bias(self, annotations: Sequence[dict[str, Any]]) -> tuple[dict[str, int], Tensor]:
        """The types of questions by their rows, and each type's mean scores (types, answers)."""
        questions: Counter[str] = Counter()
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for annotation in annotations:
            kind = annotation["question_type"]
            questions[kind] += 1
            for answer, weight in shares_of(annotation).items():
                totals[kind][answer] += score_of(weight)
        rows = [
            [totals[kind][answer] / count for answer in self.answers]
            for kind, count in questions.items()
        ]
        return {kind: row for row, kind in enumerate(questions)}, torch.tensor(rows)


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
