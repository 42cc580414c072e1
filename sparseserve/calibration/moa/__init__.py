"""MoA: influence of tokens on the answers, then the windows that lose least (arXiv 2406.14909)."""
