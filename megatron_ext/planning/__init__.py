"""What a layout costs and whether it fits, before a machine is asked."""
