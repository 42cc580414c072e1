"""The CPU benchmark's contenders: every policy of the table is measured, and can be."""

from pathlib import Path

from kernels.bench.cpu.contenders import FAR, NEAR, needle, policies
from sparseserve.demo.circuits import LAYERS
from sparseserve.policies import POLICIES


def test_every_policy_has_a_contender(tmp_path: Path) -> None:
    measured = policies(tmp_path, LAYERS)
    assert [name for name in POLICIES if name not in {policy.name for policy in measured.values()}] == []
    assert [label for label, policy in measured.items() if policy.frees_pages] == []  # policies are exchanged


def test_policies_that_may_lose_a_needle_are_asked_for_a_near_one(tmp_path: Path) -> None:
    near = {policy.name for policy in policies(tmp_path, LAYERS).values() if needle(policy) == NEAR}
    assert near == {"streaming", "hip", "s2"} and needle(None) == FAR
