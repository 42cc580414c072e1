"""The search for the policy to serve: from the largest budget down, as long as the loss allows; all of it measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter

from sparseserve.config import find_policy, to_dict
from sparseserve.errors import ConfigError, SparseServeError
from sparseserve.evaluation.evaluation import Setting
from sparseserve.evaluation.results import SettingResult
from sparseserve.policies import POLICIES
from sparseserve.server.launch.explain import explain
from sparseserve.tuning.judge import Judged, Loss, longest, loss

Measure = Callable[[Setting], SettingResult]
LEAST_BUDGET = 256  # tokens


def candidates() -> str:
    """The policies that suit any model as they are, as `--policies` takes them."""
    return ",".join(name for name, cls in POLICIES.items() if cls.for_any_model and cls.has_defaults())


def budgets(lengths: Iterable[int]) -> list[int]:
    """Powers of two up to half of the longest length, in tokens."""
    most = max(lengths) // 2
    return [budget for power in range(31) if LEAST_BUDGET <= (budget := 1 << power) <= most] or [LEAST_BUDGET]


def with_budgets(settings: Sequence[Setting], lengths: Sequence[int]) -> tuple[Setting, ...]:
    """Each setting with every usual budget that it can have, or as it is where it can have none of them."""
    usual = budgets(lengths)
    each = ([one for budget in usual if _exists(one := setting.at(budget))] or [setting] for setting in settings)
    return tuple(dict.fromkeys(chain.from_iterable(each)))


def _exists(setting: Setting) -> bool:
    try:
        setting.load()
    except ConfigError:
        return False
    return True


def families(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that differ in their budget alone, the largest budget first."""
    found: dict[str, list[tuple[int, Setting]]] = {}
    for setting in settings:
        rest, budget = _budget(setting)
        found.setdefault(rest, []).append((budget, setting))
    return [[one for _, one in sorted(family, key=itemgetter(0), reverse=True)] for family in found.values()]


def descend(
    family: Sequence[Setting], baseline: SettingResult, stored: dict[Setting, float], max_loss: float, measure: Measure
) -> list[Judged]:
    """Measure a family until a setting loses more than `max_loss`, that one included."""
    judged = []
    for setting in family:
        result = measure(setting)
        judged.append(judge(setting, result, baseline, stored[setting], loss(result, baseline)))
        if judged[-1].loss.value > max_loss:
            break
    return judged


def judge(setting: Setting, result: SettingResult, baseline: SettingResult, stored: float, lost: Loss) -> Judged:
    """A result beside the baseline; `stored` is in bytes per token."""
    at, before = longest(result), longest(baseline)
    return Judged(
        setting=setting,
        result=result,
        loss=lost,
        ms_per_token=at.ms_per_token,
        speedup=before.ms_per_token / at.ms_per_token if at.ms_per_token and before.ms_per_token else None,
        density=1.0 if at.density is None else at.density,
        stored=stored,
        recall=at.recall,
    )


def fitting(
    settings: Sequence[Setting], model: str, vllm: Sequence[str], length: int
) -> tuple[dict[Setting, float], dict[str, str]]:
    """Bytes that a row of `length` tokens stores per token, by setting, and why the others cannot be served."""
    stored, refused = {}, {}
    for setting in settings:
        try:
            found = explain(find_policy(setting.policy, setting.pairs, {}), [model, *vllm], [length])
        except SparseServeError as error:
            refused[str(setting)] = str(error)
        else:
            stored[setting] = found.rows[0].stored.bytes / length
    return stored, refused


def _budget(setting: Setting) -> tuple[str, int]:
    """All values of a setting but its budget, and that in tokens; 0 for a policy without one."""
    policy = setting.load()
    return json.dumps(to_dict(policy) | policy.at_budget(0)), policy.budget
