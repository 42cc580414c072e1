"""What is refused of the arguments of `vllm serve`, and of what became of them in a worker."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from sparseserve.config import ADDITIONAL_CONFIG, WORKERS
from sparseserve.plugin.support.refusal import WITHOUT_US, Refusal, Subject

OUR_BACKEND = "CUSTOM"


@dataclass(frozen=True, slots=True)
class Arguments(Subject):
    """What `vllm serve` was asked for on a platform."""

    args: Namespace
    platform: str

    @property
    def worker(self) -> str:
        """The worker that a policy needs."""
        return worker_on(self.platform)

    @property
    def engines(self) -> int:
        """Engines that share the requests."""
        engines: int = self.args.data_parallel_size
        return engines


@dataclass(frozen=True, slots=True)
class Started(Subject):
    """What a worker is."""

    worker: str


def worker_on(platform: str) -> str:
    """The worker that a policy needs on a platform."""
    return WORKERS["cuda" if platform == "cuda" else "cpu"]


def _settings(asked: Arguments) -> object:
    given = asked.args.additional_config
    return ADDITIONAL_CONFIG in given and str(given[ADDITIONAL_CONFIG])


def _worker(asked: Arguments) -> object:
    return asked.args.worker_cls not in ("auto", asked.worker) and asked.args.worker_cls


def _one_api_server(asked: Arguments) -> object:
    return asked.engines > 1 and asked.args.api_server_count == 1 and 1


def _backend(asked: Arguments) -> object:
    given = asked.args.attention_config
    chosen = asked.args.attention_backend, given.backend, given.backend_per_kind.get("full_attention")
    names = (getattr(backend, "name", backend) for backend in chosen)
    return next((name for name in names if name not in (None, OUR_BACKEND)), None)


ARGUMENTS: tuple[Refusal[Arguments], ...] = (
    Refusal(
        "the gRPC server",
        "--grpc",
        lambda asked: asked.args.grpc,
        "off: the gRPC server knows no keys, no limits, no options of requests and no metrics of ours",
        "drop --grpc",
    ),
    Refusal(
        "one API server before several engines",
        "--api-server-count",
        _one_api_server,
        "2 or more with --data-parallel-size {engines}: one shows the first engine's metrics",
        "drop it: vLLM starts an API server for every engine",
    ),
    Refusal(
        "settings of a policy beside --policy",
        f"--additional-config {ADDITIONAL_CONFIG}",
        _settings,
        "none: the policy sets it",
        "give --policy and --set in its place",
    ),
    Refusal(
        "another worker",
        "--worker-cls",
        _worker,
        "none: a policy needs {worker}",
        "drop the flag; --worker-extension-cls adds methods to it",
    ),
    Refusal(
        "another attention backend",
        "attention backend",
        _backend,
        "none: a policy comes with a backend of its own",
        "drop the flag that chooses it",
        platform="cuda",
    ),
)
STARTED: tuple[Refusal[Started], ...] = (
    Refusal(
        "vLLM's own worker under our settings",
        "--worker-cls",
        lambda started: started.worker not in WORKERS.values() and started.worker,
        "",
        f"start the server with `sparseserve serve`, or {WITHOUT_US}",
        where="worker",
        choices=tuple(WORKERS.values()),
    ),
)
