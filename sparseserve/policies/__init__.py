"""The policies, by name."""

from sparseserve.policies.base import Policy
from sparseserve.policies.budget import BudgetPolicy
from sparseserve.policies.dense import Dense
from sparseserve.policies.hip import Hip
from sparseserve.policies.moa import Moa
from sparseserve.policies.quest import Quest
from sparseserve.policies.retrieval import Retrieval
from sparseserve.policies.s2 import S2
from sparseserve.policies.seer import Seer
from sparseserve.policies.streaming import Streaming
from sparseserve.policies.tidal import Tidal

POLICIES: dict[str, type[Policy]] = {
    "dense": Dense,
    "streaming": Streaming,
    "quest": Quest,
    "tidal": Tidal,
    "hip": Hip,
    "moa": Moa,
    "retrieval": Retrieval,
    "seer": Seer,
    "s2": S2,
}

__all__ = [
    "POLICIES",
    "BudgetPolicy",
    "S2",
    "Dense",
    "Hip",
    "Moa",
    "Policy",
    "Quest",
    "Retrieval",
    "Seer",
    "Streaming",
    "Tidal",
]
