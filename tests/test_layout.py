"""The house keeps its shape: sizes, names, and no setting that nobody reads."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "ledger", "model", "data", "train", "eval", "release", "slurm", "marathon")
FORBIDDEN = {"utils", "common", "helpers", "base", "misc"}
PRODUCT = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name} is too long"


def test_the_product_keeps_to_its_budget():
    """10,000 lines for everything planned; blank ones do not count, which small functions have many of."""
    lines = (line for path in PRODUCT for line in path.read_text(encoding="utf-8").splitlines())
    assert sum(bool(line.strip()) for line in lines) < 10_000


def test_no_module_bears_a_name_that_says_nothing_or_shadows_a_room():
    for path in PRODUCT:
        assert path.stem not in FORBIDDEN | set(ROOMS), path


SCHEMA = [ROOT / "configs" / name for name in ("text.py", "schema.py")]
SETTINGS = "\n".join(path.read_text(encoding="utf-8") for path in SCHEMA)


def test_every_setting_has_its_meaning_beneath():
    tree = ast.parse(SETTINGS)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    assert told, f"{node.name}.{field.target.id} has no meaning beneath it"


def test_every_setting_is_read_somewhere():
    """A field counts as read where `.name` stands outside the schema, or in a property of it."""
    templates = [path for room in ROOMS for path in (ROOT / room).rglob("*.j2")]
    elsewhere = "\n".join(p.read_text(encoding="utf-8") for p in (*PRODUCT, *templates) if p not in SCHEMA)
    properties = "\n".join(
        ast.unparse(node)
        for node in ast.walk(ast.parse(SETTINGS))
        if isinstance(node, ast.FunctionDef) and node.name != "__post_init__"
    )
    unread = [
        f"{node.name}.{field.target.id}"
        for node in ast.walk(ast.parse(SETTINGS))
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and not re.search(rf"\.{field.target.id}\b", elsewhere + properties)
    ]
    assert unread == []


def test_nothing_of_ours_reads_pickle():
    for path in PRODUCT:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bimport pickle\b|\btorch\.load\(|allow_pickle=True", text), path
