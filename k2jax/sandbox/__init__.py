"""Run code that a model wrote, apart from everything else on this machine; no Docker needed."""

from k2jax.sandbox.run import Limits, Outcome, Sandbox, SandboxError

__all__ = ["Limits", "Outcome", "Sandbox", "SandboxError"]
