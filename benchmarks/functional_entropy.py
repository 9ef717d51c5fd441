#!/usr/bin/env python
"""Does functional entropy regularization keep a classifier from resting on a shortcut?

    benchmarks/functional_entropy.py

trains a small classifier of two modalities. An image's features always tell the class, but are hard
to learn. A text's features name the class outright, in 95 of 100 samples. The classifier is trained
plainly and with several weights of the term, on a short schedule and on one of 4 times the steps,
from several seeds. Its accuracy is measured with texts as in training, and with permuted texts that
tell nothing. Validation samples choose the weight. Tables go to
benchmarks/results/functional_entropy.md and .json, a picture to .png. It takes three to four
minutes on a CPU core; --quick is for a look at it.

It is no trial of tools/try_plugins.py, as it has no detector and no framework: the paper's setting
is a classifier of two modalities, of which this is the smallest. For detectors that read a text,
tools/try_plugins.py has --with functional_entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import report  # noqa: E402
import study  # noqa: E402

from plugin_core.files import write_text  # noqa: E402
from plugin_core.methods.functional_entropy import FunctionalEntropyRegularizer  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES, LOOKS = 5, 4
IMAGE_CHANNELS, TEXT_CHANNELS, HIDDEN = 32, 16, 64
IMAGE_NOISE, TEXT_NOISE = 0.7, 0.3
TRAIN, VAL, TEST = 2000, 1000, 4000
AGREEMENT = 0.95
BATCH, SAMPLES = 64, 3
LEARNING_RATE, MOMENTUM, CLIP = 0.05, 0.9, 1.0
# Names of the measured numbers of a trained classifier
IMAGE, TEXT = "image information ·10⁶", "text information ·10⁶"
WITH, WITHOUT = "test, with shortcut", "test, without"
VAL_WITH, VAL_WITHOUT = "val, with shortcut", "val, without"
# Name of the training → weight of the term and number of steps; plain trainings come first
Trainings = Mapping[str, tuple[float, int]]

TEMPLATE = """# A shortcut, with and without functional entropy regularization

`{command}` wrote this, but for the last section. {machine}.

Drawn vectors, anew for each seed. Image: {IMAGE_CHANNELS} channels, one of {LOOKS} looks of one of
{CLASSES} classes, each a random vector, with normal noise of {IMAGE_NOISE}. Text: {TEXT_CHANNELS}
channels, the word of the class in {agreement:.0f} of 100 samples and else a random one, with noise
of {TEXT_NOISE}; all scaled to unit variance. "With shortcut" are such samples, "without" the same
ones with the texts permuted. A perceptron (two layers of {HIDDEN} for the image, one for the text,
one for both) is trained on {TRAIN} samples with the cross entropy, {short} or {long} steps of
{BATCH} by SGD ({LEARNING_RATE} falling along a cosine, momentum {MOMENTUM}, gradients clipped to
{CLIP}), from the same initial weights and on the same batches with and without the term. The term
is added in all steps: ‖1/information‖₂, {SAMPLES} noisy copies, bound of the entropy, cross entropy
against the softmaxed clean logits, perturbed are the inputs. A step with it takes about four times
as long as one without.

Accuracy in percent on {TEST} test samples, and information on them with the shortcut, a mean over
batches as in training. Mean and sample standard deviation over {seeds} seeds.

{table}

The weight is chosen by the mean accuracy on {VAL} validation samples, no test sample among them:

{choices}

Every run:

{single}

![Information and accuracy over the weight, {short} steps]({name}.png)

