"""Who may import whom: prior <- tokenizer <- pipelines <- scripts; models know no files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"prior", "tokenizer", "pipelines", "scripts", "tests"}
ALLOWED = {"prior": {"prior"}, "tokenizer": {"prior", "tokenizer"}, "pipelines": {"prior", "tokenizer", "pipelines"}}
MODEL_LIBRARIES = {"torch", "einops"}
MODEL_MODULES = {"abc", "collections", "contextlib", "dataclasses", "difflib", "functools", "inspect", "itertools",
                 "math", "numbers", "typing", "warnings"}  # fmt: skip
# what a file may import beyond that, and inside its functions: for `from_pretrained` and `save_pretrained`, and the
# kernel, where there is Triton
EXCEPTIONS = {
    "prior/torchvision_guard.py": {"glob", "importlib", "os"}, "prior/gpt_cuda_decoder.py": {"threading"},
    "prior/sampling.py": {"importlib", "os", "shutil"},
    "prior/gpt_triton.py": {"triton"}, "prior/sampling_triton.py": {"triton"},
    "tokenizer/quantizers/nearest_triton.py": {"triton"},
}  # fmt: skip
IN_FUNCTIONS = {
    "prior/base.py": {"pipelines"}, "tokenizer/base.py": {"pipelines"},
    "tokenizer/quantizers/nearest.py": {"tokenizer"}, "prior/gpt_cuda_decoder.py": {"prior"},
    "prior/sampling.py": {"prior"},
}  # fmt: skip

FILES = [path.relative_to(ROOT).as_posix() for name in ALLOWED for path in sorted((ROOT / name).rglob("*.py"))]
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "scripts").glob("*.py"))]


def imported(path: str, inside_functions: bool) -> set[str]:
    """Top-level names of the modules that a file imports, outside or inside its functions."""
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    within = {id(node) for function in functions for node in ast.walk(function)}
    names = set()
    for node in ast.walk(tree):
        if (id(node) in within) != inside_functions:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES)
def test_a_package_imports_only_those_below_it(path):
    package = path.split("/")[0]
    ours = (imported(path, inside_functions=False) | imported(path, inside_functions=True)) & OURS
    assert ours - IN_FUNCTIONS.get(path, set()) <= ALLOWED[package]


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith("pipelines")])
def test_models_import_torch_and_einops_and_nothing_that_reads_files(path):
    allowed = MODEL_LIBRARIES | MODEL_MODULES | EXCEPTIONS.get(path, set()) | {"prior", "tokenizer"}
    assert imported(path, inside_functions=False) <= allowed
    assert imported(path, inside_functions=True) <= IN_FUNCTIONS.get(path, set())


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_do_not_import_each_other_nor_the_tests(path):
    assert not imported(path, inside_functions=False) & {"scripts", "tests"}
