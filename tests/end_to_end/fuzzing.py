"""Damages at random what a user hands to a training, and judges how the training takes it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CASES = int(os.environ.get("FUZZ_CASES", "12"))  # of both frameworks together, about
SEED = int(os.environ.get("FUZZ_SEED", "0"))
# Share of the cases; a damaged setting ends a run at once, most checkpoints are trained with.
KINDS = {"annotations": 0.3, "images": 0.2, "config": 0.35, "checkpoint": 0.15}

VALUES: list[Any] = [
    *(None, "", "x", "12", "1e400", True, False, -1, 0, 1, 7, 3.5, 1e9, 2**70),
    *(math.nan, math.inf, [], {}, [1], [None], ["a", "b"], {"a": 1}, [[1, 2]], "naïve"),
]


def damage_annotations(path: Path, rng: random.Random) -> str:
    """Damage an annotation file; says how."""
    data = path.read_bytes()
    how = rng.choice(("bytes", "cut", "insert", *["records"] * 9))
    if how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "insert":
        at = rng.randrange(len(data))
        noise = rng.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"}", b",", b"NaN", b'"'))
        path.write_bytes(data[:at] + noise + data[at:])
    elif how == "bytes":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
    if how != "records":
        return how
    content = json.loads(data)
    done = [_damage_records(content, rng) for _ in range(rng.choice((1, 1, 2)))]
    path.write_text(json.dumps(content))
    return "; ".join(done)


def _damage_records(content: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(("images", "annotations", "annotations", "categories"))
    records = content.get(name)
    what = rng.choice(("value", "value", "value", "number", "leave out", "all", "list", "record"))
    if not isinstance(records, list) or not records or what == "list":
        content[name] = rng.choice((*VALUES, []))
        return f"{name} = {content[name]!r}"
    record = rng.choice(records)
    if what == "record" or not isinstance(record, dict) or not record:
        change = rng.choice(("twice", "reverse", "other", "drop"))
        if change == "twice":
            records.append(record)
        elif change == "reverse":
            records.reverse()
        elif change == "drop":
            records.remove(record)
        else:
            records[records.index(record)] = rng.choice(VALUES)
        return f"{name}: a record {change}"
    key = rng.choice(sorted(record))
    if what == "leave out":
        del record[key]
        return f"{name}: {key} left out once"
    if what == "all":
        value = rng.choice(VALUES)
        for other in records:
            if isinstance(other, dict):
                other[key] = value
        return f"{name}: {key} = {value!r} everywhere"
    old = record[key]
    if what == "number" and isinstance(old, list) and old:
        old = list(old)
        old[rng.randrange(len(old))] = rng.choice(VALUES)
        record[key] = old
    else:
        record[key] = rng.choice(VALUES)
    return f"{name}: {key} = {record[key]!r:.60}"


def damage_images(folder: Path, rng: random.Random) -> str:
    """Damage some images of a folder; says how."""
    files = sorted(folder.glob("*.jpg"))
    chosen = rng.sample(files, rng.choice((1, 1, 2, len(files))))
    how = rng.choice(
        ("cut", "empty", "text", "bytes", "tail", "gone", "size", "mode", "deep", "exif")
    )
    for path in chosen:
        data = path.read_bytes()
        if how == "cut":
            path.write_bytes(data[: rng.randrange(1, len(data))])
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "text":
            path.write_text("version https://git-lfs.github.com/spec/v1")
        elif how == "bytes":
            changed = bytearray(data)
            for _ in range(rng.choice((1, 20))):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            path.write_bytes(changed)
        elif how == "tail":
            path.write_bytes(data + rng.randbytes(100))
        elif how == "gone":
            path.unlink()
        else:
            image = Image.open(path).convert("RGB")
            if how == "size":
                image.resize((rng.randrange(1, 90), rng.randrange(1, 90))).save(path)
            elif how == "mode":
                image.convert(rng.choice(("L", "CMYK"))).save(path)
            elif how == "deep":
                pixels = np.asarray(image.convert("L")).astype(np.uint16) * 257
                Image.fromarray(pixels).save(path, format="PNG")
            else:
                exif = image.getexif()
                exif[0x0112] = rng.randrange(1, 9)
                image.save(path, exif=exif)
    return f"{how} of {len(chosen)}"


def damage_checkpoint(path: Path, rng: random.Random) -> str:
    """Damage a checkpoint; says how."""
    data = path.read_bytes()
    how = rng.choice(("cut", "empty", "text", "bytes", "names", "shapes", "kind", "drop", "half"))
    if how == "cut":
        path.write_bytes(data[: rng.randrange(1, len(data))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text(rng.choice(("<html>404</html>", "{}", "version https://git-lfs…")))
    elif how == "bytes":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 50))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
    else:
        content = torch.load(path, map_location="cpu", weights_only=False)
        key = "model" if "model" in content else "state_dict"
        state = content[key]
        names = rng.sample(sorted(state), rng.choice((1, 5, len(state))))
        if how == "names":
            prefix = rng.choice(("module.", "model.", "ema_", "x."))
            state = {prefix + name: value for name, value in state.items()}
        elif how == "shapes":
            state |= {name: torch.zeros(*state[name].shape, 2) for name in names}
        elif how == "drop":
            state = {name: value for name, value in state.items() if name not in names}
        elif how == "half":
            state = {n: v.half() if v.is_floating_point() else v for n, v in state.items()}
        else:
            state = rng.choice((None, [], {}, 3, "text", {"a": 1}))
        torch.save({**content, key: state}, path)
    return how


def draw(folder: Path) -> Path:
    """Draw the smallest dataset that both synthetic configs train on."""
    from make_synthetic_coco import make_dataset

    make_dataset(folder, train=6, val=3, size=64, classes=4, seed=2, progress=False)
    for path in (folder / "annotations").glob("person_*"):
        path.unlink()
    return folder


class Judge:
    """Runs damaged cases and collects those that a user would not understand.

    Args:
        run: runs the tool on a folder of data, with a checkpoint or None, and odd settings.
        data: a dataset, as COCO 2017 is laid out, that is left alone.
        settings: odd settings for the command line, and part of what their error must say.
        checkpoint: of the detector that ``run`` trains.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        data: Path,
        settings: Callable[[random.Random], list[str]],
        checkpoint: Path,
    ) -> None:
        self.run, self.data, self.settings, self.checkpoint = run, data, settings, checkpoint
        self.told = self.trained = 0

    def judge(self, kind: str, seed: str, folder: Path) -> str | None:
        """Run a case in an empty folder; says what is wrong with how it went."""
        rng = random.Random(seed)
        shutil.copytree(self.data, folder / "data")
        weights, words = folder / self.checkpoint.name, []
        split = rng.choice(("train2017", "train2017", "val2017"))
        if kind == "annotations":
            path = folder / "data" / "annotations" / f"instances_{split}.json"
            how = damage_annotations(path, rng)
        elif kind == "images":
            how = damage_images(folder / "data" / split, rng)
        elif kind == "checkpoint":
            shutil.copy(self.checkpoint, weights)
            how = damage_checkpoint(weights, rng)
        else:
            words = self.settings(rng)
            how = " ".join(words)
        before = listing(folder)
        result = self.run(folder, weights if kind == "checkpoint" else None, words)
        printed = result.stdout + result.stderr
        what = f"{kind} {seed} ({split}: {how})"
        changed = {name for name, state in before.items() if listing(folder).get(name) != state}
        extra = {name for name in listing(folder) if name not in before}
        if changed or any(not name.startswith("out") for name in extra):
            return f"{what}: wrote {changed | extra}"
        if result.returncode == 0:
            self.trained += 1
            return f"{what}: a traceback though it ended well" if "Traceback" in printed else None
        self.told += 1
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        if "Traceback" in printed or not lines:
            return f"{what}: {printed[-1500:]}"
        if len(result.stderr) > 20_000:
            return f"{what}: {len(result.stderr)} letters of output"
        return None


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """List the files below a folder with sizes and times."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check(judge: Judge, kind: str, folder: Path) -> None:
    """Run a kind's share of the cases of one framework."""
    number = math.ceil(CASES / 2 * KINDS[kind])
    wrong = []
    for case in range(number):
        place = folder / str(case)
        place.mkdir()
        if text := judge.judge(kind, f"{SEED}-{case}", place):
            wrong.append(text)
        shutil.rmtree(place)
    print(f"{kind}: {judge.told} told, {judge.trained} trained, {len(wrong)} wrong of {number}")
    assert not wrong, "\n\n".join(wrong)
