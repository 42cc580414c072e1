"""Numbers are vLLM's own; a difference is one only outside of what the control shows against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.answers import Checked, check, problems
from loadtest.bench import BenchResult, read_result
from loadtest.metrics import Observed, observe, read
from loadtest.prompts import Prompt
from loadtest.scenario import LoadTestError
from loadtest.statistics import LATENCIES, RATES, accuracy, band, compare, estimate, numbers, verdict
from tests.helpers.loadtest import scenario

RECORDED = Path(__file__).parent / "recorded.json"  # of vllm bench serve 0.32 against the built demo model


@pytest.fixture
def recorded() -> BenchResult:
    return read_result(RECORDED)


def test_percentiles_are_those_that_vllm_computes(recorded: BenchResult) -> None:
    theirs, ours = json.loads(RECORDED.read_text()), numbers(recorded)
    for metric in LATENCIES:
        name, share = metric.split("_")
        assert ours[metric] == pytest.approx(theirs[f"{share}_{name}_ms"])
    assert [ours[rate] for rate in RATES] == [
        theirs[key] for key in ("request_goodput", "output_throughput", "request_throughput")
    ]


def test_failed_requests_have_no_latency(recorded: BenchResult) -> None:
    failed = recorded.model_copy(update={"errors": ["gone"] * 2, "output_lens": [0, 0]})
    assert set(numbers(failed)) == set(RATES)


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"duration": 1}')
    for name in ("x.json", "none.json"):
        with pytest.raises(LoadTestError, match=name):
            read_result(tmp_path / name)


def test_the_interval_is_students() -> None:
    found = estimate([9.0, 10.0, 11.0])
    assert (found.value, found.low, found.high) == pytest.approx((10, 10 - 2.4841, 10 + 2.4841), abs=1e-3)
    assert estimate([5.0, 5.0]).low == 5.0


def test_the_band_is_the_largest_ratio_of_control_to_control_again() -> None:
    assert band([10.0, 11.0], [10.0, 8.0]) == pytest.approx(11 / 8)
    assert band([8.0], [11.0]) == pytest.approx(11 / 8)
    assert band([1.0], []) is None and band([0.0], [1.0]) is None


@pytest.mark.parametrize(
    "metric, policy, outcome",
    [
        ("tpot_p50", 10.9, "no difference"),  # the band is 1.1
        ("tpot_p50", 9.2, "no difference"),
        ("tpot_p50", 12.0, "slower"),
        ("tpot_p50", 8.0, "faster"),
        ("output_throughput", 12.0, "faster"),
        ("output_throughput", 8.0, "slower"),
    ],
)
def test_only_what_leaves_the_band_is_faster_or_slower(metric: str, policy: float, outcome: str) -> None:
    found = compare(metric, "c1", [policy] * 3, [10.0, 10.0, 10.0], [11.0, 10.0, 10.0])
    assert found.outcome == outcome and found.ratio == pytest.approx(policy / 10)


def test_a_control_without_numbers_compares_with_nothing() -> None:
    assert compare("goodput", "c1", [1.0], [0.0], [1.0]).outcome == "not measured"


def test_a_rate_that_falls_to_nothing_is_slower() -> None:
    found = compare("goodput", "c1", [0.0, 0.0], [1.0, 1.1], [1.0, 1.0])
    assert (found.outcome, found.ratio) == ("slower", 0)
    assert compare("goodput", "c1", [0.0, 1.0, 1.0], [1.0, 1.1], [1.0, 1.0]).outcome == "no difference"
    assert compare("tpot_p50", "c1", [0.0, 0.0], [1.0, 1.1], [1.0, 1.0]).outcome == "not measured"


def test_the_interval_of_a_share_is_wilsons() -> None:
    some, every = accuracy(18, 20), accuracy(20, 20)
    assert some.interval is not None and every.interval is not None
    (low, high), (least, most) = some.interval, every.interval
    assert some.value == 0.9
    assert low == pytest.approx(0.6990, abs=1e-4) and high == pytest.approx(0.9721, abs=1e-4)
    assert least == pytest.approx(0.8389, abs=1e-4) and most == 1.0


def test_the_verdict_over_loads() -> None:
    def of(*policies: float) -> str:
        return verdict([compare("tpot_p50", "c1", [one], [10.0], [11.0]) for one in policies])

    assert of(5, 10, 10) == "faster"
    assert of(10, 20) == "slower"
    assert of(10, 10) == "no difference"
    assert of(5, 20) == "faster at some loads, slower at others"
    assert verdict([]) == "not measured"


def test_right_answers_and_whole_completions(recorded: BenchResult) -> None:
    first = recorded.generated_texts[0].rstrip(".")
    made = [Prompt("", first), Prompt("", "ANOTHER1"), Prompt("", "NEVERSENT")]
    assert check(scenario(), made, recorded, None) == Checked(sent=3, whole=2, right=1, first_error="")


def test_answers_that_begin_as_the_controls(recorded: BenchResult) -> None:
    made = [Prompt("", None)] * 2
    long = scenario(answers="control", same_characters=5, prompts={"kind": "reasoning", "length": 9}, output_tokens=10)
    assert check(long, made, recorded, None) == Checked(2, 2, None, "")
    assert check(long.model_copy(update={"output_tokens": 11}), made, recorded, None).whole == 0

    def right(first: str, **changes: list[str]) -> int | None:
        other = recorded.model_copy(update={"generated_texts": [first, recorded.generated_texts[1]], **changes})
        return check(long, made, other, recorded).right

    assert right("AUWKV and on") == 2
    assert right("AUWK") == right("garbage") == 1
    assert right("AUWKV69D.", errors=["gone", "gone"]) == 0
    unanswered = recorded.model_copy(update={"errors": ["gone", ""]})
    assert check(long, made, recorded, unanswered).right == 1


def test_what_is_flagged() -> None:
    control = Checked(20, 20, 20, "")

    def found(one: Checked, against: Checked = control, good: Checked = control) -> str:
        return "; ".join(problems(scenario(share_right=0.9), {"c1": good, "c8": one}, {"c1": control, "c8": against}))

    assert found(Checked(20, 20, 18)) == ""
    assert found(Checked(20, 20, 17)).endswith(": 17 of 20 at c8 (85.0%; expected at least 90.0%)")
    assert "empty or short: 1 of 20 at c8; the first error: gone" in found(Checked(20, 19, 19, "gone"))
    assert found(Checked(20, 20, 9), against=Checked(20, 20, 10)) == ""
    assert "the control answered 9 of 20 at c8" in found(Checked(20, 20, 20), against=Checked(20, 20, 9))


def test_wrong_answers_at_one_load_are_not_made_up_for_at_others() -> None:
    good, wrong = Checked(100, 100, 100), Checked(10, 10, 1)
    (told,) = problems(scenario(), {"c1": good, "c8": wrong, "c16": wrong}, dict.fromkeys(("c1", "c8", "c16"), good))
    assert "1 of 10 at c8" in told and "1 of 10 at c16" in told and "c1 " not in told
    assert problems(scenario(), {"c1": good, "c8": Checked()}, {"c1": good, "c8": good}) == []  # one that broke off


def test_what_the_server_said_of_itself() -> None:
    text = "\n".join(
        [
            "# TYPE sparseserve_kv_tokens_attended counter",
            'sparseserve_kv_tokens_attended_total{role="dense"} 30',
            'sparseserve_kv_tokens_attended_total{role="reuse"} 20',
            "# TYPE sparseserve_kv_bytes gauge",
            'sparseserve_kv_bytes{kind="full"} 64',
            'sparseserve_kv_bytes{kind="dense_equivalent"} 100',
            "# TYPE python_gc_objects_collected counter",
            "python_gc_objects_collected_total 5\n",
        ]
    )
    assert read(text) == {"attended": 50.0, "kv_bytes:full": 64.0, "kv_bytes:dense_equivalent": 100.0}
    first = {"attended": 10.0, "resident": 100.0, "preemptions": 3.0, "kv_bytes:full": 5.0}
    last = {"attended": 40.0, "resident": 200.0, "preemptions": 5.0, "kv_bytes:full": 2.0, "kv_usage": 0.5}
    found = observe([[first, last], [first, first]])
    assert found == Observed(0.3, None, 0.5, 5.0, None, None, 2.0, 0.0)
    assert observe([[]]).density is None
