"""The policies, by name."""

from sparseserve.policies.base import BudgetPolicy, Policy
from sparseserve.policies.dense import Dense
from sparseserve.policies.quest import Quest
from sparseserve.policies.streaming import Streaming
from sparseserve.policies.tidal import Tidal

POLICIES: dict[str, type[Policy]] = {
    "dense": Dense,
    "streaming": Streaming,
    "quest": Quest,
    "tidal": Tidal,
}

__all__ = ["POLICIES", "BudgetPolicy", "Dense", "Policy", "Quest", "Streaming", "Tidal"]
