"""Starting vLLM's server with a policy, and what it shows of itself."""
