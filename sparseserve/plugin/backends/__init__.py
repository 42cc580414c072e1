"""vLLM's attention backends with decode rows under a policy: one for the CPU, one for CUDA, and what they share."""
