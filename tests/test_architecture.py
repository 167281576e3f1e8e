"""The tree is the architecture: imports point downward, files are short, outside packages have one door each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "jaxlm").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))

LAYERS = [
    ["types", "tree", "numbers", "fingerprint", "stages", "files", "output", "nans", "optional", "peers", "launchers"],
    [
        "compiled",
        "hlo",
        "models",
        "losses",
        "grads",
        "precision",
        "optim",
        "schedules",
        "data",
        "sharding",
        "distributed",
    ],
    [
        "train",
        "watchdog",
        "preflight",
        "range_test",
        "evaluate",
        "checkpoint",
        "metrics",
        "generate",
        "report",
        "verify",
        "fixed_order",
    ],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
WITHIN_A_LAYER = {
    ("generate", "checkpoint"),
    ("report", "metrics"),
    ("range_test", "train"),
    ("train", "preflight"),
    ("fixed_order", "train"),
    ("verify", "train"),
    ("verify", "checkpoint"),
    ("grads", "sharding"),
    ("sharding", "hlo"),
    ("fingerprint", "tree"),
    ("stages", "numbers"),
}
DOORS = {
    "flax": "jaxlm/models/",
    "orbax": "jaxlm/checkpoint/",
    "grain": "jaxlm/data/pipeline.py",
    "matplotlib": ("jaxlm/report.py", "jaxlm/schedules/_plot.py", "jaxlm/data/_plot.py"),
    "qwix": "jaxlm/precision.py",
    "rich": "jaxlm/metrics.py",
    "array_record": "jaxlm/data/sources.py",
    "datasets": "jaxlm/data/sources.py",
    "fsspec": "jaxlm/data/sources.py",
    "pyarrow": "jaxlm/data/sources.py",
    "gigatoken": "jaxlm/data/tokenizers.py",
    "tokenizers": ("jaxlm/data/tokenizers.py", "jaxlm/data/bpe.py"),
}
BY_EXPERIMENTS_ALONE = {"tyro", "experiments", "tests"}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "optional":
            yield ast.literal_eval(node.args[0])


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_imports_point_downward_and_outside_packages_have_one_door(file: Path) -> None:
    own = file.relative_to(ROOT / "jaxlm").with_suffix("").parts[0]
    for module in imports(file):
        top, _, rest = module.partition(".")
        assert top not in BY_EXPERIMENTS_ALONE, f"{module} is for experiments alone"
        assert name_of(file).startswith(DOORS.get(top, "")), f"only {DOORS[top]} imports {top}"
        other = rest.split(".")[0]
        if top == "jaxlm" and own != "__init__" and other != own:
            allowed = LAYER[other] < LAYER[own] or (own, other) in WITHIN_A_LAYER
            assert allowed, f"{own}, of layer {LAYER[own]}, imports {other}, of layer {LAYER[other]}"


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_an_experiment_is_short_and_imports_no_other(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= (200 if file.name == "pretrain.py" else 150)  # it has all
    assert not {module.split(".")[0] for module in imports(file)} & ({f.stem for f in EXPERIMENTS} | {"experiments"})


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_files_have_400_lines_at_most_and_every_module_says_what_it_is(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_no_nnx_transformations_and_no_nnx_state_outside_models() -> None:
    forbidden = {"jit", "grad", "value_and_grad", "scan", "vmap", "remat", "Optimizer", "Metric", "MultiMetric"}
    for file in [*PACKAGE, *EXPERIMENTS]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx":
                assert node.attr not in forbidden, f"{name_of(file)}: nnx.{node.attr}"


RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "jsonpickle"}
"""Modules that run code which a file brings along; torch in that its `load` does."""


def test_nothing_runs_code_that_data_brings_along() -> None:
    for file in [*PACKAGE, *EXPERIMENTS]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                names = [module] if module else [alias.name for alias in node.names]
                assert not {name.split(".")[0] for name in names} & RUNS_CODE, f"{name_of(file)}: {names}"
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
                assert called not in ("eval", "exec", "compile", "__import__"), f"{name_of(file)}: {called}"
                assert not called.startswith("yaml.") or called == "yaml.safe_load", f"{name_of(file)}: {called}"
                assert called not in ("torch.load", "os.system", "os.popen"), f"{name_of(file)}: {called}"
                assert not given & {"allow_pickle", "trust_remote_code", "shell"}, f"{name_of(file)}: {given}"


def test_every_file_has_a_layer_and_vague_names_are_not_used() -> None:
    tops = {file.relative_to(ROOT / "jaxlm").with_suffix("").parts[0] for file in PACKAGE}
    assert tops - {"__init__"} == set(LAYER)
    vague = {"utils", "common", "manager", "helper", "helpers", "base", "factory", "registry", "engine"}
    assert not vague & {file.stem for file in PACKAGE}


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_public_functions_and_classes_have_docstrings(file: Path) -> None:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(file)}: {node.name} has no docstring"