"""


@dataclass(frozen=True)
class Samples:
    """Features (B, C) by modality and classes (B,)."""

    features: dict[str, Tensor]
    classes: Tensor

    def batch(self, index: Tensor) -> Samples:
        features = {name: values[index] for name, values in self.features.items()}
        return Samples(features, self.classes[index])

    def without_shortcut(self, generator: torch.Generator) -> Samples:
        order = torch.randperm(len(self.classes), generator=generator)
        text = self.features["text"][order]
        return Samples({**self.features, "text": text}, self.classes)


class World:
    """Looks of the classes in images, and their names in texts."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.looks = torch.randn(CLASSES, LOOKS, IMAGE_CHANNELS, generator=generator)
        words = torch.randn(CLASSES, TEXT_CHANNELS, generator=generator)
        self.words = F.normalize(words, dim=1) * TEXT_CHANNELS**0.5

    def draw(self, number: int) -> Samples:
        classes = torch.randint(CLASSES, (number,), generator=self.generator)
        look = torch.randint(LOOKS, (number,), generator=self.generator)
        other = torch.randint(CLASSES, (number,), generator=self.generator)
        agrees = torch.rand(number, generator=self.generator) < AGREEMENT
        named = torch.where(agrees, classes, other)
        features = {
            "image": self._noisy(self.looks[classes, look], IMAGE_NOISE),
            "text": self._noisy(self.words[named], TEXT_NOISE),
        }
        return Samples(features, classes)

    def _noisy(self, x: Tensor, noise: float) -> Tensor:
        noisy = x + noise * torch.randn(x.shape, generator=self.generator)
        return noisy / (1 + noise**2) ** 0.5


class Classifier(nn.Module):
    """Logits (B, K) of both modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(IMAGE_CHANNELS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()
        )
        self.text = nn.Sequential(nn.Linear(TEXT_CHANNELS, HIDDEN), nn.GELU())
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return self.head(torch.cat([self.image(x["image"]), self.text(x["text"])], dim=1))


def regularizer(weight: float) -> FunctionalEntropyRegularizer:
    return FunctionalEntropyRegularizer(SAMPLES, weight=weight, loss=F.cross_entropy)


def train(samples: Samples, weight: float, steps: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    model, term = Classifier(), regularizer(weight)
    batches = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = samples.batch(torch.randint(len(samples.classes), (BATCH,), generator=batches))
        logits = model(batch.features)
        loss = F.cross_entropy(logits, batch.classes)
        if weight:
            loss = loss + term(model, batch.features, logits)[0]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: Classifier, samples: Samples) -> float:
    """Measure the accuracy in percent."""
    right = model(samples.features).argmax(1) == samples.classes
    return 100 * right.float().mean().item()


@torch.no_grad()
def information(model: Classifier, samples: Samples) -> dict[str, float]:
    """Measure the information of each modality, in millionths."""
    torch.manual_seed(0)
    measure, found = regularizer(0.0), []
    for index in torch.arange(len(samples.classes)).split(BATCH):
        x = samples.batch(index).features
        if len(index) == BATCH:  # the information depends on the size of the batch
            found.append(measure(model, x, model(x))[1])
    return {name: 1e6 * statistics.mean(float(i[name]) for i in found) for name in found[0]}


def run(seed: int, trainings: Trainings) -> dict[str, dict[str, float]]:
    """Run and measure each training; returns training → number's name → number."""
    generator = torch.Generator().manual_seed(seed)
    world = World(generator)
    samples, val, test = (world.draw(number) for number in (TRAIN, VAL, TEST))
    permuted_val, permuted_test = (s.without_shortcut(generator) for s in (val, test))
    runs = {}
    for name, (weight, steps) in tqdm(trainings.items(), f"seed {seed}", unit="run", leave=False):
        model = train(samples, weight, steps, seed)
        informed = information(model, test)
        runs[name] = {
            IMAGE: informed["image"],
            TEXT: informed["text"],
            WITH: accuracy(model, test),
            WITHOUT: accuracy(model, permuted_test),
            VAL_WITH: accuracy(model, val),
            VAL_WITHOUT: accuracy(model, permuted_val),
        }
    return runs


def title(weight: float, steps: int) -> str:
    return f"{f'weight {weight:g}' if weight else 'plain'}, {steps} steps"


