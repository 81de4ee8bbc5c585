"""A tiny Qwen2 checkpoint that adds decimal numbers, and the scripts that made it."""
