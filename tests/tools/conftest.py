"""What the tests of tools/evaluate_context_bias.py share: its case's files, and the tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def inputs(tmp_path: Path) -> Any:
    from context_bias_cases import Inputs

    return Inputs(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    from context_bias_cases import Run

    return Run(capsys)
