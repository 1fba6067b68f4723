"""Bundles: what goes in comes out, and whatever is wrong with one is told before a model appears."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embedserve.models.bundle import BUNDLE_MANIFEST, pack, unpack, verify
from embedserve.models.catalog import locate
from embedserve.models.errors import BundleError, CheckpointError
from embedserve.models.manifest import Manifest, sum_of
from embedserve.models.progress import Progress

REVISION = "a" * 40


def write_model(folder: Path, seed: int = 1, **files: bytes) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    content = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}]).encode(),
        "1_Pooling/config.json": b"{}",
        "model.safetensors": random.Random(seed).randbytes(3000),
        "LICENSE": "© somebody".encode(),
        "README.md": b"not needed",
        "tf_model.h5": b"not needed",
        **files,
    }
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


NEEDED = ["1_Pooling/config.json", "LICENSE", "config.json", "model.safetensors", "modules.json", "tokenizer.json"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two models as one file."""
    write_model(tmp_path / "models" / "acme" / "one")
    write_model(tmp_path / "models" / "two", seed=2)
    pack(tmp_path / "models", tmp_path / "bundle.tar")
    return tmp_path / "bundle.tar"


def test_what_goes_in_comes_out_where_the_server_finds_it(bundle: Path, tmp_path: Path) -> None:
    assert [manifest.model for manifest in unpack(bundle, tmp_path / "there")] == ["acme/one", "two"]
    for model in ("acme/one", "two"):
        folder = locate(model, tmp_path / "there")
        original = contents(tmp_path / "models" / model)
        assert contents(folder) == {name: original[name] for name in NEEDED} | {
            "embedserve.json": (folder / "embedserve.json").read_bytes()
        }
    assert verify(bundle) == verify(tmp_path / "there") == {"acme/one": [], "two": []}
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["acme", "two"]


def test_the_same_files_make_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "models").rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    pack(tmp_path / "models", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()
    unpack(bundle, tmp_path / "there")
    pack(tmp_path / "there", tmp_path / "third.tar")
    assert (tmp_path / "third.tar").read_bytes() == bundle.read_bytes()


def test_plain_tar_can_read_it_and_the_manifest_comes_first(bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(bundle) as tar:
        names = tar.getnames()
        head = json.loads(tar.extractfile(names[0]).read())  # type: ignore[union-attr]
        tar.extractall(tmp_path / "plain", filter="data")
    assert names == [
        BUNDLE_MANIFEST,
        *(f"{model}/{name}" for model in ("acme/one", "two") for name in ["embedserve.json", *NEEDED]),
    ]
    assert [model["model"] for model in head["models"]] == ["acme/one", "two"]
    weights = sum_of(tmp_path / "models" / "acme" / "one" / "model.safetensors")
    assert head["models"][0]["files"]["model.safetensors"] == {"size": 3000, "sha256": weights.sha256}
    assert verify(tmp_path / "plain") == {"acme/one": [], "two": []}


@pytest.mark.parametrize("whole", [True, False], ids=["cache", "snapshot"])
def test_the_hub_cache_is_packed_with_the_contents_behind_its_links(tmp_path: Path, whole: bool) -> None:
    cache = tmp_path / "cache" / "models--BAAI--bge-small-en-v1.5"
    snapshot = write_model(cache / "snapshots" / REVISION)
    (cache / "blobs").mkdir()
    original = contents(snapshot)
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(cache / "blobs" / str(number))
        path.symlink_to(cache / "blobs" / str(number))
    [manifest] = pack(tmp_path / "cache" if whole else snapshot, tmp_path / "bundle.tar")
    assert (manifest.model, manifest.repository) == ("BAAI/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5")
    assert (manifest.revision, manifest.licence) == (REVISION, "MIT")
    unpack(tmp_path / "bundle.tar", tmp_path / "there")
    folder = tmp_path / "there" / "BAAI" / "bge-small-en-v1.5"
    assert {name: data for name, data in contents(folder).items() if name != "embedserve.json"} == {
        name: original[name] for name in NEEDED
    }
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = write_model(tmp_path / "model")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="LICENSE: a link out of the folder"):
        pack(folder, tmp_path / "bundle.tar")
    assert not (tmp_path / "bundle.tar").exists()


def test_pickles_are_packed_as_safetensors_and_stay_in_the_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m3")
    (folder / "model.safetensors").unlink()
    tensors = {"weight": torch.randn(3, 4), "bias": torch.randn(3).half()}
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save(tensors, folder / "sparse_linear.pt")
    before = contents(folder)
    [manifest] = pack(folder, tmp_path / "bundle.tar", model="acme/m3")
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert (
        manifest.files["model.safetensors"].source == f"pytorch_model.bin {sum_of(folder / 'pytorch_model.bin').sha256}"
    )
    unpack(tmp_path / "bundle.tar", tmp_path / "there")
    for name in ("model.safetensors", "sparse_linear.safetensors"):
        found = load_file(tmp_path / "there" / "acme" / "m3" / name)
        assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
            name: (t.dtype, t.tolist()) for name, t in tensors.items()
        }
    assert not list((tmp_path / "there").rglob("*.bin"))


