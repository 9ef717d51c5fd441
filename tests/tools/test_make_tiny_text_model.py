"""tools/make_tiny_text_model.py: its words, what reads the folder, safe writing, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_tiny_text_model
import pytest
import torch
from make_tiny_text_model import ArgumentError, make_text_model, words_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CAPTION = "the small red disk left of the square, two stars."
SPANS = [[[0, 37]], [[39, 48]]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "odvg.jsonl"
    line = {"filename": "1.jpg", "grounding": {"caption": CAPTION, "regions": []}}
    path.write_text(json.dumps(line) + "\n")
    return path


@pytest.fixture(scope="module")
def model(texts: Path) -> Path:
    folder = texts.parent / "bert"
    make_text_model(folder, [texts], hidden_size=16)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_main(*arguments: object) -> int:
    return make_tiny_text_model.main([str(argument) for argument in arguments])


# What reads it


def test_transformers_reads_the_tokenizer_and_the_weights(model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 512
    words = tokenizer.convert_ids_to_tokens(tokenizer(CAPTION.upper()).input_ids)
    assert words == ["[CLS]", *CAPTION.replace(",", " ,").replace(".", " .").split(), "[SEP]"]
    bert, found = transformers.BertModel.from_pretrained(model, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert bert.config.hidden_size == 16
    assert bert.config.intermediate_size == 32
    assert bert.config.max_position_embeddings == 512
    assert len(tokenizer) == bert.config.vocab_size


def test_no_english_word_is_unknown(model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer.tokenize("Zebra 42: isn't it? (a/b) naïve!")
    assert "[UNK]" not in tokens
    assert tokens[:5] == ["z", "##e", "##b", "##r", "##a"]


def test_mmdetections_language_model_encodes_sub_sentences(model: Path) -> None:
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmdet.models.language_models import BertModel

    language_model = BertModel(
        str(model),
        max_tokens=256,
        pad_to_max=False,
        use_sub_sentence_represent=True,
        special_tokens_list=["[CLS]", "[SEP]", ".", "?"],
    ).eval()
    assert len(set(language_model.special_tokens)) == 4
    alone = language_model([CAPTION])["embedded"]
    assert alone.shape == (1, 14, 16)
    followed = language_model([f"{CAPTION} the ring ?"])["embedded"]
    # Words see only their own sub-sentence, which ends with its point.
    torch.testing.assert_close(followed[:, 1:13], alone[:, 1:13])


def test_spans_of_characters_become_tokens(model: Path) -> None:
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmdet.models.detectors.glip import create_positive_map

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    positive = create_positive_map(tokenizer([CAPTION], return_tensors="pt"), SPANS, 256)
    assert [row.nonzero().ravel().tolist() for row in positive] == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [10, 11],
    ]


# Words


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "coco.json",
            {
                "images": [{"id": 1, "caption": "A disk."}, {"id": 2}],
                "annotations": [{"caption": "two STARS"}, {"bbox": []}],
                "categories": [{"id": 1, "name": "traffic light"}],
            },
            {"a", "disk", ".", "two", "stars", "traffic", "light"},
        ),
        ("label_map.json", {"0": "person", "1": "disk"}, {"person", "disk"}),
        (
            "od.jsonl",
            {"detection": {"instances": [{"bbox": [], "label": 0, "category": "ring"}]}},
            {"ring"},
        ),
        ("plain.txt", "a ring", {"a", "ring"}),
    ],
)
def test_words_are_taken_from_each_kind_of_file(
    tmp_path: Path, name: str, content: Any, words: set[str]
) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert words_of(path) == words


def test_the_vocabulary_has_no_token_twice_and_the_special_ones_first() -> None:
    tokens = make_tiny_text_model.vocabulary({"disk", "a", ",", "naïve"})
    assert len(tokens) == len(set(tokens))
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {".", "?", ",", "a", "##a", "9", "##9", "ï", "##ï", "disk"} <= set(tokens)


# Writing


def test_same_seed_same_bytes_and_another_seed_other_weights(
    tmp_path: Path, texts: Path, model: Path
) -> None:
    state = torch.get_rng_state()
    make_text_model(tmp_path / "again", [texts], hidden_size=16)
    make_text_model(tmp_path / "other", [texts], hidden_size=16, seed=1)
    assert contents(tmp_path / "again") == contents(model)
    other = contents(tmp_path / "other")
    assert other["model.safetensors"] != contents(model)["model.safetensors"]
    assert other["vocab.txt"] == contents(model)["vocab.txt"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_of_this_tool_is_replaced_with_force_only(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "bert"
    assert run_main(out, "--texts", texts, "--hidden-size", 16) == 0
    assert "tokens to" in capsys.readouterr().out
    before = contents(out)
    assert run_main(out, "--texts", texts) == 2
    assert "already exists" in capsys.readouterr().err
    assert contents(out) == before
    assert run_main(out, "--texts", texts, "--hidden-size", 32, "--force") == 0
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


@pytest.mark.parametrize(
    ("name", "reason"), [("notes.txt", "holds 'notes.txt'"), ("config.json", "lacks")]
)
def test_force_refuses_a_folder_that_another_wrote(
    tmp_path: Path, texts: Path, name: str, reason: str
) -> None:
    out = tmp_path / "bert"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ArgumentError, match=reason):
        make_text_model(out, [texts], force=True)
    assert contents(out) == {name: b"mine"}


def test_a_failed_run_leaves_everything_as_it_was(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.BertModel, "save_pretrained", fail)
    assert run_main(tmp_path / "bert", "--texts", texts) == 1
    assert list(tmp_path.iterdir()) == []


# Errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "cannot read"),
        ("broken.json", "{", "not readable as JSON"),
        ("lines.jsonl", "[1]", "not readable as JSON lines: expected an object"),
        ("boxes.json", '{"images": [{"id": 1}]}', "no words in"),
        ("empty.txt", " . ", "no words in"),
    ],
)
def test_a_file_without_words_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert run_main(tmp_path / "out" / "bert", "--texts", path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert name in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "--hidden-size: 0; give a number from 1"),
        ({"layers": 0}, "--layers: 0"),
        ({"heads": 3}, "--hidden-size: 64 is not divisible by --heads 3; 66 would be"),
        ({"seed": -1}, "--seed: -1"),
    ],
)
def test_bad_numbers_are_refused(
    tmp_path: Path, texts: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_text_model(tmp_path / "bert", [texts], **options)
    assert list(tmp_path.iterdir()) == []
