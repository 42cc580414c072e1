"""What correct means: the ops in plain torch, with the signatures of `sparseserve.ops` and written to be read."""

from sparseserve.reference.attend import attend, attended_tokens
from sparseserve.reference.compare import compare_outputs
from sparseserve.reference.gate import score_gates, summarize_gates
from sparseserve.reference.score import score_pages, score_tokens
from sparseserve.reference.search import search_blocks
from sparseserve.reference.select import select_units
from sparseserve.reference.summarize import summarize_pages
from sparseserve.reference.write import write_tokens

__all__ = [
    "attend",
    "attended_tokens",
    "compare_outputs",
    "score_gates",
    "score_pages",
    "score_tokens",
    "search_blocks",
    "select_units",
    "summarize_gates",
    "summarize_pages",
    "write_tokens",
]
