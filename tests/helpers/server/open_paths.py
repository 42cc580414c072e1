"""What a server with an API key shows to everyone, written out: opening a path is a decision, not a side effect."""

OPEN = {"/health", "/ready", "/ping", "/metrics", "/version", "/sparsity"}  # GET alone
