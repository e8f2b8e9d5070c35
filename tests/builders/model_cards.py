"""Parts of a model card."""


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip()


def rows(card: str, title: str, number: int = 0) -> dict[str, list[str]]:
    """A table of a section by its first column; every line must have as many cells."""
    tables = [part for part in section(card, title).split("\n\n") if part.startswith("|")]
    lines = tables[number].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").replace("\\|", "¦").split("|")] for line in lines]
    assert len({len(each) for each in cells}) == 1
    return {first: rest for first, *rest in cells[2:]}
