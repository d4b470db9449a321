"""Tests of README and docs: what their code blocks name exists, and what can run does."""
