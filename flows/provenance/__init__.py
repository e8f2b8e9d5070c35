"""From a generated image back to its data, and the same image again."""
