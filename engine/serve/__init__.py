"""An OpenAI-compatible server in the engine's process: docs/server.md."""
