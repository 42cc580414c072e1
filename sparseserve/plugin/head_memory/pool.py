"""KV heads in groups with page tables of their own: what vLLM's worker is told, and where the pages are.

The first group belongs to the model's attention layers, every other to one layer that exists for its pages only. All
page tables draw from one pool: a page is a run of slots, whichever group holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, replace_as

from sparseserve.errors import Problem, UnsupportedError
from sparseserve.footprint.groups import Storage
from sparseserve.model import ModelShape
from sparseserve.plugin.head_memory import poison
from sparseserve.plugin.head_memory.manager import SinkWindowSpec


class HeadGroups:
    """The groups of one worker's KV heads.

    Page tables and slot mappings of the latest batch never move, so that captured graphs find them. The tables take
    4 * R * rows * N bytes: 25 MB for 12 groups and 256 rows of 128k tokens on pages of 64.
    """

    def __init__(
        self, storage: Storage, model: ModelShape, dtype: torch.dtype, rows: int, tokens: int, device: torch.device
    ) -> None:
        self.storage, self.model = storage, model
        self.rows, self._dtype = rows, dtype
        self.names: list[str] = []  # of every group's first layer
        shape = len(storage.windows), rows, -(-model.max_len // model.page_size)
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)  # [R, rows, N]
        groups = len(storage.windows)
        self.slot_mappings = torch.full((groups, tokens), -1, device=device)  # [R, tokens] int64, of new tokens

    def register(self, config: VllmConfig) -> None:
        """Put a layer for every group but the first beside the model's own layers, of whose first it takes note."""
        context = config.compilation_config.static_forward_context
        first, self._first = next(iter(get_layers_from_vllm_config(config, Attention).items()))
        self.names = [first, *(f"{first}.group{number}" for number in range(1, len(self.storage.windows)))]
        context.update({name: GroupLayer(self, number) for number, name in enumerate(self.names) if number})

    def layers_spec(self, spec: AttentionSpec) -> AttentionSpec:
        """What a layer of the model asks for: its part of the first group's page, which it does not use itself.

        UnsupportedError when vLLM gave pages another size after the groups were made.
        """
        if spec.block_size != self.model.page_size:
            allowed = f"{spec.block_size}, which vLLM's attention asks for"
            remedy = f"give --block-size {spec.block_size}"
            raise UnsupportedError(Problem("--block-size", self.model.page_size, allowed, remedy=remedy))
        part = replace(spec, num_head_slots=1, state_content_bytes=self._part_bytes)
        if self.storage.windows[0] is None:
            return part
        return replace_as(part, SinkWindowSpec, drop=("attention_chunk_size", "non_causal"), **self._window(0))

    def group_spec(self, number: int) -> AttentionSpec:
        """What the layer of another group asks for: whole pages."""
        return SinkWindowSpec(
            block_size=self.model.page_size,
            num_kv_heads=self.storage.slots,
            head_size=self.model.heads.head_dim,
            dtype=self._dtype,
            page_size_padded=self.model.layers * self.model.page_size * self._part_bytes,
            **self._window(number),
        )

    def _window(self, number: int) -> dict[str, Any]:  # of its fields
        """What sets the spec of a group with a window apart."""
        window, size = self.storage.windows[number], self.model.page_size
        assert window is not None
        return {"sliding_window": window.pages(self.model.max_len, size) * size, "window": window, "part": number}

    @property
    def _part_bytes(self) -> int:
        """A layer's part of a page, for every token of the page."""
        return self.storage.layer_part(self.model) * self._dtype.itemsize

    @property
    def pages(self) -> Tensor:
        """The pool [M, S, P, 2D]: all pages, whichever group holds them."""
        first = self._first.kv_cache
        size, width = self.model.page_size, 2 * self.model.heads.head_dim
        return first.as_strided(
            (first.shape[0], self.storage.slots, size, width), (first.stride(0), size * width, width, 1)
        )

    def keep(self, number: int, common: CommonAttentionMetadata) -> None:
        """Copy the batch's page table and slots of a group to where kernels find those of all groups."""
        if number == 0 and poison.ENABLED:
            poison.fill(self.pages)
        pages = -(-common.max_seq_len // self.model.page_size)
        self.tables[number, : common.num_reqs, :pages] = common.block_table_tensor[: common.num_reqs, :pages]
        self.slot_mappings[number, : common.slot_mapping.shape[0]] = common.slot_mapping


class GroupLayer(AttentionLayerBase):
    """Stands for a group's pages in vLLM's table of attention layers; computes nothing."""

    def __init__(self, groups: HeadGroups, number: int) -> None:
        self.groups, self.number = groups, number

    def get_attn_backend(self) -> type[AttentionBackend]:
        return GroupBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.groups.group_spec(self.number)


class GroupBackend(AttentionBackend):
    """Of layers that compute nothing."""

    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> NoReturn:
        raise AssertionError("a group of heads has no attention of its own")

    @staticmethod
    def get_builder_cls() -> type[GroupBuilder]:
        return GroupBuilder


class GroupBuilder(AttentionMetadataBuilder[CommonAttentionMetadata]):
    """Passes a group's page table on; the attention layers find it there."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    reorder_batch_threshold: int = 1

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        (name,) = layer_names
        layer = vllm_config.compilation_config.static_forward_context[name]
        self._keep: Callable[[int, CommonAttentionMetadata], None] = layer.groups.keep
        self._number: int = layer.number

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CommonAttentionMetadata:
        self._keep(self._number, common_attn_metadata)
        return common_attn_metadata
