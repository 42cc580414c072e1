"""What tests of several folders share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from sparseserve.testing import target
from sparseserve.testing.target import Layout

pytest_plugins = ["tests.helpers.skips"]

DEVICES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "cpu": nullcontext,
    "simulator": partial(target.simulated, Layout.LBHNC),
}
if torch.cuda.is_available():
    DEVICES["cuda"] = partial(target.on_gpu, Layout.LBHNC)

# A config.json without weights for each.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 8192,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "odd-head-size": {"head_dim": 112},
    "sliding": {"sliding_window": 1024},
    "interleaved": {"sliding_window": 512, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": 6,
    },
    "mamba": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 16,
    },
    "encoder": {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512},
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels, the CUDA kernels in the simulator, and on a GPU where there is one."""
    if request.param == "simulator" and not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with DEVICES[request.param]():
        yield request.param


@pytest.fixture(scope="session")
def published() -> Path:
    """Files that authors published; they are not part of the project."""
    folder = os.environ.get("SPARSESERVE_PUBLISHED")
    if folder is None:
        pytest.skip("SPARSESERVE_PUBLISHED names no folder with moa/ and duo/")
    return Path(folder)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a command sets ends with its test."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder of every model, by name, as `vllm serve` takes it."""
    folders = {name: tmp_path_factory.mktemp("models") / name for name in MODELS}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA | MODELS[name]))
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def vllm_models() -> None:
    """Known classes spare vLLM a subprocess of several seconds for each architecture."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.bert import BertModel
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.mamba import MambaForCausalLM

    for cls in (BertModel, DeepseekV2ForCausalLM, LlamaForCausalLM, MambaForCausalLM):
        ModelRegistry.register_model(cls.__name__, cls)
