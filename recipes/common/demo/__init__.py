"""The whole path on real input: a fleet of LoRA adapters, its basis, held-out tasks trained in it beside their
controls."""

from .run import run_demo

__all__ = ["run_demo"]
