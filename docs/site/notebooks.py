"""Notebooks: run without a kernel, their outputs stored, and shown as pages.

A cell is run as Jupyter runs it: in the notebook's one namespace, and what its last line is, is shown: text, or a PNG.

    python docs/site/notebooks.py docs/notebooks/use.ipynb     # run, and store what it showed
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell in `names`, and return its outputs as a notebook stores them."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, shown = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if shown is not None:
        data: dict[str, Any] = {"text/plain": repr(shown).splitlines(keepends=True)}
        if png := getattr(shown, "_repr_png_", lambda: None)():
            data = {"image/png": base64.b64encode(png).decode(), "text/plain": ["<a picture>"]}
        outputs.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "display_data"})
        del outputs[-1]["execution_count"]
    return outputs


def store(file: Path) -> None:
    """Run a notebook in an empty folder, and store what its cells showed."""
    import os
    import tempfile

    content, names = json.loads(file.read_text("utf-8")), {"__name__": "__main__"}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for cell in content["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = run("".join(cell["source"]), names)
        os.chdir(home)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def page(file: Path) -> str:
    """Return a notebook as Markdown, with a line that says so below its title."""
    parts = []
    for cell in json.loads(file.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(f"```python\n{source}\n```")
            parts += [_output(output) for output in cell["outputs"]]
    head, _, rest = parts[0].partition("\n")
    note = f"*A notebook: `docs/notebooks/{file.name}`. A test runs it, on a CPU and without network.*"
    return "\n\n".join([head, note, rest.strip(), *parts[1:]]) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what the cell shows](data:image/png;base64,{data['image/png'].strip()})"
    return f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store(Path(name))
