"""Load tests by policy, over HTTP: traffic from `vllm bench serve`, right answers, memory, one report."""
