"""Policies compared on a model: accuracy, perplexity, attention recall, share of KV read and speed, by real servers."""