def test_a_folder_that_no_longer_agrees_with_its_manifest_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    unpack(bundle, tmp_path / "there")
    folder = tmp_path / "there" / "two"
    (folder / "config.json").write_text("{ }")
    with pytest.raises(BundleError, match=r"config\.json is not what embedserve\.json says"):
        pack(folder, tmp_path / "again.tar")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    with pytest.raises((BundleError, CheckpointError), match=r"no weights|is missing"):
        pack(folder, tmp_path / "again.tar")
    assert not (tmp_path / "again.tar").exists()


def test_what_is_there_is_not_overwritten(bundle: Path, tmp_path: Path) -> None:
    before = bundle.read_bytes()
    with pytest.raises(BundleError, match="is already there; take another name, or --force"):
        pack(tmp_path / "models" / "two", bundle)
    assert bundle.read_bytes() == before
    with pytest.raises(BundleError, match=r"acme/one is already there; remove it"):
        unpack(bundle, tmp_path / "models")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda folder: (folder / "config.json").unlink(), "missing     config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "changed     config.json: SHA-256"),
        (lambda folder: (folder / "config.json").write_text("{ }"), "changed     config.json: 3 bytes, expected 2"),
        (lambda folder: (folder / "onnx").mkdir() or (folder / "onnx" / "x").touch(), "unexpected  onnx/x"),
    ],
    ids=["missing", "changed", "longer", "unexpected"],
)
def test_verify_names_each_file_that_is_not_as_it_should_be(
    bundle: Path, tmp_path: Path, change: Callable[[Path], object], line: str
) -> None:
    unpack(bundle, tmp_path / "there")
    change(tmp_path / "there" / "two")
    for path, others in [(tmp_path / "there", {"acme/one": []}), (tmp_path / "there" / "two", {})]:
        faults = verify(path)
        assert len(faults["two"]) == 1
        assert faults["two"][0].startswith(line)
        assert {model: lines for model, lines in faults.items() if model != "two"} == others


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    with pytest.raises(BundleError, match=r"no embedserve\.json in it or below it"):
        verify(tmp_path)


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    whole = bundle.read_bytes()
    unpack(bundle, tmp_path / "right")
    right = contents(tmp_path / "right")
    rng = random.Random(7)
    found = 0
    for attempt in range(150):
        position = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        bundle.write_bytes(damaged)
        target = tmp_path / f"there-{attempt}"
        try:
            unpack(bundle, target)
        except BundleError:
            found += 1
            assert contents(target) == {}
        else:  # between two files, where the archive is only filled up
            assert contents(target) == right
    assert found > 50


