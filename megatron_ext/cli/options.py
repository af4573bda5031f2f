"""Values of options that several commands have."""

from typing import Annotated

import typer

from megatron_ext.errors import UserError

ProofLengths = Annotated[
    str,
    typer.Option(
        help="Tokens of the sequences compared.  [half, 1 and 2 trained contexts, up to 8,192]"
    ),
]


def whole_numbers(option: str, text: str) -> list[int]:
    """128,256,512 as numbers. Raises UserError."""
    try:
        return [int(part.replace("_", "")) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {text} is no list of whole numbers: write 128,256,512") from None
