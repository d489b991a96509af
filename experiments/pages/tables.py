"""Numbers and tables as text: aligned columns for a terminal, and Markdown."""
from collections.abc import Collection, Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), gap: str = "  ") -> list[str]:
    """Returns a line per row; the columns in `left` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if column in left else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append(gap.join(cells).rstrip())
    return lines


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown whose columns line up as text, too."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_table_line(header, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join(lines + [_table_line(row, widths) for row in rows])


def _table_line(cells: Iterable[str], widths: Iterable[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def format_number(value: float) -> str:
    """Writes two decimals or three digits, with k, M and G from ten thousand on: 0.25, 2.30, 480, 16.5k, 1.20M."""
    size, unit = unit_of(abs(value))
    value = value / size
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}{unit}"


def unit_of(largest: float) -> tuple[float, str]:
    """Returns the unit for numbers up to `largest`, as a size and its letter: (1e6, "M")."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 0.9995 * size and largest >= 10_000:
            return size, unit
    return 1, ""