@pytest.mark.parametrize("kept", [0, 100, 512, 1500, 0.3, 0.5, 0.6])
def test_a_truncated_bundle_is_refused_and_leaves_nothing(bundle: Path, tmp_path: Path, kept: float) -> None:
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    with pytest.raises(BundleError, match=r"bundle\.tar: "):
        unpack(bundle, tmp_path / "there")
    assert contents(tmp_path / "there") == {}


def test_a_truncated_bundle_has_its_faults_listed(bundle: Path) -> None:
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[: whole.rindex(b"two/model.safetensors") + 2000])
    faults = verify(bundle)
    assert faults["acme/one"] == []
    assert faults[""] == ["damaged     the archive is truncated or damaged (unexpected end of data)"]
    assert faults["two"] == ["missing     model.safetensors", "missing     modules.json", "missing     tokenizer.json"]


def rebuilt(bundle: Path, change: Callable[[tarfile.TarInfo, bytes], list[tuple[tarfile.TarInfo, bytes]]]) -> Path:
    """The bundle with each member replaced by what `change` makes of it."""
    target = bundle.with_name("hostile.tar")
    with tarfile.open(bundle) as source, tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for info in source:
            data = source.extractfile(info).read()  # type: ignore[union-attr]
            for new, content in change(info, data):
                if new.isreg():
                    new.size = len(content)
                tar.addfile(new, io.BytesIO(content))
    return target


def added(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "member",
    [
        added("../outside"),
        added("/tmp/outside"),
        added("two/../../outside"),
        added("two/extra.json"),
        added("two/link", tarfile.SYMTYPE, "/etc"),
        added("two", tarfile.SYMTYPE, "/tmp"),
        added("two/hard", tarfile.LNKTYPE, "/etc/passwd"),
        added("two/pipe", tarfile.FIFOTYPE),
        added("two/device", tarfile.CHRTYPE),
        added("two/folder", tarfile.DIRTYPE),
        added("two/\x1b[31mred"),
        added(BUNDLE_MANIFEST),
    ],
    ids=lambda info: ascii(info.name),
)
def test_a_member_that_the_manifest_does_not_list_is_refused(
    bundle: Path, tmp_path: Path, member: tarfile.TarInfo
) -> None:
    hostile = rebuilt(
        bundle, lambda info, data: [(info, data), *([(member, b"x")] if info.name.endswith("one/config.json") else [])]
    )
    [fault] = verify(hostile)[""]
    assert fault.startswith("unexpected  ")
    assert fault.isprintable()
    with pytest.raises(BundleError, match="unexpected"):
        unpack(hostile, tmp_path / "there")
    assert contents(tmp_path / "there") == {}
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_link_in_the_place_of_a_file_is_refused(bundle: Path, tmp_path: Path, kind: bytes) -> None:
    def change(info: tarfile.TarInfo, data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        return [(added(info.name, kind, "/etc/passwd"), b"") if info.name == "two/config.json" else (info, data)]

    with pytest.raises(BundleError, match=r"hostile     two/config\.json|damaged"):
        unpack(rebuilt(bundle, change), tmp_path / "there")
    assert contents(tmp_path / "there") == {}


def test_a_file_that_is_twice_in_the_archive_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="unexpected"):
        unpack(rebuilt(bundle, lambda info, data: [(info, data), (info, data)]), tmp_path / "there")


