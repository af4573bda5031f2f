"""Values of options that several commands have."""

from megatron_ext.errors import UserError


def whole_numbers(option: str, text: str) -> list[int]:
    """128,256,512 as numbers. Raises UserError."""
    try:
        return [int(part.replace("_", "")) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {text} is no list of whole numbers: write 128,256,512") from None
