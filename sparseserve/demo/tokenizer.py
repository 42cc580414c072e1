"""A byte-level tokenizer as plain JSON: token id = byte value, `<s>` in front of every prompt."""

from __future__ import annotations

from typing import Any

from sparseserve.demo.circuits import BOS_ID, EOS_ID

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The texts of the messages, one straight after the other: the model continues the last one."""


def byte_characters() -> list[str]:
    """The 256 printable characters by which byte-level BPE vocabularies write bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def tokenizer_json() -> dict[str, Any]:
    """Contents of tokenizer.json."""

    def special(token: str, index: int) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {"id": index, "content": token, **flags}

    bos: dict[str, Any] = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    pair: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 1}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special("<s>", BOS_ID), special("</s>", EOS_ID)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, pair],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS_ID], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocab, "<s>": BOS_ID, "</s>": EOS_ID},
            "merges": [],
        },
    }


def tokenizer_config(max_tokens: int) -> dict[str, Any]:
    """Contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
