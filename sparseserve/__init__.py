"""Decode-time sparse attention over the paged KV cache, as a plugin for stock vLLM."""
