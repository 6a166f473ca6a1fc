"""Gets the data sets: the Caltech-101 archive, and the demo's digits."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import IO

from filelock import FileLock

from caltech_hpo.data.cache import Progress, sync_folder
from caltech_hpo.data.files import shown
from caltech_hpo.errors import DataError

# Address and MD5 as in torchvision.datasets.Caltech101.download.
ARCHIVE_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
ARCHIVE_MD5 = "3138e1922a9193bfa496528edbbc45d0"
INNER_ARCHIVE = "101_ObjectCategories.tar.gz"
CHUNK = 1 << 20
WAYS_OUT = (
    f"(1) on a machine with a network run 'caltech-hpo data fetch' and copy its folder here; "
    f"(2) download {ARCHIVE_URL} yourself and run 'caltech-hpo data fetch --archive FILE'; "
    f"(3) give the folder of your own images: --data DIR"
)


def fetch_caltech101(
    datasets: Path, *, archive: Path | None = None, url: str = ARCHIVE_URL, md5: str = ARCHIVE_MD5,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Puts the class folders under `datasets`/caltech101 and returns that folder; does nothing if there.

    Without `archive` the file is downloaded, going on where an earlier download stopped. Raises
    DataError when offline (naming the ways out), for a wrong checksum, or an unusable archive.
    """
    target = datasets / "caltech101"
    images = target / "101_ObjectCategories"
    datasets.mkdir(parents=True, exist_ok=True)
    if archive is not None and not archive.is_file():
        raise DataError(f"{archive}: there is no such archive", "give --archive the path of caltech-101.zip")
    with FileLock(datasets / "caltech101.lock"):
        if images.is_dir():
            return target
        downloaded = archive is None
        source = archive or download(url, datasets / "caltech-101.zip", progress=progress)
        if downloaded or source.suffix == ".zip":
            check_md5(source, md5, downloaded=downloaded, progress=progress)
        unpack(source, target, progress=progress)
        if downloaded:
            source.unlink()
    return target


def download(url: str, path: Path, *, progress: Progress | None = None) -> Path:
    """Downloads to `path`, through `path`.part, which a later call resumes. Raises DataError."""
    if path.exists():
        return path
    partial = path.with_name(path.name + ".part")
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            resumed = response.status == 206
            have = have if resumed else 0
            total = have + int(response.headers.get("Content-Length") or 0)
            with partial.open("ab" if resumed else "wb") as file:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    if progress:
                        progress(f"downloading {path.name}, bytes", have, max(total, have))
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the partial file is already whole
            raise DataError(f"{url}: the server answered {error.code} {error.reason}", WAYS_OUT) from error
    except OSError as error:  # URLError, time-outs, connection resets
        raise DataError(f"cannot download {url}: {error}", WAYS_OUT) from error
    else:
        if have < total:
            raise DataError(
                f"the download of {url} stopped at {have:,} of {total:,} bytes",
                "run the command again; it goes on from there",
            )
    partial.replace(path)
    sync_folder(path.parent)
    return path


def check_md5(path: Path, expected: str, *, downloaded: bool, progress: Progress | None = None) -> None:
    """Raises DataError if the file's MD5 is another; a downloaded file is then removed."""
    actual = hashlib.md5(usedforsecurity=False)
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            actual.update(chunk)
            done += len(chunk)
            if progress:
                progress("checking the archive, bytes", done, size)
    if actual.hexdigest() != expected:
        if downloaded:
            path.unlink()
        raise DataError(
            f"{path}: MD5 {actual.hexdigest()}, expected {expected}: damaged, or another file",
            "fetch it again" if downloaded else f"download {ARCHIVE_URL} again",
        )


def unpack(archive: Path, target: Path, *, progress: Progress | None = None) -> None:
    """Unpacks the class folders of the zip (or of its inner tar.gz) into `target`, all or nothing."""
    remove_leftovers(target.parent, "unpack-")
    temporary = Path(tempfile.mkdtemp(prefix="unpack-", dir=target.parent))
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as outer:
                inner = [name for name in outer.namelist() if name.endswith(INNER_ARCHIVE)]
                if len(inner) != 1:
                    raise DataError(
                        f"{archive}: holds no {INNER_ARCHIVE}", "give the caltech-101.zip archive"
                    )
                with outer.open(inner[0]) as stream:
                    _extract_tar(stream, temporary, progress)
        else:
            with archive.open("rb") as stream:
                _extract_tar(stream, temporary, progress)
        if not (temporary / "101_ObjectCategories").is_dir():
            raise DataError(
                f"{archive}: holds no folder 101_ObjectCategories", "give the caltech-101.zip archive"
            )
        target.mkdir(parents=True, exist_ok=True)
        (temporary / "101_ObjectCategories").replace(target / "101_ObjectCategories")
        sync_folder(target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}", "fetch the archive again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Removes what a killed process has left; the lock must be held under which it is made."""
    for left in folder.glob(f"{prefix}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _extract_tar(stream: IO[bytes], folder: Path, progress: Progress | None) -> None:
    """Extracts member by member; the "data" filter refuses what would land outside the folder.

    Links are refused too: the filter of Python before 3.11.13 can be led out of the folder by them
    (CVE-2025-4517), and the real archive has none.
    """
    # tarfile's own decompression stops quietly at damage; gzip's, read to the end, checks the CRC.
    with gzip.GzipFile(fileobj=stream) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
        for done, member in enumerate(tar, start=1):
            if not (member.isreg() or member.isdir()):
                raise tarfile.ExtractError(f"{shown(member.name)} in it is neither a file nor a folder")
            tar.extract(member, folder, filter="data")
            if progress:
                progress("unpacking files", done, max(done, 9_247))  # the members of the real archive
        while unzipped.read(CHUNK):
            pass


def write_demo(datasets: Path, *, progress: Progress | None = None) -> Path:
    """Writes scikit-learn's 1,797 handwritten digits (8x8 pixels) as 64x64 PNG files in ten class folders.

    Returns the folder; does nothing if it is there. Raises DataError without scikit-learn.
    """
    target = datasets / "demo"
    if target.is_dir():
        return target
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the demo's digits come with scikit-learn, which is not installed",
            "pip install 'caltech-hpo[demo]'",
        ) from error
    from PIL import Image

    digits = load_digits()
    datasets.mkdir(parents=True, exist_ok=True)
    with FileLock(datasets / "demo.lock"):
        if target.is_dir():
            return target
        remove_leftovers(datasets, "demo-")
        temporary = Path(tempfile.mkdtemp(prefix="demo-", dir=datasets))
        for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True), start=1):
            folder = temporary / f"digit_{digit}"
            folder.mkdir(exist_ok=True)
            image = Image.fromarray((pixels * (255 / 16)).astype("uint8"))  # intensities are 0 to 16
            image.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"image_{number:04d}.png")
            if progress:
                progress("writing the demo's digits", number, len(digits.target))
        temporary.chmod(0o755)
        temporary.replace(target)
        sync_folder(datasets)
    return target
