"""From raw documents to Megatron's token files. Stands alone: imports neither torch nor megatron."""
