"""One engine that is asked the same questions under several guards; every attention of its layers is recorded.

Answers {case: {"texts": [...], "counts": {sample: rise}, "reported": [recall of each layer], "oracle": [the same],
"outcomes": [...]}}.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.helpers.plugin import one_process


class Recorder:
    """Takes the place of `attend` in decode steps: computes in fp64 what share of the softmax mass a layer keeps."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        self._attend, self.recording = attend, False
        self.mass: dict[int, list[float]] = defaultdict(list)  # by address of the layer's keys

    def __call__(self, query: Tensor, kv: Any, table: Any, selection: Any, scale: float, **options: Any) -> Any:
        if self.recording and options.get("attended") is not None:
            for row, length in enumerate(table.seq_lens.tolist()):
                self.mass[kv.key.data_ptr()].append(
                    kept(query[row], kv, table.pages[row], length, selection, row, scale)
                )
        return self._attend(query, kv, table, selection, scale, **options)

    def means(self) -> list[float]:
        """Of every layer, in order of the cache."""
        return [sum(rows) / len(rows) for _, rows in sorted(self.mass.items())]


def kept(query: Tensor, kv: Any, pages: Tensor, length: int, selection: Any, row: int, scale: float) -> float:
    from sparseserve.reference.attend import attended_tokens
    from sparseserve.reference.paging import logits, row_tokens

    keys = row_tokens(kv.key, pages, length)
    weights = logits(query, keys, scale, torch.float64).softmax(1)
    chosen = attended_tokens(selection, row, length)
    return float((weights * chosen.repeat_interleave(len(weights) // len(chosen), 0)).sum(1).mean())


def main(asked: dict[str, Any]) -> Any:
    llm = one_process.start(asked)
    from vllm import SamplingParams

    from sparseserve import ops
    from sparseserve.config import from_dict
    from sparseserve.plugin.watch.meter import snapshot
    from sparseserve.testing.engine import rebind

    def counts() -> dict[str, float]:
        found = {
            sample + "".join(f",{key}={value}" for key, value in labels.items() if key not in ("policy", "isa")): value
            for *_, samples in snapshot()
            for sample, labels, value in samples
        }
        preempted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
        return found | {"preemptions": preempted}

    recorder = Recorder(ops.attend)
    patch.object(ops, "attend", recorder).start()
    answers, asked_so_far = {}, 0
    for case in asked["cases"]:
        llm.collective_rpc(rebind, args=(from_dict(case["policy"]),))
        llm.reset_prefix_cache()
        recorder.recording, recorder.mass, before = case.get("record", False), defaultdict(list), counts()
        params = SamplingParams(temperature=0, max_tokens=case["tokens"], ignore_eos=case.get("long", False))
        texts = [output.outputs[0].text for output in llm.generate(case["prompts"], params, use_tqdm=False)]
        names = range(asked_so_far, asked_so_far + len(texts))
        asked_so_far += len(texts)
        answers[case["name"]] = {
            "texts": texts,
            "counts": (rise := {name: value - before.get(name, 0) for name, value in counts().items()}),
            "reported": [
                rise[f"sparseserve_layer_recall_sum,layer={layer}"] / rows
                for layer in range(asked["layers"])
                if (rows := rise.get(f"sparseserve_layer_recall_count,layer={layer}"))
            ],
            "oracle": recorder.means(),
            "outcomes": [llm.collective_rpc("sparseserve_outcome", args=(str(name),))[0] for name in names],
        }
    return answers


if __name__ == "__main__":
    one_process.answer(main)
