"""`megatron-ext schema`: every setting, for editors (JSON Schema) and for people (Markdown)."""

import json as json_module
from typing import Annotated

import typer

from megatron_ext.config.reference import json_schema, markdown


def schema(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page that is docs/config.md.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON Schema (the default).")
    ] = False,
) -> None:
    """Print the JSON Schema of a config file, or its reference page.

    Example: megatron-ext schema > config.schema.json, and in an editor's YAML support:
    # yaml-language-server: $schema=config.schema.json
    """
    print(markdown() if as_markdown and not json else json_module.dumps(json_schema(), indent=2))
