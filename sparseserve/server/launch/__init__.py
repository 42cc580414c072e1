"""Starting vLLM's server with a policy: arguments, checks, predictions, and the processes."""
