"""KV heads that keep no more than they attend to: groups of heads with page tables of their own."""