def test_a_missing_file_and_bytes_behind_the_end_are_told(bundle: Path) -> None:
    hostile = rebuilt(bundle, lambda info, data: [(info, data)] if info.name != "two/config.json" else [])
    assert verify(hostile) == {"acme/one": [], "two": ["missing     config.json"]}
    with bundle.open("ab") as file:
        file.write(b"\0" * 20000)
    assert "behind the end of the archive" in verify(bundle)[""][0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"model": "two"', '"model": "../../two"', "field 'model'"),
        ('"model": "two"', '"model": "/two"', "field 'model'"),
        ('"model": "two"', '"model": "acme"', "'acme' is in it twice"),
        ('"model": "two"', '"model": "acme/one"', "'acme/one' is in it twice"),
        ('"LICENSE"', '"../../LICENSE"', "field 'files'"),
        ('"LICENSE"', '".bashrc"', "field 'files'"),
        ('"LICENSE"', '"embedserve.json"', "field 'files'"),
        ('"LICENSE"', '"config.json/a/b"', "field 'files': expected each name to be a file or a folder"),
        ('"size": 3000', '"size": -1', r"field 'files\.model\.safetensors\.size'"),
        ('"size": 3000', '"size": 1e99', r"field 'files\.model\.safetensors\.size'"),
        ('"size": 3000', '"size": 10000000000000000', "are free there"),
        ('"format": 1', '"format": 2', "reads format 1"),
        ('"models"', '"nothing"', "field 'models'"),
        ("{", "[", "not a manifest"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(
    bundle: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    def change(info: tarfile.TarInfo, data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        return [(info, data.replace(old.encode(), new.encode()) if info.name == BUNDLE_MANIFEST else data)]

    with pytest.raises(BundleError, match=words):
        unpack(rebuilt(bundle, change), tmp_path / "there")
    assert contents(tmp_path / "there") == {}


def test_another_tar_is_no_bundle(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
    for content in (None, b"", b"text", b"\x1f\x8b" + b"0" * 2000):
        if content is not None:
            (tmp_path / "other.tar").write_bytes(content)
        with pytest.raises(BundleError, match=r"other\.tar: not a bundle"):
            verify(tmp_path / "other.tar")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_a_model_cannot_be_packed(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"no such folder|there is no config\.json"):
        pack(tmp_path / name, tmp_path / "bundle.tar")


def test_the_id_is_the_manifest_s_or_the_catalogue_s_or_the_folder_s_name(tmp_path: Path) -> None:
    for place, id_ in [
        ("x/BAAI/bge-m3-own", "bge-m3-own"),
        ("x/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5"),
        ("x/baai/BGE-base-en-v1.5", "BAAI/bge-base-en-v1.5"),
    ]:
        [manifest] = pack(write_model(tmp_path / place), tmp_path / "bundle.tar", force=True)
        assert manifest.model == id_
    named = write_model(tmp_path / "y")
    Manifest("acme/named", {"config.json": sum_of(named / "config.json")}, revision=REVISION).write(named)
    [manifest] = pack(named, tmp_path / "bundle.tar", force=True)
    assert (manifest.model, manifest.revision) == ("acme/named", REVISION)
    [manifest] = pack(write_model(tmp_path / "z"), tmp_path / "bundle.tar", force=True, model="all-minilm-l6-v2")
    assert manifest.model == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("place", ["there", "there/acme", "there/acme/one"])
@pytest.mark.parametrize("what", ["a file", "a link that leads nowhere"])
def test_what_is_in_the_way_is_named(bundle: Path, tmp_path: Path, place: str, what: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    if what == "a file":
        (tmp_path / place).touch()
    else:
        (tmp_path / place).symlink_to("nowhere")
    words = "already there" if place.endswith("one") else f"{what}, where a folder has to be"
    with pytest.raises(BundleError, match=rf"{tmp_path}/{place} is {words}; remove it, or unpack elsewhere"):
        unpack(bundle, tmp_path / "there")


def test_a_failed_unpack_leaves_no_folder_that_was_not_there(bundle: Path, tmp_path: Path) -> None:
    with bundle.open("r+b") as file:
        file.truncate(15000)
    (tmp_path / "mine").mkdir()
    with pytest.raises(BundleError, match="nothing was unpacked"):
        unpack(bundle, tmp_path / "mine" / "new" / "there")
    assert not list((tmp_path / "mine").iterdir())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_that_is_gone_at_the_end_and_nothing_elsewhere() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with Progress("packing", 2_500_000, stream) as progress:
            progress.advance(1_000_000)
    assert terminal.getvalue() == "\r\x1b[Kpacking   40 %  1.0 MB of 2.5 MB\r\x1b[K"
    assert pipe.getvalue() == ""
