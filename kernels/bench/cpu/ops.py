"""Time of every op beside what memory allows and beside vLLM's own CPU attention, with one decoding request.

    python -m kernels.bench.cpu.ops --json out.json

Contenders take turns in random order, each over several requests whose caches together exceed the last-level cache. The
bare read touches the same bytes in the same threads, plainly and with prefetching, and the faster counts. `attend` is
listed twice: the two rows differ by noise alone. Every op is checked against the reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.cpp_extension import load
from vllm import _custom_ops as vllm_ops

from kernels.bench.cpu.pool import DTYPE, KV_HEADS, PAGE, UNIT, Requests
from kernels.bench.cpu.timing import TOUCHED_BYTES, Call, Result, pages_call, read, results, tiles_call
from kernels.bench.environment import environment
from sparseserve import ops, reference
from sparseserve.model import ModelShape
from sparseserve.policies import Hip
from sparseserve.testing.gates import plain_rope, random_gates
from sparseserve.testing.oracle import assert_as_exact
from sparseserve.types import Bound, Gate, HeadShape, PageTable, Selection, Wanted

BUDGET = 1024


def everything(context: int) -> Selection:
    selection = Selection.empty(1, 1, 1, UNIT)
    selection.spans.fill_(context)
    return selection


def random_units(context: int) -> Selection:
    selection = Selection.empty(1, KV_HEADS, BUDGET // UNIT, UNIT)
    selection.spans[..., 1] = context
    selection.count.fill_(BUDGET // UNIT)
    for head in range(KV_HEADS):
        selection.units[0, head] = torch.randperm(context // UNIT)[: BUDGET // UNIT].sort().values
    return selection


def attend_call(requests: Requests, selections: list[Selection]) -> Call:
    out, lse = torch.empty_like(requests.query), torch.empty(1, requests.shape.query_heads)
    attended = torch.empty_like(selections[0].count)

    def call(i: int) -> Tensor:
        selection = selections[i % len(selections)]
        arguments = requests.table(i), selection, requests.scale
        return ops.attend(requests.query, requests.kv, *arguments, out=out, lse=lse, attended=attended)[0]

    return call


def vllm_call(requests: Requests) -> Call:
    shape = requests.shape
    start = torch.tensor([0, 1], dtype=torch.int32)
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=shape.query_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        seq_lens=requests.seq_lens,
        dtype=DTYPE,
        query_start_loc=start,
        causal=True,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=True,
    )
    key, value = requests.cache.view(*requests.cache.shape[:2], 2 * PAGE, shape.head_dim).chunk(2, dim=2)
    out = torch.empty_like(requests.query)

    def call(i: int) -> Tensor:
        vllm_ops.cpu_attention_with_kv_cache(
            query=requests.query,
            key_cache=key,
            value_cache=value,
            output=out,
            query_start_loc=start,
            seq_lens=requests.seq_lens,
            scale=requests.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=requests.row(i),
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
        )
        return out

    return call


def check_attend(requests: Requests, selection: Selection, calls: dict[str, Call]) -> None:
    arguments = requests.query, requests.kv, requests.table(0), selection, requests.scale
    exact = reference.attend(*arguments, dtype=torch.float64)[0]
    peer = reference.attend(*arguments)[0].to(DTYPE)
    for name, call in calls.items():
        out = call(0)
        assert isinstance(out, Tensor), name
        assert_as_exact(out, exact, peer, terms=requests.context)


def bench_attend(requests: Requests, rounds: int) -> list[Result]:
    """Sparse at BUDGET tokens of random units, then dense beside vLLM."""
    token_bytes = requests.shape.head_dim * 4
    sparse_bytes, dense_bytes = KV_HEADS * BUDGET * token_bytes, KV_HEADS * requests.context * token_bytes
    count = -(-TOUCHED_BYTES // sparse_bytes)
    count = -(-count // requests.count) * requests.count  # every request as often
    selections = [random_units(requests.context) for _ in range(count)]
    lists = [list(selection.units[0].long()) for selection in selections]
    sparse: dict[str, Call] = {name: attend_call(requests, selections) for name in ("attend", "attend again")}
    check_attend(requests, selections[0], sparse)
    for prefetch in (False, True):
        sparse[f"read tiles{' ahead' * prefetch}"] = tiles_call(requests, lists, True, prefetch)
    dense: dict[str, Call] = {
        "attend everything": attend_call(requests, [everything(requests.context)]),
        "vllm": vllm_call(requests),
    }
    check_attend(requests, everything(requests.context), dense)
    head_bytes = PAGE * token_bytes
    for prefetch in (False, True):
        arguments = requests.cache, requests.pages, KV_HEADS * head_bytes, KV_HEADS, head_bytes
        dense[f"read pages{' ahead' * prefetch}"] = pages_call(*arguments, prefetch)
    return results(requests, sparse, sparse_bytes, rounds) + results(requests, dense, dense_bytes, rounds)


def bench_score_tokens(requests: Requests, rounds: int) -> list[Result]:
    lse = torch.full((1, requests.shape.query_heads), 10.0)
    scores = torch.empty(1, KV_HEADS, requests.context)

    def call(i: int) -> Tensor:
        arguments = requests.table(i), lse, requests.scale, scores, 1
        return ops.score_tokens(requests.query, requests.kv.key, *arguments)

    exact = torch.empty_like(scores, dtype=torch.float64)
    arguments = requests.query, requests.kv.key, requests.table(0), lse, requests.scale
    reference.score_tokens(*arguments, exact, 1, dtype=torch.float64)
    peer = reference.score_tokens(*arguments, torch.empty_like(scores), 1)
    assert_as_exact(call(0), exact, peer, terms=requests.shape.head_dim)
    lists = [[torch.arange(requests.context // UNIT)] * KV_HEADS] * requests.count
    calls: dict[str, Call] = {"score_tokens": call}
    for prefetch in (False, True):
        calls[f"read keys{' ahead' * prefetch}"] = tiles_call(requests, lists, False, prefetch)
    return results(requests, calls, KV_HEADS * requests.context * requests.shape.head_dim * 2, rounds)


def bench_score_pages(requests: Requests, rounds: int) -> list[Result]:
    dim, units = requests.shape.head_dim, PAGE // UNIT
    per_row, page_bytes = requests.context // PAGE, KV_HEADS * units * 2 * dim * DTYPE.itemsize
    touched = per_row * page_bytes
    rows = max(2, TOUCHED_BYTES // touched)
    low = torch.randn(rows * per_row, KV_HEADS, units, 1, dim)
    summary = torch.cat([low, low.abs()], 3).to(DTYPE)
    pages = torch.randperm(rows * per_row).view(rows, per_row).int()
    scores = torch.empty(1, KV_HEADS, requests.context // UNIT)
    calls: dict[str, Call] = {}
    for bound in Bound:

        def call(i: int, bound: Bound = bound) -> Tensor:
            row = pages[i % rows : i % rows + 1]
            return ops.score_pages(requests.query, summary, PageTable(row, requests.seq_lens), UNIT, bound, scores)

        calls[f"score_pages {bound.value}"] = call
        arguments = requests.query, summary, PageTable(pages[:1], requests.seq_lens), UNIT, bound
        exact = reference.score_pages(*arguments, dtype=torch.float64)
        assert_as_exact(call(0), exact, reference.score_pages(*arguments), terms=2 * dim)
    for prefetch in (False, True):
        read_call = pages_call(summary, pages, page_bytes, 1, page_bytes, prefetch)
        calls[f"read summaries{' ahead' * prefetch}"] = read_call
    return results(requests, calls, touched, rounds)


def bench_select_units(requests: Requests, rounds: int) -> list[Result]:
    """Units of one token, the longest list there is."""
    scores = torch.randn(16, 1, KV_HEADS, requests.context)
    sink, recent, budget = (torch.full((KV_HEADS,), n, dtype=torch.int32) for n in (4, 64, BUDGET))
    selection, expected = (Selection.empty(1, KV_HEADS, BUDGET, 1) for _ in range(2))
    wanted = Wanted(selection, sink, recent, budget)
    reference.select_units(scores[0], requests.seq_lens, replace(wanted, selection=expected))
    ops.select_units(scores[0], requests.seq_lens, wanted)
    assert torch.equal(selection.units, expected.units)
    starts = torch.arange(KV_HEADS) * requests.context * 4
    calls: dict[str, Call] = {
        "select_units": lambda i: ops.select_units(scores[i % 16], requests.seq_lens, wanted),
        "read scores": lambda i: read(scores[i % 16], starts, 1, requests.context * 4, 0, False),
    }
    return results(requests, calls, KV_HEADS * requests.context * 4, rounds)


def bench_summarize_pages(requests: Requests, rounds: int) -> list[Result]:
    """A prefill of the whole context."""
    dim, units = requests.shape.head_dim, PAGE // UNIT
    key, slots = requests.kv.key, [requests.slots(i) for i in range(requests.count)]
    summary, expected = (torch.zeros(len(key), KV_HEADS, units, 2, dim, dtype=DTYPE) for _ in range(2))
    ops.summarize_pages(key, slots[0][:512], summary, Bound.MEAN_STD)
    reference.summarize_pages(key, slots[0][:512], expected, Bound.MEAN_STD)
    torch.testing.assert_close(summary, expected)
    lists = [[torch.arange(requests.context // UNIT)] * KV_HEADS] * requests.count
    calls: dict[str, Call] = {
        "summarize_pages": lambda i: ops.summarize_pages(key, slots[i % requests.count], summary, Bound.MEAN_STD),
        "read keys": tiles_call(requests, lists, False, False),
    }
    return results(requests, calls, requests.context * KV_HEADS * dim * DTYPE.itemsize, rounds)


def bench_search_blocks(requests: Requests, rounds: int) -> list[Result]:
    """A search of all stages with hip's defaults, as every repeated step is, beside a read of all keys."""
    policy = Hip()
    plan = policy.plans(ModelShape("bench", 8, requests.shape, requests.context, PAGE))[-1]
    rules = {name: getattr(policy, name) for name in ("chunk_tokens", "stage_tokens", "refresh_steps")}
    sink, recent, budget = plan.sink, plan.recent, plan.budget
    assert sink is not None and recent is not None and budget is not None
    kept = policy.page_state(requests.shape, PAGE)
    assert kept is not None
    state = torch.zeros(len(requests.cache), *kept.shape, dtype=kept.dtype)
    selection, expected = (Selection.empty(1, 1, policy.selection_units(0), 8) for _ in range(2))

    def call(i: int, op: Callable[..., None] = ops.search_blocks, to: Selection = selection) -> None:
        wanted = Wanted(to, sink, recent, budget)
        op(requests.query, requests.kv.key, requests.table(i), state, **rules, wanted=wanted)

    call(0)
    call(0, reference.search_blocks, expected)
    assert torch.equal(selection.units, expected.units)
    lists = [[torch.arange(requests.context // UNIT)] * KV_HEADS] * requests.count
    calls: dict[str, Call] = {"search_blocks": call}
    for prefetch in (False, True):
        calls[f"read keys{' ahead' * prefetch}"] = tiles_call(requests, lists, False, prefetch)
    return results(requests, calls, KV_HEADS * requests.context * requests.shape.head_dim * 2, rounds)


def gate_of(requests: Requests) -> Gate:
    dim = requests.shape.head_dim
    tensors = random_gates(ModelShape("bench", 1, requests.shape, requests.context, PAGE), gate_dim=dim).tensors
    query, key, query_norm, key_norm = (
        tensors[f"{name}.0"].float() for name in ("query", "key", "query_norm", "key_norm")
    )
    rope = plain_rope(requests.context, dim)
    return Gate(query, key, query_norm, key_norm, unrope=rope, rope=rope)


def bench_score_gates(requests: Requests, rounds: int) -> list[Result]:
    """Units of 64 tokens; what is read are the gate keys and the weights of the query's gate."""
    dim, units, gate = requests.shape.head_dim, PAGE // 64, gate_of(requests)
    per_row, page_floats = requests.context // PAGE, KV_HEADS * units * dim
    touched = per_row * page_floats * 4
    rows = max(2, TOUCHED_BYTES // touched)
    summary = torch.randn(rows * per_row, KV_HEADS, units, dim)
    pages = torch.randperm(rows * per_row).view(rows, per_row).int()
    scores = torch.empty(1, KV_HEADS, requests.context // 64)

    def call(i: int) -> Tensor:
        arguments = PageTable(pages[i % rows : i % rows + 1], requests.seq_lens), 64, gate
        return ops.score_gates(requests.query, summary, *arguments, scores=scores)

    arguments = requests.query, summary, PageTable(pages[:1], requests.seq_lens), 64, gate
    torch.testing.assert_close(call(0), reference.score_gates(*arguments), rtol=1e-4, atol=1e-4)
    calls: dict[str, Call] = {"score_gates": call}
    for prefetch in (False, True):
        read_call = pages_call(summary, pages, page_floats * 4, KV_HEADS, units * dim * 4, prefetch)
        calls[f"read gate keys{' ahead' * prefetch}"] = read_call
    return results(requests, calls, touched, rounds)


def bench_summarize_gates(requests: Requests, rounds: int) -> list[Result]:
    """A prefill of the whole context."""
    dim, units, gate = requests.shape.head_dim, PAGE // 64, gate_of(requests)
    summary, expected = (torch.zeros(len(requests.cache), KV_HEADS, units, dim) for _ in range(2))
    positions = torch.arange(requests.context)
    slots = [requests.slots(i) for i in range(requests.count)]
    few = slots[0][:512], positions[:512], gate
    ops.summarize_gates(requests.kv.key, *few, summary)
    reference.summarize_gates(requests.kv.key, *few, expected)
    torch.testing.assert_close(summary, expected, rtol=1e-4, atol=1e-4)
    lists = [[torch.arange(requests.context // UNIT)] * KV_HEADS] * requests.count

    def call(i: int) -> None:
        ops.summarize_gates(requests.kv.key, slots[i % requests.count], positions, gate, summary)

    calls: dict[str, Call] = {"summarize_gates": call}
    calls["read keys"] = tiles_call(requests, lists, False, False)
    return results(requests, calls, KV_HEADS * requests.context * dim * 2, rounds)


BENCHES = {
    "attend": bench_attend,
    "score_tokens": bench_score_tokens,
    "score_pages": bench_score_pages,
    "score_gates": bench_score_gates,
    "search_blocks": bench_search_blocks,
    "select_units": bench_select_units,
    "summarize_gates": bench_summarize_gates,
    "summarize_pages": bench_summarize_pages,
}


def report(rows: list[Result]) -> None:
    columns = ("op", "context", "G", "D", "median us", "best us", "MB", "GB/s", "share of read")
    table = Table(*columns, title=f"{ops.isa()}, {torch.get_num_threads()} threads")
    for r in rows:
        numbers = f"{r.microseconds:.0f}", f"{r.best_microseconds:.0f}", f"{r.bytes / 1e6:.1f}"
        table.add_row(r.op, str(r.context), str(r.group), str(r.head_dim), *numbers,
                      f"{r.gigabytes_per_second:.1f}", f"{r.share_of_read:.0%}")  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--ops", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 16384, 32768], help="multiples of 128 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    here = Path(__file__).parent
    flags = ["-O3", "-march=native", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    load(
        "sparseserve_bench",
        [str(here / "read.cpp"), str(here.parent / "bindings" / "pool.cpp")],
        extra_cflags=flags,
        is_python_module=False,
    )
    torch.manual_seed(0)
    rows: list[Result] = []
    for head_dim, group in ((128, 4), (128, 2), (64, 4), (64, 2)):
        for context in options.contexts:
            requests = Requests(context, HeadShape(KV_HEADS, group, head_dim))
            for name in options.ops:
                rows += BENCHES[name](requests, options.rounds)
    report(rows)
    if options.json:
        document = environment() | {"threads": torch.get_num_threads(), "results": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
