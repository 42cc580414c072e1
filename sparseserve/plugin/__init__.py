"""The vLLM plugin: the only folder, beside server/, that imports vllm."""

import atexit
import gc


def register() -> None:
    """Put our attention backends into vLLM's table; called by vLLM in every process (`vllm.general_plugins`).

    The CPU platform returns CPU_ATTN whatever the user asks for, so that name is overridden. On CUDA the backend is
    CUSTOM, which the user asks for; the launcher does. Without sparseserve settings in `additional_config` both behave
    as their parents. vLLM imports the one that it takes.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from sparseserve.plugin.head_memory import manager

    register_backend(AttentionBackendEnum.CPU_ATTN, "sparseserve.plugin.backends.cpu.SparseCPUBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "sparseserve.plugin.backends.cuda.SparseCUDABackend")
    manager.register()
    # Python's last collection takes 2 s in each of a server's processes, which end one after the other.
    atexit.register(gc.freeze)
