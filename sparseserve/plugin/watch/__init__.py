"""What the worker knows of its requests and counts of its steps."""
