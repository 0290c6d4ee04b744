"""A notebook as a page: its cells, and the small outputs that are stored in it."""

import json
from pathlib import Path


def page(file: Path) -> str:
    """Return a notebook as Markdown, with a line on how to run it."""
    cells = json.loads(file.read_text("utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(f"```python\n{source}\n```")
            parts += [_output(output) for output in cell.get("outputs", [])]
    head, _, rest = parts[0].partition("\n")
    note = f"*A notebook: `docs/notebooks/{file.name}`. A test runs it, on a CPU and without network.*"
    return "\n\n".join([head, note, rest.strip(), *parts[1:]]) + "\n"


def _output(output: dict) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""
