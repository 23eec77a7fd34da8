"""Studies: prompts, methods and seeds to rows, tables and verdicts."""
