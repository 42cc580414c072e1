"""The policies, by name: a policy is a file of this folder and a line below, in the order of every list and table."""

from inspect import isabstract

from sparseserve.policies.base import Policy as Policy
from sparseserve.policies.budget import BudgetPolicy as BudgetPolicy

# isort: off
from sparseserve.policies.dense import Dense as Dense
from sparseserve.policies.streaming import Streaming as Streaming
from sparseserve.policies.quest import Quest as Quest
from sparseserve.policies.tidal import Tidal as Tidal
from sparseserve.policies.hip import Hip as Hip
from sparseserve.policies.moa import Moa as Moa
from sparseserve.policies.retrieval import Retrieval as Retrieval
from sparseserve.policies.seer import Seer as Seer
from sparseserve.policies.s2 import S2 as S2
# isort: on

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in tuple(vars().values())
    if isinstance(policy, type) and issubclass(policy, Policy) and not isabstract(policy)
}
