"""Options and fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from order import long_ones_first
from test_model_harness import Models

from dsv4c.api import load_checkpoint
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.ir.graph import Module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite the expectations of tests/filetests/*.ir")


@pytest.hookimpl(trylast=True)  # when it is known which tests run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long_ones_first(items)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with every layer kind and odd sizes."""
    return generate_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", "tiny", seed=5)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Checkpoints and artifacts by name, each made once in a run; tests must not change them."""
    return Models(tmp_path_factory)


@pytest.fixture
def tiny_model(tiny_directory: Path) -> Module:
    """The MODEL-level graph of the tiny checkpoint; the test may change it."""
    return load_checkpoint(tiny_directory)
