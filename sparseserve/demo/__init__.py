"""Models and questions that make quality visible without a download."""
