"""Head maps: Retrieval_Head (arXiv 2404.15574), DuoAttention (2410.10819) and LServe, RazorAttention (2407.15891)."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sparseserve.artifacts.artifact import Artifact
from sparseserve.artifacts.read import MAX_HEADS, Index, Rows, Tokens, parse, read_json, read_text, rectangle, refuse

DUO_TSV = "full_attention_heads.tsv"
DUO_SLACK = 0.1  # trained gates end slightly outside [0, 1]
HEAD_KEY = re.compile(r"(0|[1-9][0-9]{0,2})-(0|[1-9][0-9]{0,2})")
PAPER_THRESHOLD = 0.1  # of Retrieval_Head, section 2: the heads that it calls retrieval heads
DUO_SHARE = 0.5  # sparsity 0.5, what DuoAttention and LServe run GQA models with
RAZOR_SINK, RAZOR_RECENT = 4, 256  # tokens, of Huawei's implementations
Detections = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]], Field(min_length=1)]
Heads = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_HEADS, strict=True)]], Field(max_length=MAX_HEADS)]
Lists = dict[Index, Heads]
ROWS = TypeAdapter(Rows)
DETECTIONS = TypeAdapter(dict[str, Detections])
LISTS = TypeAdapter(Lists)


class DuoConfig(BaseModel):
    """What we need of the config.json beside a DuoAttention pattern."""

    sink_size: Tokens
    recent_size: Tokens
    model_name: str | None = None


class RazorFile(BaseModel):
    """What msmodelslim saves: the KV heads that the induction and the echo score chose, by layer."""

    model_config = ConfigDict(extra="forbid")

    prefix_matching: Lists
    copying: Lists


DUO_CONFIG = TypeAdapter(DuoConfig)
RAZOR_FILE = TypeAdapter(RazorFile)


def is_retrieval_head(content: dict[str, Any]) -> bool:
    """Whether JSON is a Retrieval_Head score file, right or wrong."""
    return any(HEAD_KEY.fullmatch(key) for key in content)


def is_razor(content: dict[str, Any]) -> bool:
    """Whether JSON is a RazorAttention head list, right or wrong."""
    return any(re.fullmatch("[0-9]+", key) for key in content)


def load_retrieval_head(content: dict[str, Any], path: Path) -> Artifact:
    """{"layer-head": the head's score in every successful detection}: the means are the scores [L, Hq]."""
    detections = parse(DETECTIONS, content, path, "a list of scores for every head")
    if wrong := next((key for key in detections if not HEAD_KEY.fullmatch(key)), None):
        refuse(path, "key", wrong, "keys of the form layer-head")
    counts = {len(values) for values in detections.values()}
    if len(counts) > 1:
        refuse(path, "detections per head", f"{min(counts)} to {max(counts)}", "as many for every head")
    means = {tuple(map(int, key.split("-"))): fmean(values) for key, values in detections.items()}
    layers, heads = (max(key[axis] for key in means) + 1 for axis in (0, 1))
    if len(means) < layers * heads:
        missing = next(key for key in product(range(layers), range(heads)) if key not in means)
        refuse(path, "{}-{}".format(*missing), "missing", f"every head of {layers} layers x {heads} query heads")
    scores = torch.tensor([means[key] for key in sorted(means)], dtype=torch.float64).reshape(layers, heads)
    arguments = _arguments("retrieval_head", "query_head", {"threshold": PAPER_THRESHOLD})
    source = f"Retrieval_Head scores, {layers} layers x {heads} query heads, {counts.pop()} detections"
    return Artifact("retrieval", {"scores": scores}, arguments, layers, heads, source)


def load_duo(path: Path, config_path: Path) -> Artifact:
    """A table of gates [L, H], a line for each layer, and the sink and recent tokens that they were trained with."""
    gates = parse(ROWS, [_floats(line, path) for line in read_text(path).splitlines()], path, "a table of numbers")
    layers, heads = rectangle(gates, path, "line")
    scores = torch.tensor(gates, dtype=torch.float64)
    low, high = (float(value) for value in scores.aminmax())
    if low < -DUO_SLACK or high > 1 + DUO_SLACK:
        refuse(path, "gates", f"{low:.3g} to {high:.3g}", "gates from 0 to 1")
    config = parse(DUO_CONFIG, read_json(config_path), config_path, "DuoAttention's arguments")
    arguments = _arguments("duo", "kv_head", {"share": DUO_SHARE}, config.sink_size, config.recent_size)
    source = f"DuoAttention gates, {layers} layers x {heads} KV heads"
    tensors = {"scores": scores.clamp(0, 1)}
    return Artifact("retrieval", tensors, arguments, layers, heads, source, kv_heads=heads, model=config.model_name)


def load_razor(content: dict[str, Any], path: Path) -> Artifact:
    """{"layer": KV heads that keep everything}, or msmodelslim's two such lists, of which it keeps the union."""
    if "prefix_matching" in content or "copying" in content:
        both = parse(RAZOR_FILE, _text_keys(content), path, "prefix_matching and copying, each layer: [KV heads]")
        lists = [both.prefix_matching, both.copying]
    else:
        lists = [parse(LISTS, content, path, "layer: [KV heads]")]
    chosen = {(int(layer), head) for heads in lists for layer in heads for head in heads[layer]}
    if not chosen:
        refuse(path, "retrieval heads", "none", "at least one KV head in a layer")
    layers, heads = (max(key[axis] for key in chosen) + 1 for axis in (0, 1))
    scores = torch.zeros(layers, heads, dtype=torch.float64)
    for layer, head in chosen:
        scores[layer, head] = 1
    arguments = _arguments("razor", "kv_head", {"threshold": 0.5}, RAZOR_SINK, RAZOR_RECENT, complete=False)
    source = f"RazorAttention list of {len(chosen)} KV heads in layers up to {layers - 1}"
    return Artifact("retrieval", {"scores": scores}, arguments, layers, heads, source)


def _arguments(
    scores: str,
    per: str,
    rule: dict[str, float],
    sink: int | None = None,
    recent: int | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    return {
        "scores": scores,
        "per": per,
        "sink_tokens": sink,
        "recent_tokens": recent,
        "rule": rule,
        "complete": complete,
    }


def _floats(line: str, path: Path) -> list[float]:
    try:
        return [float(cell) for cell in line.split("\t")]
    except ValueError as error:
        refuse(path, "table", error, "lines of numbers between tabs")


def _text_keys(content: dict[str, Any]) -> dict[str, Any]:
    """msmodelslim numbers layers, JSON names them."""
    return {
        name: {str(layer): heads for layer, heads in lists.items()} if isinstance(lists, dict) else lists
        for name, lists in content.items()
    }
