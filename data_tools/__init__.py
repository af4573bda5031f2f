"""From raw documents to Megatron's token files; imports neither torch nor megatron."""
