"""Small models: random ones of several families, the built demo model, the trained one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparseserve.calibration.subject import Subject, load
from sparseserve.demo.build import build

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 258,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built demo model."""
    path = tmp_path_factory.mktemp("built") / "demo"
    build(path)
    return path


@pytest.fixture(scope="session")
def demo(built: Path) -> Subject:
    return load(str(built))


@pytest.fixture(scope="session")
def trained() -> Subject:
    return load(str(files("sparseserve.demo") / "trained"))


@pytest.fixture(scope="session")
def random_model(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random model of a family with the demo's byte tokenizer."""

    def write(family: str, **changes: object) -> Path:
        path = tmp_path_factory.mktemp("random") / family
        torch.manual_seed(0)
        special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0, "sliding_window": None}
        config = AutoConfig.for_model(family, **SMALL | special | changes)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it so
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(built).save_pretrained(path)
        return path

    return write
