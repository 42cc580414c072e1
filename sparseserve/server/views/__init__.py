"""What the server shows of itself: /v1/sparsity, its page, and the metrics."""
