"""A whole load test: the control twice, then every policy, each with the same requests; files beside one another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.bench import BenchClient, BenchResult, arguments, bench_client, command_line, read_result
from loadtest.metrics import Sample, read_samples, sampled
from loadtest.prompts import Prompt, Tokens, prompts, write_dataset
from loadtest.results import Role
from loadtest.scenario import Load, LoadTestError, Scenario
from loadtest.server import Server, check, running_at, serving
from loadtest.setting import Setting

WARM_UP = "warm-up"


@dataclass(frozen=True, slots=True)
class LoadTest:
    """What was asked for."""

    scenario: Scenario
    model: str  # as `vllm serve` takes it; with --url, where the tokenizer is
    control: Setting
    policies: list[Setting]
    url: str | None  # of a server that runs already; then policies are endings of aliases
    flags: tuple[str, ...]  # of vllm serve
    folder: Path
    command: str  # asks again

    def serve(self, setting: Setting, log: Path) -> AbstractContextManager[Server]:
        """The server of a setting."""
        if self.url is not None:
            return running_at(self.url, str(setting))
        return serving(setting, self.model, self.flags, log)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one load."""

    name: str  # the same for every setting
    load: Load
    made: list[Prompt]
    result: BenchResult
    samples: list[Sample]
    file: str  # in the folder
    command: str


@dataclass(slots=True)
class Served:
    """All runs of a setting."""

    setting: Setting
    role: Role
    serve: str = ""  # the command that started its server
    runs: list[Run] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # that ended its runs

    @property
    def name(self) -> str:
        """As reports say it."""
        return f"{self.setting}, again" if self.role == "again" else str(self.setting)

    def at(self, load: str) -> list[Run]:
        """The runs of a load."""
        return [run for run in self.runs if run.load.name == load]


def order(request: LoadTest) -> list[Served]:
    """The control, the control again, and the policies in an order drawn by the scenario's seed."""
    drawn = random.Random(request.scenario.seed).sample(request.policies, len(request.policies))
    roles: list[tuple[Setting, Role]] = [(request.control, "control"), (request.control, "again")]
    return [Served(setting, role) for setting, role in roles + [(one, "policy") for one in drawn]]


def measure(request: LoadTest, say: Callable[[str], None]) -> list[Served]:
    """Everything, in order; a policy that fails says so, a control that does ends it with LoadTestError."""
    if request.url and request.scenario.answers == "control":
        raise LoadTestError(
            "answers: control is refused with --url, where every setting gets prompts of its own and no answer can be "
            "compared. Expected: a scenario with answers: needle, or no --url."
        )
    request.folder.mkdir(parents=True, exist_ok=True)
    for setting in [] if request.url else [request.control, *request.policies]:
        check(setting, request.model, request.flags)
    plan = order(request)
    for number, served in enumerate(plan):
        say(f"{number + 1} of {len(plan)}: {served.name}")
        place = request.folder / f"{number}-{served.setting.policy}"
        place.mkdir(exist_ok=True)
        try:
            _measure(request, served, place, say)
        except LoadTestError as error:
            if served.role != "policy":
                raise
            say(f"  failed: {error}")
            served.failures.append(f"not measured to its end: {error}")
    return plan


def _measure(request: LoadTest, served: Served, place: Path, say: Callable[[str], None]) -> None:
    """One setting. Its client is its own: one that broke is not the next one's."""
    with (
        bench_client(place / "bench.log") as client,  # first, to import while the server starts
        request.serve(served.setting, place / "server.log") as server,
    ):
        served.serve = server.command
        tokens = server.tokens(request.scenario.text)
        for run in _runs(request, server, client, tokens, place, say):
            served.runs.append(run)


def _runs(
    request: LoadTest, server: Server, client: BenchClient, tokens: Tokens, place: Path, say: Callable[[str], None]
) -> Iterator[Run]:
    """The warm-up, then every load, as often as the scenario says: repeats are apart in time, as servers drift."""
    scenario = request.scenario
    one = Runner(request, server, client, tokens, place)
    one.run(scenario.loads[-1], WARM_UP, scenario.warm_up)
    for repeat in range(scenario.repeats):
        for load in scenario.loads:
            run = one.run(load, f"{load.name}-{repeat}", scenario.requests)
            say(f"  {run.file}: {run.result.completed} of {len(run.made)} in {run.result.duration:.1f} s")
            yield run


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs against one server."""

    request: LoadTest
    server: Server
    client: BenchClient
    tokens: Tokens
    place: Path

    def run(self, load: Load, name: str, requests: int) -> Run:
        """The requests are those of `name`, whichever the setting; a server that is asked again has not seen them."""
        scenario = self.request.scenario
        made = prompts(scenario, self._seed(name), self.tokens, requests)
        dataset = self.place / f"{name}.jsonl"
        write_dataset(made, scenario.output_tokens, dataset)
        file, samples = self.place / f"{name}.json", self.place / f"{name}.metrics.jsonl"
        words = arguments(scenario, load, self.server, self.request.model, dataset, requests, file)
        with sampled(self.server, samples):
            self.client.run(words)
        relative = str(file.relative_to(self.request.folder))
        return Run(name, load, made, read_result(file), read_samples(samples), relative, command_line(words))

    def _seed(self, name: str) -> str:
        """One server for all policies has one prefix cache: there every setting gets prompts of its own."""
        return name if self.request.url is None else f"{self.place.name} {name}"


def by_role(plan: Sequence[Served], asked: Sequence[Setting]) -> list[Served]:
    """The control, the control again, and the policies as they were asked for."""
    policies = {served.setting: served for served in plan if served.role == "policy"}
    return [*plan[:2], *(policies[setting] for setting in asked)]
