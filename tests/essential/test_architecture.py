"""The import layers and the fences around third-party packages hold, in lazy imports too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vla_foundry"

# from the top down; an import may only go down, or stay within its own entry
LAYERS: list[set[str]] = [
    {"cli", "main", "quickstart"},
    {"evaluation", "datagen", "viz", "importing", "hub"},
    {"serving"},
    {"training", "inference"},
    {"models", "data", "preprocessing", "simulators", "record"},
    {"params"},
    {"config", "storage", "robotics", "text", "images"},
    {"client", "registry", "world", "batch", "randomness", "shards", "run_folder", "progress", "provenance", "tensors"},
    {"parsing", "tars"},
]
# (importer, imported) within one layer
ALLOWED_SIDEWAYS = {
    ("cli", "main"),
    ("cli", "quickstart"),
    ("config", "storage"),
    ("robotics", "storage"),
    ("text", "storage"),
    ("images", "storage"),
    ("images", "text"),
    ("run_folder", "shards"),
}
# third-party package -> where it may be imported
FENCES: dict[str, tuple[str, ...]] = {
    "torch.distributed.fsdp": ("training/distributed.py",),
    "ray": ("preprocessing/", "evaluation/cluster.py"),
    "boto3": ("storage/",),
    "botocore": ("storage/",),
    "fsspec": ("storage/",),
    "huggingface_hub": ("storage/", "hub/"),
    "wandb": ("training/metrics.py",),
    "tensorboard": ("training/metrics.py",),
    "torch.utils.tensorboard": ("training/metrics.py",),
    "grpc": ("serving/", "client/"),
    "websockets": ("serving/", "client/"),
    "msgpack": ("serving/",),
    "prometheus_client": ("serving/",),
    "gradio": ("evaluation/dashboard/", "viz/explorer.py"),
    "rerun": ("viz/view.py",),
    "uvicorn": ("evaluation/dashboard/",),
    "onnxruntime": ("inference/export.py",),
    "lm_eval": ("evaluation/text.py",),
    "metaworld": ("simulators/metaworld.py",),
    "mujoco": ("simulators/",),
    "gymnasium": ("simulators/",),
    "gym_pusht": ("simulators/pusht.py",),
    "gym_aloha": ("simulators/aloha.py",),
}
TORCH_FREE = (
    "client/",
    "config/",
    "params/",
    "storage/",
    "shards.py",
    "parsing.py",
    "tars.py",
    "registry.py",
    "world.py",
    "progress.py",
    "provenance.py",
    "batch.py",
    "run_folder.py",
    "cli.py",
)
MAX_LINES = 450
MAX_FILES = 15
MAX_FUNCTION_LINES = 60

# test files about more than one module
WHOLE_HOUSE = {
    *("test_architecture.py", "test_end_to_end.py", "test_fuzz.py", "test_plugins.py", "test_presets.py"),
    *("compatibility/test_compatibility.py", "training/test_robots.py", "training/test_mixture.py"),
    *("training/test_lora.py", "training/test_steps.py", "test_examples.py", "test_benchmarks.py", "test_faults.py"),
    *("test_docs.py", "test_tutorials.py"),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Every module a file imports, wherever in the file, with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [file for file in FILES if file.parent != PACKAGE or file.stem != "__init__"], ids=str)
def test_imports_go_down_the_layers(path: Path) -> None:
    importer = part_of(path)
    for module, line in imports_of(path):
        if not module.startswith("vla_foundry.") or module == "vla_foundry.__version__":
            continue
        imported = module.split(".")[1]
        if imported == importer or (importer, imported) in ALLOWED_SIDEWAYS:
            continue
        assert layer_of(imported) > layer_of(importer), f"{path}:{line} imports {module}, which is not below {importer}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_third_party_packages_stay_behind_their_fences(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    for module, line in imports_of(path):
        for package, places in FENCES.items():
            if module == package or module.startswith(package + "."):
                assert name.startswith(places), f"{path}:{line} imports {package}, allowed in {places}"
        if name.startswith(TORCH_FREE):
            assert module.split(".")[0] != "torch", f"{path}:{line} imports torch"


# how JSON and YAML are read; parsing.py limits bytes, depth, digits and aliases
READERS = {
    ("json", "load"),
    ("json", "loads"),
    ("json", "JSONDecoder"),
    *(("yaml", name) for name in ("load", "load_all", "safe_load", "safe_load_all", "full_load", "unsafe_load")),
    *(("yaml", name) for name in ("compose", "compose_all", "parse", "scan")),
}


@pytest.mark.parametrize("path", [file for file in FILES if file.name != "parsing.py"], ids=str)
def test_json_and_yaml_are_read_in_one_place(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in READERS, f"{path}:{node.lineno}: use vla_foundry.parsing"
    imported = {tuple(module.rsplit(".", 1)) for module, _ in imports_of(path)}
    assert not imported & READERS, f"{path}: use vla_foundry.parsing"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            size = node.end_lineno - node.lineno + 1
            assert size <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {size} lines"


def test_every_test_file_mirrors_a_module() -> None:
    tests = Path(__file__).parent
    names = {file.relative_to(tests).as_posix() for file in tests.rglob("test_*.py")} - WHOLE_HOUSE
    modules = {file.relative_to(PACKAGE).with_name(f"test_{file.name}").as_posix() for file in FILES}
    assert names <= modules, f"no module for {sorted(names - modules)}"


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=str)
def test_a_folder_holds_few_files(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= MAX_FILES


def test_modules_of_a_package_do_not_import_each_other_in_a_circle() -> None:
    names = {".".join(("vla_foundry", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    imported = {name: {module for module in top_level_imports(file) if module in names} for name, file in names.items()}
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"imports go in a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in finished:
            for other in sorted(imported[name]):
                visit(other, [*path, name])
            finished.add(name)

    for name in sorted(names):
        visit(name, [])


def top_level_imports(path: Path) -> set[str]:
    """Every module that importing a file imports, as written: `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found
