"""Requests that come, go and push each other out: pages are neither lost nor given away while they are needed."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.request import Request, RequestStatus

from sparseserve.footprint.groups import HeadWindow
from tests.helpers.plugin.scheduling import MAX_LEN, PAGE, ROWS, Server, blocks_of, held, known, needed, request

pytestmark = pytest.mark.vllm

WINDOWS = st.builds(
    HeadWindow,
    sink=st.sampled_from([0, 3, 4, 9]),
    alpha=st.sampled_from([-8.0, 0.0, 6.0, 13.0]),
    beta=st.sampled_from([0.0, 0.25, 0.6]),
    minimum=st.sampled_from([1, 7, 20]),
    dense_up_to=st.sampled_from([0, 0, 10, 40]),
)
GROUPS = st.one_of(
    st.lists(WINDOWS, min_size=1, max_size=3).map(lambda windows: [None, *windows]),
    st.lists(WINDOWS, min_size=1, max_size=3),
    WINDOWS.map(lambda window: [None, window, window]),  # one class in two parts
)


class Schedules(RuleBasedStateMachine):
    """What people may do to a server, in any order."""

    @initialize(
        windows=GROUPS,
        spare=st.integers(0, 40),
        budget=st.sampled_from([5, 16, 64]),
        caching=st.sampled_from([True, True, False]),
        ahead=st.booleans(),
    )
    def start(self, windows: list[HeadWindow | None], spare: int, budget: int, caching: bool, ahead: bool) -> None:
        self.server, self.ahead = Server(windows, spare, budget, caching, ahead), ahead
        self.prompts: list[list[int]] = []

    @property
    def running(self) -> list[Request]:
        return self.server.scheduler.running

    @precondition(lambda self: len(self.server.scheduler.requests) < 2 * ROWS)
    @rule(earlier=st.integers(0, 7), shared=st.integers(0, MAX_LEN), own=st.integers(1, 40), answer=st.integers(1, 40))
    def arrive(self, earlier: int, shared: int, own: int, answer: int) -> None:
        number = len(self.prompts)
        prefix = self.prompts[-1 - earlier][:shared] if earlier < number else []
        prompt = [*prefix, *range(1000 * number, 1000 * number + own)][: MAX_LEN - answer]
        self.prompts.append(prompt)
        self.server.scheduler.add_request(request(str(number), prompt, answer))

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.server.step()
            self.pages_are_those_that_are_needed()

    @precondition(lambda self: self.server.scheduler.requests)
    @rule(index=st.integers(0, 2 * ROWS))
    def cancel(self, index: int) -> None:
        names = [*self.server.scheduler.requests]
        self.server.scheduler.finish_requests(names[index % len(names)], RequestStatus.FINISHED_ABORTED)

    @precondition(lambda self: self.running and not self.ahead)
    @rule()
    def preempt_all(self) -> None:
        self.server.scheduler.reset_prefix_cache(reset_running_requests=True)

    @invariant()
    def pages_are_those_that_are_needed(self) -> None:
        for row in self.running:
            processed = self.server.processed[row.request_id]
            for window, blocks in zip(self.server.windows, blocks_of(self.server.manager, row.request_id), strict=True):
                assert held(blocks) == needed(window, processed, row.num_computed_tokens)

    @invariant()
    def requests_that_wait_hold_nothing(self) -> None:
        names = {row.request_id for row in self.running}
        for single in self.server.manager.coordinator.single_type_managers:
            assert {name for name, blocks in single.req_to_blocks.items() if blocks} <= names
            assert single.num_cached_block.keys() <= names

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        pool = self.server.pool
        holders = Counter(
            block.block_id
            for row in self.running
            for blocks in blocks_of(self.server.manager, row.request_id)
            for block in blocks
            if not block.is_null
        )
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        assert sorted([*free, *holders]) == [*range(1, self.server.blocks)]
        assert pool.get_num_free_blocks() == len(free)
        assert all(pool.blocks[number].ref_cnt == holders[number] for number in range(1, self.server.blocks))

    @invariant()
    def shared_blocks_are_full_pages_of_the_same_tokens(self) -> None:
        pages: dict[int, tuple[int, int, int | str]] = {}  # block -> group, page, last token or request
        for row in self.running:
            tokens = known(row.all_token_ids)
            for group, blocks in enumerate(blocks_of(self.server.manager, row.request_id)):
                for page in held(blocks):
                    end = (page + 1) * PAGE
                    key = (group, page, int(tokens[end - 1]) if end <= len(tokens) else row.request_id)
                    assert pages.setdefault(blocks[page].block_id, key) == key

    def teardown(self) -> None:
        """Every request comes to its end, and nothing is left."""
        if not hasattr(self, "server"):
            return
        left = 60 * MAX_LEN
        while self.server.scheduler.has_unfinished_requests():
            self.step(1)
            left -= 1
            assert left, "requests are stuck"
        self.every_block_is_free_or_held()
        assert self.server.pool.get_num_free_blocks() == self.server.blocks - 1


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=500, stateful_step_count=20, deadline=None, suppress_health_check=[*HealthCheck]
)