def choices(runs: study.Runs, trainings: Trainings) -> str:
    """Write for each schedule the training that validation prefers, and its test accuracy."""
    rows = []
    for steps in dict.fromkeys(steps for _, steps in trainings.values()):
        names = [name for name, (_, n) in trainings.items() if n == steps]
        for measure in (VAL_WITHOUT, VAL_WITH):
            best = max(names, key=lambda name: statistics.mean(of_seeds(runs[name], measure)))
            pairs = zip(*(of_seeds(runs[n], WITHOUT) for n in (best, names[0])), strict=True)
            gains = [chosen - plain for chosen, plain in pairs]
            gain = study.mean_and_spread(gains)
            rows.append([measure, best, gain, " ".join(f"{value:.1f}" for value in gains)])
    headers = ["chosen by", "training", f"gain over plain, {WITHOUT}", "of each seed"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def of_seeds(by_seed: Mapping[int, Mapping[str, float]], measure: str) -> list[float]:
    return [numbers[measure] for numbers in by_seed.values()]


def write(path: Path, runs: study.Runs, trainings: Trainings) -> None:
    """Write the tables, the picture and the numbers, and keep people's text below them."""
    headers = list(next(iter(next(iter(runs.values())).values())))
    lines, single = [], []
    for name, by_seed in runs.items():
        spreads = [study.mean_and_spread(of_seeds(by_seed, measure)) for measure in headers]
        lines.append([name, *spreads])
        for seed, numbers in by_seed.items():
            single.append([name, seed, *(f"{value:.1f}" for value in numbers.values())])
    machine = f"CPU, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    command = shlex.join(["benchmarks/functional_entropy.py", *sys.argv[1:]])
    content = {"machine": machine, "command": command, "trainings": trainings, "runs": runs}
    short, *_, long = sorted({steps for _, steps in trainings.values()})
    values = {
        "command": command,
        "machine": machine,
        "agreement": 100 * AGREEMENT,
        "short": short,
        "long": long,
        "seeds": len(next(iter(runs.values()))),
        "table": tabulate(lines, ["training", *headers], "github", disable_numparse=True),
        "choices": choices(runs, trainings),
        "single": tabulate(single, ["training", "seed", *headers], "github", disable_numparse=True),
        "name": path.name,
    }
    text = TEMPLATE.format_map({**globals(), **values})
    path.parent.mkdir(parents=True, exist_ok=True)
    of_short = {name: weight for name, (weight, steps) in trainings.items() if steps == short}
    report.write_plot(path.with_name(f"{path.name}.png"), plot(runs, of_short))
    write_text(
        path.with_name(f"{path.name}.json"),
        json.dumps(content, indent=2, ensure_ascii=False) + "\n",
    )
    path = path.with_name(f"{path.name}.md")
    before = path.read_text() if path.exists() else ""
    write_text(path, text + study.FINDINGS + before.partition(study.FINDINGS)[2])
    print(f"\n{text}\nwrote {path}, .json and .png")


def plot(runs: study.Runs, weights: Mapping[str, float]) -> Figure:
    """Plot means over the seeds, and every seed as a dot, over the weight; plain as dashed lines.

    Args:
        runs: the measured numbers.
        weights: training to draw → weight; one training is plain.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = (((IMAGE, TEXT), "information · 10⁶"), ((WITHOUT, WITH), "accuracy, %"))
    for axes, (measures, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, measure in enumerate(measures):
            color, curve = f"C{i}", []
            for name, weight in weights.items():
                values = of_seeds(runs[name], measure)
                mean = statistics.mean(values)
                if weight:
                    curve.append((weight, mean))
                    axes.plot([weight] * len(values), values, ".", color=color, alpha=0.5)
                else:
                    axes.axhline(mean, color=color, linestyle="--", linewidth=1)
            axes.plot(*zip(*curve, strict=True), color=color, label=measure)
        axes.set(xscale="log", xlabel="weight (dashed: plain)", ylabel=label)
        axes.legend()
    figure.axes[0].set_yscale("log")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="SEED")
    parser.add_argument("--quick", action="store_true", help="few steps, two weights")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/functional_entropy"))
    args = parser.parse_args(argv)
    steps = 10 if args.quick else 400
    weights = {
        steps: (1e-10, 1e-9) if args.quick else (1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6),
        4 * steps: (1e-9,) if args.quick else (1e-11, 1e-10, 1e-9),
    }
    trainings = {title(w, n): (w, n) for n, ws in weights.items() for w in (0.0, *ws)}
    by_seed = {seed: run(seed, trainings) for seed in tqdm(args.seeds, "seeds", unit="seed")}
    runs = {name: {seed: by_seed[seed][name] for seed in args.seeds} for name in trainings}
    write(args.out, runs, trainings)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
