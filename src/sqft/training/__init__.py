"""What a training step needs: packed rows, the loss over answers, distillation, isolation, attention by example."""
