"""Everything that a policy cannot be combined with: flags, models, machines."""
