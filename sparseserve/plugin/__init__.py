"""The vLLM plugin: the only folder, beside server/, that imports vllm."""


def register() -> None:
    """Put our attention backends into vLLM's table; called by vLLM in every process (`vllm.general_plugins`).

    The CPU platform returns CPU_ATTN whatever the user asks for, so that name is overridden; without sparseserve
    settings in `additional_config` the backend behaves as its parent.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "sparseserve.plugin.backend_cpu.SparseCPUBackend")
