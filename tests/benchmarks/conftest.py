"""The scripts in ``benchmarks/`` import each other by file name, as Python finds them when one is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = {path.stem for path in FOLDER.glob("*.py")} | {"peers"}


@pytest.fixture
def benchmarks(monkeypatch) -> Path:
    """Their folder, importable for one test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield FOLDER
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
