"""What is measured, and beside whom: docs/performance.md."""

# It hides from Megatron-Core what only a GPU can run, and so comes before it.
import megatron_ext  # noqa: F401
