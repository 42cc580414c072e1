"""What a policy cannot be combined with: of vLLM's flags, models, machines and other policies' needs, all of it."""
