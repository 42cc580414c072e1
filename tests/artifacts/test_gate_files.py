"""Gate checkpoints of SeerAttention-R, in the layout and shapes of the published ones."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.artifacts import load, save
from sparseserve.errors import ArtifactError
from sparseserve.model import ModelShape
from sparseserve.types import HeadShape

QWEN3_4B = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 2560,
    "base_model": "Qwen/Qwen3-4B",
    "seerattn_sparsity_method": "threshold",
    "seerattn_token_budget": 4096,
    "seerattn_threshold": 0.0,
    "seerattn_gate_block_size": 64,
    "seerattn_gate_hidden_size": 128,
    "seerattn_k_seq_pooling_type": "Kmaxminavg",
    "seerattn_q_head_pooling_type": "Qproj",
    "seerattn_use_rope": True,
    "seerattn_use_qk_norm": True,
    "seerattn_start_layer": 0,
    "seerattn_loss_slice_ratio": 0.5,
}
TINY = QWEN3_4B | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TINY |= {"seerattn_gate_hidden_size": 4}
GATE = "model.layers.{}.self_attn.attn_gate.attngate_{}.weight"
Q0 = GATE.format(0, "linear_q")


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random gates as the published state dicts hold them."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, gate = config["num_key_value_heads"], config["head_dim"], config["seerattn_gate_hidden_size"]
    shapes = {
        "linear_q": (heads, config["num_attention_heads"] // heads, dim, gate),
        "linear_k": (heads, 3 * dim, gate),
        "qnorm": (gate,),
        "knorm": (gate,),
    }
    return {
        GATE.format(layer, name): torch.randn(shape, generator=generator).bfloat16()
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }


def checkpoint(folder: Path, state: Any, config: Any = TINY) -> Path:
    """A folder as published."""
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "attn_gate_weights.pth")
    return folder


def refused(folder: Path, *told: str) -> None:
    """Loading is refused with all of `told` in the message."""
    with pytest.raises(ArtifactError) as error:
        load(folder)
    assert all(text in str(error.value) for text in told), str(error.value)


def test_a_checkpoint_of_qwen3_4b_loads_checks_and_saves(tmp_path: Path) -> None:
    state = weights(QWEN3_4B)
    folder = checkpoint(tmp_path, state, QWEN3_4B)
    assert (folder / "attn_gate_weights.pth").stat().st_size == pytest.approx(66.1e6, rel=0.01)  # as published
    gates = load(folder)
    gates.check(ModelShape("Qwen3-4B", 36, HeadShape(8, 4, 128), 32768, 64))
    gates.check(ModelShape("Qwen3-4B", 36, HeadShape(2, 4, 128), 32768, 64, ranks=4))
    assert gates.tensors["query.35"].shape == (8, 4, 128, 128)
    assert gates.tensors["key.0"].shape == (8, 384, 128)
    assert gates.arguments == {
        "block_size": 64,
        "gate_dim": 128,
        "budget_tokens": 4096,
        "threshold": 0.0,
        "method": "threshold",
        "start_layer": 0,
        "use_rope": True,
        "use_qk_norm": True,
    }
    assert gates.model == "Qwen/Qwen3-4B"
    save(gates, tmp_path / "gates.safetensors")
    again = load(tmp_path / "gates.safetensors").tensors
    names = {"linear_q": "query", "linear_k": "key", "qnorm": "query_norm", "knorm": "key_norm"}
    assert all(
        torch.equal(again[f"{ours}.{layer}"], state[GATE.format(layer, theirs)])
        for theirs, ours in names.items()
        for layer in range(36)
    )


def test_slices_of_the_ranks_make_up_the_gate(tmp_path: Path) -> None:
    gates = load(checkpoint(tmp_path, weights(TINY)))
    ranks = [ModelShape("tiny", 2, HeadShape(1, 2, 8), 4096, 64, rank=rank, ranks=2) for rank in range(2)]
    slices = [gates.tensors["query.1"][rank.my_heads(gates.heads)] for rank in ranks]
    assert torch.equal(torch.cat(slices), gates.tensors["query.1"])


def test_gates_without_norms_have_none(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in weights(TINY).items() if "norm" not in key}
    config = {key: value for key, value in TINY.items() if key != "seerattn_use_qk_norm"}
    gates = load(checkpoint(tmp_path, state, config))
    assert gates.arguments["use_qk_norm"] is False
    refused(checkpoint(tmp_path, state, TINY), "key_norm.0 = missing")


@pytest.mark.parametrize("where", ["weights", "config"])
def test_prefill_gates_are_refused_with_the_reason(tmp_path: Path, where: str) -> None:
    state, config = weights(TINY), dict(TINY)
    if where == "weights":
        state = {"model.layers.0.self_attn.attn_gate.mask_linear_k.weight": torch.zeros(4, 24, 4)}
    else:
        config |= {"seerattn_gate_type": "Qavg_Kmaxminavg"}
    refused(checkpoint(tmp_path, state, config), "decode gates", "one query head at a time")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seerattn_q_head_pooling_type": "Qavgproj"}, "Qproj"),
        ({"seerattn_k_seq_pooling_type": "Kmaxmin"}, "Kmaxminavg"),
        ({"num_hidden_layers": 3}, "key.2 = missing"),
        ({"num_hidden_layers": 1}, "key.1 = not expected"),
        ({"num_attention_heads": 6}, "G = 3"),
        ({"num_key_value_heads": 4, "num_attention_heads": 8}, "4 x 2 x 8 x 4"),
        ({"head_dim": 16}, "2 x 2 x 16 x 4"),
        ({"seerattn_gate_hidden_size": 8}, "shape"),
        ({"seerattn_use_qk_norm": False}, "key_norm.0 = not expected"),
        ({"seerattn_gate_block_size": 0}, "seerattn_gate_block_size"),
        ({"seerattn_threshold": 2.0}, "seerattn_threshold"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_a_config_that_does_not_fit_the_gates_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    refused(checkpoint(tmp_path, weights(TINY), TINY | change), told)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({}, "MoA plan"),
        ({Q0: torch.zeros(2, 2, 8, 4)}, "missing"),
        (weights(TINY) | {Q0: torch.zeros(2, 2, 8)}, "[H, G, D, E]"),
        (weights(TINY) | {Q0: torch.zeros(2, 2, 8, 4, dtype=torch.int32)}, "torch.int32"),
        (weights(TINY) | {Q0: torch.full((2, 2, 8, 4), torch.nan)}, "NaN"),
        (weights(TINY) | {Q0: torch.zeros(2, 2, 8, 4).to_sparse()}, "dense tensor"),
        (weights(TINY) | {Q0: [1.0]}, "a tensor"),
        (weights(TINY) | {"model.layers.0.self_attn.attn_gate.bias": torch.zeros(1)}, "attn_gate.bias"),
        (weights(TINY) | {GATE.format(-1, "qnorm"): torch.zeros(4)}, "layers.-1"),
        ({Q0: torch.zeros(1).expand(1 << 20, 1 << 20)}, "larger than the file"),
        ([torch.zeros(1)], "a dict"),
    ],
)
def test_weights_that_are_not_gates_are_refused(tmp_path: Path, state: Any, told: str) -> None:
    refused(checkpoint(tmp_path, state), told)


class Bomb:
    """Unpickles to a new file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "executed")
    pickle.loads(pickle.dumps(bomb))
    assert bomb.target.exists()  # the bomb works
    bomb.target.unlink()
    refused(checkpoint(tmp_path, {Q0: bomb}), "attn_gate_weights.pth", "pickle =")
    (tmp_path / "heads.pt").write_bytes(pickle.dumps({"prefix_matching": bomb}))
    refused(tmp_path / "heads.pt", "heads.pt", "torch.save")
    assert not bomb.target.exists()


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """Its few bytes could unpack to any number."""
    checkpoint(tmp_path, weights(TINY))
    path, packed = tmp_path / "attn_gate_weights.pth", io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    path.write_bytes(packed.getvalue())
    refused(tmp_path, "compressed entries")


@pytest.mark.parametrize("kept", [4, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    checkpoint(tmp_path, weights(TINY))
    path = tmp_path / "attn_gate_weights.pth"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    refused(tmp_path, "attn_gate_weights.pth", "torch.save")


def test_gates_need_their_config(tmp_path: Path) -> None:
    checkpoint(tmp_path, weights(TINY))
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json", "no file of that name")
