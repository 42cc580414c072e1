"""New tokens in the cache."""

from __future__ import annotations

from torch import Tensor

from sparseserve.types import PagedKV


def write_tokens(key: Tensor, value: Tensor, slots: Tensor, kv: PagedKV) -> None:
    """See `sparseserve.ops.write_tokens`."""
    assert kv.places is not None
    for head, (table, place) in enumerate(kv.places.tolist()):
        for token, slot in enumerate(slots[table, : len(key)].tolist()):
            if slot >= 0:
                page, offset = divmod(slot, kv.page_size)
                kv.key[page, place, offset] = key[token, head]
                kv.value[page, place, offset] = value[token, head]
