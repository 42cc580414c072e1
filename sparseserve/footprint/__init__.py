"""What a policy reads and stores of the KV cache, predicted from the plan of the layers."""
