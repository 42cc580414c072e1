"""Tables in Markdown."""


def table(*rows: tuple[str, ...]) -> str:
    """Rows of cells, the first one above the others."""
    head, *body = ("| " + " | ".join(row) + " |\n" for row in rows)
    return "".join([head, "|---" * len(rows[0]) + "|\n", *body])
