"""One engine, of one or more tensor-parallel ranks, under several policies: tokens, and what every rank says of recall.

Answers {policy: {"tokens": [[...], ...], "texts": [...], "outcomes": [[of each rank], ...]}}.
"""

from __future__ import annotations

from typing import Any

from tests.helpers.plugin import one_process


def main(asked: dict[str, Any]) -> Any:
    llm = one_process.start(asked)
    from vllm import SamplingParams

    from sparseserve.config import from_dict
    from sparseserve.testing.engine import rebind

    answers, request = {}, 0
    for name, policy in asked["policies"].items():
        llm.collective_rpc(rebind, args=(from_dict(policy),))
        llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=16)
        found = [output.outputs[0] for output in llm.generate(asked["prompts"], params, use_tqdm=False)]
        names = range(request, request := request + len(found))
        answers[name] = {
            "tokens": [list(one.token_ids) for one in found],
            "texts": [one.text for one in found],
            "outcomes": [llm.collective_rpc("sparseserve_outcome", args=(str(number),)) for number in names],
        }
    return answers


if __name__ == "__main__":
    one_process.answer(main)
