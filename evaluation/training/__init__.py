"""What trains the small model: scenes from easy to hard, targets, losses, optimisers, and the loop."""
