"""What a training step needs: packed rows, the loss over answers, isolation, attention by example."""
