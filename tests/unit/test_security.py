"""Nothing from outside is evaluated, unpacked or unpickled, but for published pickles; what
is downloaded is checked before it is used.
"""

from __future__ import annotations

import ast
import io
import json
import tarfile
from pathlib import Path

import pytest

from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("mlo", "lfmcw_app", "examples", "benchmarks")
    for ending in ("*.py", "*.ipynb")
    for path in (ROOT / folder).rglob(ending)
)

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "extractall", "extract", "unpack_archive", "load_state_dict_from_url", "torch.hub.load",
    "torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler",
}  # fmt: skip

EXPECTED = {
    # CIFAR's Python version and NATS-Bench's table are pickles. One unpickler reads them, which
    # knows the few names that its caller lists; test_known_pickle.py, test_cifar.py and
    # test_nats_bench.py try this wall.
    "lfmcw_app/known_pickle.py: import pickle",
    # The program of docs/index.md, a file of this repository.
    "benchmarks/gallery.py: exec",
    # A revision of this repository, as git packs it.
    "benchmarks/before_after.py: files.extractall",
}


def violations(source):
    """What of a source could run code from outside: (line, what)."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            for name in sorted(imported & {"torch.load", "torch.serialization.load"}):
                yield node.lineno, f"{name} under a name of its own"
        for name in names:
            if name.partition(".")[0] in FORBIDDEN_MODULES:
                yield node.lineno, f"import {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if called in FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_CALLS - {
                "eval",
                "exec",
            }:
                yield node.lineno, called
            if (
                called in ("torch.load", "torch.serialization.load")
                and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True"
            ):
                yield node.lineno, "torch.load without weights_only=True"
            if called in ("np.load", "numpy.load") and "allow_pickle" in keywords:
                yield node.lineno, "numpy.load with allow_pickle"
            if ast.unparse(keywords.get("shell", ast.Constant(False))) == "True":
                yield node.lineno, "shell=True"


def source_of(path):
    """Python of a file; of a notebook that of its cells, without the lines of its shell."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return text
    cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell) for cell in cells).splitlines()
    return "\n".join("pass" if line.startswith(("!", "%")) else line for line in lines)


def test_no_call_runs_code_from_outside():
    """The packages and examples have no call that runs code from outside."""
    assert len(SOURCES) > 80
    found = {
        f"{path.relative_to(ROOT)}: {what}": line
        for path in SOURCES
        for line, what in violations(source_of(path))
    }
    assert set(found) == EXPECTED, found


def test_pickles_are_read_by_the_guarded_unpickler():
    """Of pickle the one module uses an error and a base class, whose `find_class` is replaced."""
    tree = ast.parse((ROOT / "lfmcw_app" / "known_pickle.py").read_text("utf-8"))
    nodes = list(ast.walk(tree))
    imported = [
        alias.asname
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "pickle"
    ]
    assert imported == [None]  # under its own name, so the search below sees every use
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {
        "pickle._Unpickler",
        "pickle.UnpicklingError",
    }
    bare = [node for node in nodes if isinstance(node, ast.Name) and node.id == "pickle"]
    assert len(bare) == sum(
        isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" for node in nodes
    )
    (guarded,) = [
        node
        for node in nodes
        if isinstance(node, ast.ClassDef) and "pickle._Unpickler" in map(ast.unparse, node.bases)
    ]
    methods = {node.name: node for node in guarded.body if isinstance(node, ast.FunctionDef)}
    assert set(methods) == {"__init__", "find_class", "_set_state"}
    find_class = methods["find_class"]
    assert "super" not in ast.unparse(find_class)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "pickle.loads(x)",
        "pickle.Unpickler(x).load()",
        "pickle._Unpickler(x).load()",
        "eval(x)",
        "yaml.load(x)",
        "tar.extractall(y)",
        "shutil.unpack_archive(x)",
        "torch.load(x)",
        "torch.load(x, **options)",
        "from torch import load",
        "torch.serialization.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "torch.hub.load(x, y)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert len(list(violations(source))) == 1


def test_the_search_leaves_what_is_harmless():
    harmless = (
        "network.eval(); torch.load(x, weights_only=True); yaml.safe_load(x); "
        "tar.extractfile(n); np.load(x)"
    )
    assert list(violations(harmless)) == []


# ------------------------------ downloads and archives


def served(monkeypatch, content):
    """Has every download get this content."""

    def retrieve(url, filename, *arguments, **options):
        Path(filename).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", retrieve)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **options: url)
    monkeypatch.setattr("lfmcw_app.readers.FASHION_MNIST_PACKAGE", Path("/nowhere"))
    monkeypatch.setattr("lfmcw_app.published_files.PLACES", ())


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_download_with_another_checksum_is_not_kept(dataset, tmp_path, monkeypatch):
    """A download with another checksum is refused, and not kept."""
    served(monkeypatch, b"something else")
    for _ in range(2):  # nor taken for the data the second time
        with pytest.raises(InputError, match="could not be downloaded"):
            load_dataset(dataset, tmp_path / "data")
    assert list(tmp_path.rglob("*")) == []


def archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_download_with_the_right_checksum_has_its_name(tmp_path, monkeypatch):
    record = bytes([1]) + bytes(range(256)) * 12
    names = [f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6)] + [
        "cifar-10-batches-bin/test_batch.bin"
    ]
    content = archive([(tarfile.TarInfo(name), record) for name in names])
    served(monkeypatch, content)
    monkeypatch.setattr(
        "torchvision.datasets.utils.check_integrity", lambda path, md5=None: Path(path).is_file()
    )
    assert len(load_dataset("cifar10", tmp_path).train) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_an_archive_cannot_write_or_read_outside_of_it(tmp_path):
    """Members with paths that lead out, and links to files outside, under the names that are
    read.
    """
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    names = [f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6)] + [
        "cifar-10-batches-bin/test_batch.bin"
    ]
    members = []
    for kind, target in (
        (tarfile.SYMTYPE, str(secret)),
        (tarfile.LNKTYPE, "../../secret"),
        (tarfile.SYMTYPE, "../../secret"),
    ):
        members = [(tarfile.TarInfo(name), b"") for name in names]
        for info, _ in members:
            info.type, info.linkname = kind, target
        members += [
            (tarfile.TarInfo("../outside"), b"x"),
            (tarfile.TarInfo("/tmp/outside-of-mlo"), b"x"),
        ]
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        (data / "cifar-10-binary.tar.gz").write_bytes(archive(members))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="is damaged"):
            load_dataset("cifar10", data)
        assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/outside-of-mlo").exists()
