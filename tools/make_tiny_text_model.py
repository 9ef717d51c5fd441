#!/usr/bin/env python
"""Make a small BERT of random weights, with the words of given annotation files.

    python tools/make_tiny_text_model.py OUT --texts FILE [FILE…]
        [--hidden-size 64 --layers 2 --heads 2 --seed 0] [--force]

Use it to try Grounding DINO on a small machine without a pretrained BERT, for example on the data
of tools/make_synthetic_coco.py: ``language_model=dict(name="OUT")`` and ``tokenizer_name="OUT"``
in MMDetection. The weights are random: a training from scratch learns them. Where you can get a
pretrained model, it is better: ``bert-base-uncased``.

Words are taken, in lower case, from

    FILE.jsonl   ODVG: the captions, and the classes of detections
    FILE.json    COCO-like: the captions of images and annotations, the names of categories;
                 or a label map, {"0": "person", …}
    others       plain text

Any other word is tokenized too, letter by letter. OUT is a folder that transformers' AutoTokenizer
and BertModel read without a network. The same options and words give the same bytes (with the
same versions of transformers, tokenizers and PyTorch).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from whole_folder import ArgumentError, check_target, whole_folder

MARKER = "tiny_text_model.json"
_OWN_FILES = re.compile(
    r"(tiny_text_model|config|special_tokens_map|tokenizer|tokenizer_config)\.json"
    r"|model\.safetensors|vocab\.txt"
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_POSITIONS = 512  # BERT's own; MMDetection reads 256 tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for an argument that cannot be used."""
    options = vars(_parser().parse_args(argv))
    try:
        count = make_text_model(**options)
    except ArgumentError as error:
        print(f"make_tiny_text_model.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_tiny_text_model.py: error: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_tiny_text_model.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote a BERT of random weights with {count} tokens to {options['out']}")
    return 0


