"""The command lines as a whole: docs/cli.md and shell completion, made from the parsers themselves."""
