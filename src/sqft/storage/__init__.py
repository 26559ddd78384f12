"""What lies on disk: safetensors in place, integer formats, masks and starts, what identifies a base."""
