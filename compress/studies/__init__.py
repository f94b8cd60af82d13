"""What can be learned about a model without changing it: inspect, experts, sensitivity."""
