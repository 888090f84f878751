"""No source calls what would run somebody else's data: pickles, evaluated text, code of a model's folder."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from iomm.checkpoint.folder import private_folder
from iomm.parallel.mesh import Mesh

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file for folder in ("iomm", "kernels", "tools", "examples") for file in (ROOT / folder).rglob("*.py")
)
# Calls that run what they are given, or import code that they are given, by name or by the last part of it.
RUNS_TEXT = {"eval", "exec", "__import__", "os.system", "os.popen", "torch.hub.load", "torch.jit.load"}
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "pickle", "runpy", "code"}
ALLOWED = {  # file -> modules of MODULES that it may import, and why
    "iomm/cli.py": {"runpy"},  # a configuration is a Python file that its user wrote and names
    "iomm/checkpoint/contents.py": {"pickle"},  # an unpickler that knows no class and no function
    "iomm/checkpoint/sharded.py": {"pickle"},  # the class of an error
}
# transformers asks on the terminal whether to run code out of the folder unless it is told not to.
ASKS = {"AutoTokenizer", "AutoConfig", "AutoProcessor", "AutoModelForImageTextToText"}
WITHOUT_WEIGHTS = {"AutoTokenizer", "AutoConfig", "AutoProcessor", "DiffusionPipeline"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; what is neither is "?"."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def findings(source: str, name: str) -> Iterator[str]:
    """What in a source file could run data, a line each."""
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for module in {m.partition(".")[0] for m in found} & MODULES - ALLOWED.get(name, set()):
                yield f"{where} imports {module}"
        if isinstance(node, ast.Call):
            yield from (f"{where} {problem}" for problem in _call(node))


def _call(node: ast.Call) -> Iterator[str]:
    name, last = dotted(node.func), dotted(node.func).rpartition(".")[2]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    splat = None in given  # **settings: seen by a person, not by this test
    if name in RUNS_TEXT or name in ("pickle.load", "pickle.loads"):
        yield f"calls {name}"
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
        yield f"calls {name} with allow_pickle or shell"
    if given.get("trust_remote_code", "False") != "False":
        yield f"calls {name} with trust_remote_code"
    if last == "from_pretrained" and not splat:
        owner = name.split(".")[-2]
        if owner in ASKS and "trust_remote_code" not in given:
            yield f"calls {name} without trust_remote_code=False"
        if owner not in WITHOUT_WEIGHTS and given.get("use_safetensors") != "True":
            yield f"calls {name} without use_safetensors=True"


def test_no_source_file_runs_data() -> None:
    found = [
        line for file in SOURCES for line in findings(file.read_text(), file.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "eval(text)",
        "numpy.load(f, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(p)",
        "DiffusionPipeline.from_pretrained(p, trust_remote_code=True)",
        "diffusers.AutoencoderKL.from_pretrained(p)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(findings(line, "iomm/file.py"))


def test_a_runs_folder_is_its_owners_alone_and_keeps_the_rights_it_has(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "name"
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o750)
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o750


def test_a_run_of_one_process_listens_on_loopback_only(mesh: Mesh) -> None:
    assert mesh.world_size == 1
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    assert all(address.ip == "127.0.0.1" for address in listening), listening
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"  # where a host's own name means a public address
