"""Gates distilled from a model's own attention (SeerAttention-R, arXiv 2506.08889)."""