def make_text_model(
    out: str | Path,
    texts: Iterable[str | Path],
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    seed: int = 0,
    *,
    force: bool = False,
) -> int:
    """Write a BERT of random weights with its tokenizer; returns the number of tokens.

    Args:
        out: folder to write; must not exist unless ``force``.
        texts: files; their words become tokens.
        hidden_size: size of a token's embedding, a multiple of ``heads``; the layers inside
            the blocks are twice as wide.
        layers: number of transformer blocks, ≥ 1.
        heads: number of attention heads, ≥ 1.
        seed: ≥ 0, of the weights.
        force: replace a folder that this tool wrote, once the new one is complete.

    Raises:
        ArgumentError: an argument is out of range, a file cannot be read or has no words, or
            ``out`` may not be written.
    """
    _check_numbers(hidden_size, layers, heads, seed)
    target = Path(os.path.abspath(out))
    check = partial(check_target, target, force, _OWN_FILES, MARKER)
    check()
    try:
        tokens = vocabulary({word for path in texts for word in words_of(Path(path))})
        # Imported after the check of the arguments, as it takes seconds.
        import torch
        from transformers import BertConfig, BertModel, BertTokenizerFast
    except ImportError as error:
        raise ArgumentError(f"{error}; pip install -e .[grounding] brings what is needed") from None
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=_POSITIONS,
        pad_token_id=tokens.index("[PAD]"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
    with whole_folder(target, check) as folder:
        vocab = folder / "vocab.txt"
        vocab.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
        tokenizer = BertTokenizerFast(str(vocab), do_lower_case=True, model_max_length=_POSITIONS)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        options = {"hidden_size": hidden_size, "layers": layers, "heads": heads, "seed": seed}
        content = {"description": "BERT of random weights", "options": options}
        (folder / MARKER).write_text(json.dumps(content, sort_keys=True), encoding="utf-8")
    return len(tokens)


def words_of(path: Path) -> set[str]:
    """Read the words and marks of a file's texts, split and spelled as BERT's tokenizer does.

    Raises:
        ArgumentError: the file cannot be read, or has no words.
    """
    from tokenizers import normalizers, pre_tokenizers  # type: ignore[import-untyped]

    suffix = path.suffix.lower()
    try:
        texts = list(_texts(path.read_text(encoding="utf-8"), suffix))
    except OSError as error:
        raise ArgumentError(f"--texts: cannot read '{path}': {error.strerror}") from None
    except ValueError as error:  # also of a file that is not UTF-8
        kind = {".json": "JSON", ".jsonl": "JSON lines"}.get(suffix, "text")
        raise ArgumentError(f"--texts: '{path}' is not readable as {kind}: {error}") from None
    normal, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {
        word for text in texts for word, _ in split.pre_tokenize_str(normal.normalize_str(text))
    }
    if not any(character.isalnum() for word in words for character in word):
        raise ArgumentError(
            f"--texts: no words in '{path}'; give ODVG lines (.jsonl), a COCO-like file (.json) "
            "with captions or categories, or plain text"
        )
    return words


def vocabulary(words: set[str]) -> list[str]:
    """List the tokens in the order of their ids: special ones, characters, endings, words."""
    characters = set(string.ascii_lowercase + string.digits).union(*words)
    single = {*characters, *string.punctuation}
    endings = sorted(f"##{character}" for character in characters)
    return [*_SPECIAL, *sorted(single), *endings, *sorted(words - single)]


def _texts(content: str, suffix: str) -> Iterator[str]:
    """Find the texts of a file with the ending ``suffix``."""
    if suffix == ".jsonl":
        for line in content.splitlines():
            if line.strip():
                yield from _odvg_texts(_mapping(json.loads(line)))
    elif suffix == ".json":
        yield from _coco_texts(_mapping(json.loads(content)))
    else:
        yield content


def _odvg_texts(line: dict[str, Any]) -> Iterator[str]:
    yield from _strings([line.get("grounding")], "caption")
    for detection in _mappings([line.get("detection")]):
        yield from _strings(detection.get("instances"), "category")


def _coco_texts(content: dict[str, Any]) -> Iterator[str]:
    yield from _strings(content.get("images"), "caption")
    yield from _strings(content.get("annotations"), "caption")
    yield from _strings(content.get("categories"), "name")
    if all(isinstance(name, str) for name in content.values()):  # a label map
        yield from content.values()


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{…}}, found {type(value).__name__}")
    return value


def _mappings(records: Any) -> list[dict[str, Any]]:
    return [record for record in records or () if isinstance(record, dict)]


def _strings(records: Any, key: str) -> list[str]:
    """List the texts under ``key`` in the records that have one."""
    values = [record.get(key) for record in _mappings(records)]
    return [value for value in values if isinstance(value, str)]


def _check_numbers(hidden_size: int, layers: int, heads: int, seed: int) -> None:
    for name, value in (("hidden-size", hidden_size), ("layers", layers), ("heads", heads)):
        if value < 1:
            raise ArgumentError(f"--{name}: {value}; give a number from 1")
    if hidden_size % heads:
        raise ArgumentError(
            f"--hidden-size: {hidden_size} is not divisible by --heads {heads}; "
            f"{hidden_size - hidden_size % heads + heads} would be"
        )
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"--seed: {seed}; give a number from 0 to {2**63 - 1}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes a small BERT of random weights for the words of annotation files."
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="ODVG lines (.jsonl), COCO-like annotations (.json) or plain text",
    )
    numbers = (
        ("--hidden-size", 64, "size of a token's embedding (default: 64)"),
        ("--layers", 2, "number of transformer blocks (default: 2)"),
        ("--heads", 2, "number of attention heads (default: 2)"),
        ("--seed", 0, "of the weights; same seed, same bytes (default: 0)"),
    )
    for name, default, text in numbers:
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    parser.add_argument("--force", action="store_true", help="replace a folder of this tool")
    return parser


if __name__ == "__main__":
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
